/* kvencode.h - the costly loops of packing a page, encoding and Hadamard (kvtype.h 2 and 3), as static functions;
 * kvtrellis.h has the encoder of kvtype.h 5.
 *
 * kvtype.c compiles them for every CPU, a kernel file once more for its instruction set. The source is the same and
 * nothing in it may be contracted or reordered (-ffp-contract=off), so the bits are too. Eight positions, or 16, go
 * through the levels side by side in a vector of GCC's and Clang's vector extension; positions never meet.
 */
#ifndef KVM_KVENCODE_H
#define KVM_KVENCODE_H

#include "kvtrellis.h"

#if defined(__AVX512F__)
enum { KVM_WIDE = 16 };
#else
enum { KVM_WIDE = 8 };
#endif
typedef float kvm_wide __attribute__((vector_size(4 * KVM_WIDE), aligned(4), may_alias));
typedef int32_t kvm_wide_int __attribute__((vector_size(4 * KVM_WIDE)));

/* thresholds and steps between the positive levels of a type, for one loop */
typedef struct {
    int32_t n_positive;
    float first, threshold[8], step[8]; /* [1..n_positive) */
} kvm_levels;

KVM_INLINE kvm_wide wide_select(kvm_wide_int mask, kvm_wide a, kvm_wide b) {
    return (kvm_wide)(((kvm_wide_int)a & mask) | ((kvm_wide_int)b & ~mask));
}

KVM_INLINE kvm_wide wide_abs(kvm_wide x) { return (kvm_wide)((kvm_wide_int)x & 0x7fffffff); }

/* nearest(t) of section 3 as a level; *above: how many thresholds |t| passes (not q8) */
KVM_INLINE kvm_wide nearest_level(const kvm_levels *levels, const int32_t n_positive, kvm_wide t, kvm_wide_int *above) {
    const kvm_wide zero = {0};
    if (n_positive == 0) {
        kvm_wide x = wide_select(t < 127.0f, t, zero + 127.0f);
        x = wide_select(x > -127.0f, x, zero - 127.0f);
        x = wide_select(t == t, x, zero);
        return (x + 12582912.0f) - 12582912.0f; /* 1.5 x 2^23: rounds to nearest even */
    }
    kvm_wide size = wide_abs(t), level = zero + levels->first;
    kvm_wide_int n = {0};
    if (n_positive > 8) { /* odd integers: the thresholds passed are the even ones below |t|, ceil(|t| / 2) - 1 */
        kvm_wide half = wide_select(size < 2.0f * (float)n_positive, size * 0.5f, zero + (float)n_positive);
        half = wide_select(t == t, half, zero);
        kvm_wide passed = (half + 12582912.0f) - 12582912.0f;
        passed -= wide_select(passed < half, zero, zero + 1.0f);
        passed = wide_select(passed > 0.0f, passed, zero);
        *above = __builtin_convertvector(passed, kvm_wide_int);
        level = passed + passed + 1.0f;
        return (kvm_wide)((kvm_wide_int)level ^ ((t < 0.0f) & INT32_MIN));
    }
    for (int32_t k = 1; k < n_positive; k++) {
        kvm_wide_int passed = size > levels->threshold[k];
        level += (kvm_wide)((kvm_wide_int)(zero + levels->step[k]) & passed); /* integers: exact */
        n -= passed;
    }
    *above = n;
    return (kvm_wide)((kvm_wide_int)level ^ ((t < 0.0f) & INT32_MIN));
}

