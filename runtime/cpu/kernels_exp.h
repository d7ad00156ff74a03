/* kernels_exp.h - the kernels around exp, softmax_step and the gates, for kernels_avx2.c and kernels_avx512.c.
 *
 * Each includes the file once, behind
 *
 *   W, floats, ints                              floats of a vector; vectors of W float, int32_t
 *   fused(a, b, c)                               a * b + c, rounded once
 *   smaller(a, b), larger(a, b)                  b where one of them is a NaN
 *   zero_below(v, x, least)                      v, but 0 in the lanes where x < least
 *   fold_sum(v), fold_max(v)                     over all lanes
 *   load_first(src, n), store_first(dst, v, n)   the first n floats, n <= W; lanes behind them are 0
 */
#ifndef KVM_CPU_KERNELS_EXP_H
#define KVM_CPU_KERNELS_EXP_H

INLINE floats in_each_lane(float x) { return x - (floats){0}; }

/* exp(x) within 1e-7 relative; 0 below -87.3, where it is no normal number, infinity above 88.37; NaN stays NaN.
 * x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) ~ 1 + r + r^2 (...), minimax, 4e-9 before rounding. */
INLINE floats exp_vector(floats x) {
    x = smaller(in_each_lane(88.5f), x);                     /* 2^n below is then at most infinity */
    floats n = (x * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f; /* rounds to the nearest integer */
    floats r = fused(-n, in_each_lane(0x1.62e43p-1f), x);
    r = fused(n, in_each_lane(0x1.05c61p-29f), r);
    floats p = in_each_lane(0x1.6a23cep-10f);
    p = fused(p, r, in_each_lane(0x1.123a2p-7f));
    p = fused(p, r, in_each_lane(0x1.5558f2p-5f));
    p = fused(p, r, in_each_lane(0x1.555492p-3f));
    p = fused(p, r, in_each_lane(0x1.fffffcp-2f));
    p = fused(p, r * r, r) + 1.0f;
    ints power = __builtin_convertvector(n + 127.0f, ints) << 23;
    return zero_below(p * (floats)power, x, -87.3f);
}

static float softmax_step(float *score, float *m, float *l) {
    floats max = in_each_lane(*m), sum = {0};
    for (int32_t i = 0; i < KVM_PAGE; i += W) max = larger(max, load_first(score + i, W));
    float m_new = fold_max(max);
    for (int32_t i = 0; i < KVM_PAGE; i += W) {
        floats p = exp_vector(load_first(score + i, W) - m_new);
        store_first(score + i, p, W);
        sum += p;
    }
    float factor = exp_vector(in_each_lane(*m - m_new))[0];
    *l = *l * factor + fold_sum(sum);
    *m = m_new;
    return factor;
}

/* what the activation's exp is of: SiLU is gate / (1 + exp(-gate)), GELU gate / (1 + exp(-(...))) */
INLINE floats gate_exponent(const bool gelu, floats gate) {
    floats minus = (floats){0} - gate;
    if (!gelu) return minus;
    return minus * KVM_GELU_LINEAR * fused(gate * gate, in_each_lane(KVM_GELU_CUBIC), in_each_lane(1.0f));
}

INLINE void gate_mul(const bool gelu, float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i += W) {
        int32_t n_lanes = kvm_min(W, n - i);
        floats v = load_first(gate + i, n_lanes);
        v = v / (1.0f + exp_vector(gate_exponent(gelu, v))) * load_first(up + i, n_lanes);
        store_first(gate + i, v, n_lanes);
    }
}

static void silu_mul(float *gate, const float *up, int32_t n) { gate_mul(false, gate, up, n); }
static void gelu_mul(float *gate, const float *up, int32_t n) { gate_mul(true, gate, up, n); }

#endif