/* KVM_WIDE positions of one group: x [n_channels][128] from the first on -> scale f16, codes [n_channels][128] */
KVM_INLINE void encode_wide(const kvm_kvtype_info *info, const kvm_levels *levels, const int32_t n_positive,
                            kvm_side side, const float *x, int32_t n_channels, uint16_t *scale, uint8_t *codes) {
    const kvm_wide zero = {0};
    kvm_wide amax = zero, best = zero, best_gain = zero, xx = zero, x_level = zero;
    kvm_wide_int above;
    for (int32_t c = 0; c < n_channels; c++) {
        kvm_wide row = *(const kvm_wide *)(x + c * KVM_PAGE), size = wide_abs(row);
        amax = wide_select(size > amax, size, amax);
        xx += row * row;
    }
    for (int32_t f = 0; f < info->n_factors; f++) {
        kvm_wide inv = 1.0f / (amax * info->factor[f]), num = zero, den = zero;
        for (int32_t c = 0; c < n_channels; c++) {
            kvm_wide row = *(const kvm_wide *)(x + c * KVM_PAGE);
            kvm_wide level = nearest_level(levels, n_positive, row * inv, &above);
            num += row * level;
            den += level * level;
        }
        kvm_wide gain = num * num / den;
        kvm_wide_int better = gain > best_gain;
        best = wide_select(better, num / den, best);
        best_gain = wide_select(better, gain, best_gain);
    }
    kvm_wide stored;
    for (int32_t p = 0; p < KVM_WIDE; p++) {
        scale[p] = best[p] > 0 ? kvm_f16_sat(best[p]) : 0;
        stored[p] = kvm_f16_to_f32(scale[p]);
    }
    kvm_wide inv = 1.0f / stored;
    for (int32_t c = 0; c < n_channels; c++) {
        kvm_wide row = *(const kvm_wide *)(x + c * KVM_PAGE), t = wide_select(stored == 0.0f, zero, row * inv);
        kvm_wide level = nearest_level(levels, n_positive, t, &above);
        kvm_wide_int negative = t < 0.0f, code;
        if (n_positive == 0) code = __builtin_convertvector(level, kvm_wide_int) + 128;
        else code = n_positive + (above ^ negative); /* half + m, or half - 1 - m = half + ~m */
        for (int32_t p = 0; p < KVM_WIDE; p++) codes[c * KVM_PAGE + p] = (uint8_t)code[p];
        x_level += row * level;
    }
    for (int32_t p = 0; p < KVM_WIDE && side == KVM_SIDE_V; p++) {
        if (scale[p] != 0) scale[p] = unbiased_scale(xx[p], x_level[p], scale[p]);
    }
}

/* kvm_encode's contract */
static void encode_page(kvm_kvtype type, kvm_side side, const float *x, int32_t d, uint8_t *codes, uint16_t *scales) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int32_t group = kvm_group_of(d);
    if (kvm_is_trellis(type, side)) {
        for (int32_t c = 0; c < d; c += group) {
            trellis_encode(x + c * KVM_PAGE, group, codes + c * KVM_PAGE, scales + c / group * KVM_PAGE);
        }
        return;
    }
    kvm_levels levels = {.first = info->level[0]};
    for (int32_t k = 1; k < kvm_min(info->n_positive, 8); k++) {
        levels.threshold[k] = 0.5f * (float)(info->level[k - 1] + info->level[k]);
        levels.step[k] = (float)(info->level[k] - info->level[k - 1]);
    }
    for (int32_t c = 0; c < d; c += group) {
        for (int32_t p = 0; p < KVM_PAGE; p += KVM_WIDE) {
            const float *from = x + c * KVM_PAGE + p;
            uint16_t *scale = scales + c / group * KVM_PAGE + p;
            uint8_t *to = codes + c * KVM_PAGE + p;
            switch (info->n_positive) { /* a loop of its own for each number of levels */
            case 0: encode_wide(info, &levels, 0, side, from, group, scale, to); break;
            case 2: encode_wide(info, &levels, 2, side, from, group, scale, to); break;
            case 4: encode_wide(info, &levels, 4, side, from, group, scale, to); break;
            case 8: encode_wide(info, &levels, 8, side, from, group, scale, to); break;
            case 16: encode_wide(info, &levels, 16, side, from, group, scale, to); break;
            case 32: encode_wide(info, &levels, 32, side, from, group, scale, to); break;
            }
        }
    }
}

/* kvm_hadamard's contract */
static void hadamard(float *x, int32_t d, int32_t n, int32_t block) {
    for (int32_t s = 1; s < block; s *= 2) {
        for (int32_t c = 0; c < d; c += 2 * s) { /* s pairs of rows, s apart: two runs of s * n values */
            float *a = x + (size_t)c * (size_t)n, *b = a + (size_t)s * (size_t)n;
            for (int32_t i = 0; i < s * n; i++) {
                float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum;
                b[i] = difference;
            }
        }
    }
    float norm = (float)(1.0 / sqrt((double)block));
    for (int32_t i = 0; i < d * n; i++) x[i] *= norm;
}

#endif
