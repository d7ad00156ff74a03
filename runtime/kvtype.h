/* kvtype.h - the formats of one side (K or V) of one layer's packed pages: table, codec, preconditioning, byte layout.
 *
 * This header is the specification. kvtype.c, tests/ref/codec.py and later CUDA implement it and must agree bit for
 * bit: every operation below is one IEEE f32 operation, rounded to nearest even, no fused multiply-add, sums in the
 * order written. "f16(x)" rounds to nearest even; kvm_f16_sat first clamps to +-65504.
 *
 * 1. A page matrix is X[d][128]: one KV head, d channels (slow) by 128 positions (fast). Positions outside
 *    [first, n_valid) - sinks, or a page not full - are +0 in every step.
 *
 * 2. K only, before encoding (kvm_precondition_k). sum128(x) over positions is: lanes S[j] = x[j] + x[16+j] + ... +
 *    x[112+j] in that order, j = 0..15, then S[j] += S[j+8] for j < 8, S[j] += S[j+4] for j < 4, += 2, += 1.
 *    n = n_valid - first, as f32.
 *      mean[c]    = f16(sum128(x) / n)
 *      x         -= mean[c]                        (positions outside stay 0)
 *      rk[c]      = sqrt(sum128(x * x) / n),  rq[c] = sqrt(sum128(q * q) / n), q = the page's query rms rows
 *      rk, rq     = max(r, 2^-10 * the largest r over channels); when either largest is 0: balance[c] = 1
 *      ratio[c]   = sqrt(rk[c] / rq[c])
 *      balance[c] = f16(clamp(ratio[c] / center, 1/16, 16)), center = the geometric mean of ratio over channels:
 *                   (float)exp2(sum of log2((double)ratio[c]), c ascending, / d) in double
 *      x         /= balance[c]
 *    The query rms rows hold, for each position, f16_sat(sqrt(sum of q * q over the KV head's query heads / their
 *    number)), f32, heads ascending, q after RoPE and before scaling.
 *    A balance taken earlier (frozen) replaces the one computed here. Then Hadamard over channels in blocks of h,
 *    the largest power of two dividing d: for s = 1, 2, 4 .. h/2, pairs (a, b) s apart become (a + b, a - b);
 *    at the end x *= (float)(1 / sqrt((double)h)).
 *    V: only the Hadamard, with h at most 64.
 *    A query reads a packed page as q' = H(balance * q), and its logit is q'.k' + q.mean.
 *
 * 3. Encoding (kvm_encode), per position and group of G channels (G = 64, or d where 64 does not divide it).
 *    Levels L[0..2^b) ascend and are symmetric small integers; T[k] = the middle between positive levels k-1 and k.
 *      nearest(t): m = the number of k >= 1 with |t| > T[k]; code = t < 0 ? half - 1 - m : half + m, half = 2^(b-1)
 *        q8 instead: t (0 for a NaN) rounded to nearest even, clamped to +-127; code = that + 128
 *      amax = the largest |x| of the group (a NaN counts as 0); amax = 0: scale = 0, all codes = nearest(0)
 *      for each factor F[j] of the type, in order: s = amax * F[j], inv = 1 / s;
 *        num = sum of x * L, den = sum of L * L with L = L[nearest(x * inv)], channels ascending;
 *        gain = num * num / den; a strictly larger gain than before keeps best = num / den (both start at 0)
 *      scale = f16_sat(best) where best > 0, else 0; inv = 1 / scale; code = nearest(x * inv), or nearest(0) when scale
 *        is 0
 *    K keeps this least-squares scale. It shrinks values, by as much as they are in error; attention averages the
 *    errors of many values away but not what all have lost, so V takes the scale that loses nothing on average:
 *      xx = sum of x * x, num = sum of x * L[code], channels ascending;
 *      scale = f16_sat(xx / num) where scale, num and xx / num are > 0 (a NaN is not), else it stays
 *    The decoded value is scale * L[code].
 *    The V side of q2 is encoded by section 5.
 *    f16 stores f16_sat(x), raw: no mean, no balance, no Hadamard.
 *
 * 4. Bytes of one side of one KV head's page, in this order: codes, scales, then for K the page vectors.
 *    A *tile* is 16 lanes by R reduced indices. K: lanes are 16 positions, R = d channels, 8 tiles. V: lanes are 16
 *    channels, R = 128 positions, d / 16 tiles. (So a dot product over R needs no horizontal sum on either side.)
 *    A code's bits are split in planes of width w in {8, 4, 2, 1}, high bits first: q8 = 8, q6 = 4+2, q5 = 4+1, q4 = 4,
 *    q3 = 2+1, q2 = 2.
 *    A plane of a tile is ceil(R / (32/w)) lines of 64 bytes, a line holds 32/w reduced indices:
 *
 *      byte 4*lane + i of line g:   bits  w*j .. w*j+w-1  hold index  g*(32/w) + 4*j + i,   j < 8/w, i < 4
 *
 *      w = 4:   bit  7 6 5 4 | 3 2 1 0        w = 2:   7 6 | 5 4 | 3 2 | 1 0     (index in the line, i = byte mod 4)
 *                    4 + i   |   i                     12+i| 8+i | 4+i |  i
 *
 *    (an index past R is 0). The planes of a tile follow each other, tiles follow each other.
 *    Scales: f16 [d / G][128], positions fast. K page vectors: f16 mean[d], then balance[d] if the recipe balances
 *    every page; zeros up to a multiple of 64. f16 pages: K as X[d][128], V as [128][d], 2 bytes a value.
 *    Physical bits: b + 16 / G, K + 16/128 for the mean (and as much for a page balance).
 *
 * 5. V of q2: a trellis code, in the bytes of section 4. A code is a *symbol* s of 2 bits, and the level of a value is
 *    read from a window W of four symbols, its own and those of the three steps before it. The 128 steps of a channel
 *    are a ring; step t = 32 i + 4 g + j is position 16 g + 4 j + i, so that a byte holds four steps in a row:
 *
 *      byte 4*lane + i of line g:  bits 7 6 | 5 4 | 3 2 | 1 0  =  s[t+3] | s[t+2] | s[t+1] | s[t],  t = 32 i + 4 g
 *      and the four steps before them are the same byte of line g - 1; for g = 0, byte 4*lane + (i - 1) mod 4 of line 7
 *
 *      W = s[t-3] | s[t-2] << 2 | s[t-1] << 4 | s[t] << 6, steps mod 128;  a = A[W & 15]
 *      level(W) = a + B[((W >> 4) + a) & 15], within +-52
 *      A = {-8 5 0 -4 -2 2 -6 -10 4 -1 -5 3 -6 10 -10 1}, B = {0 -6 4 7 15 7 21 23 42 25 -12 -24 -14 -22 -38 -6}
 *
 *    Encoding, for a group as in section 3, then for each of its channels:
 *      xx = sum of x * x, channels ascending; inv = 20 / sqrt(xx / G) where xx > 0, else 0
 *      y = x * inv (0 for a NaN) clamped to +-75, rounded to nearest even
 *      the ring of symbols with the least sum of (y - level)^2 that two laps of Viterbi's algorithm find. A state is
 *        the last three symbols, W >> 2. First lap: from all 64 states at cost 0, steps 96..127 then 0..31; the path to
 *        the cheapest state (of equals the lowest) says which state step 127 ends in. Second lap: steps 0..127 from
 *        that state to that state. Of four ways into a state that cost the same, the lowest s[t-3] wins.
 *      num = sum of x * level, channels ascending; scale = f16_sat(xx / num) where num and xx / num are > 0, else 0
 *
 * Levels: Lloyd-Max levels of a Gaussian rounded to integers, q2 +-{3 10}, q3 +-{3 9 16 26},
 * q4 +-{3 9 15 22 29 37 48 63}; q5 and q6 all odd integers to +-31 and +-63, q8 all integers to +-127. NMSE of K on
 * Gaussian rows, d = 128: 0.1116, 0.0293, 0.0071, 0.0022, 0.00056, 0.000035 (rounding the levels costs less than 0.5%,
 * fewer than six factors 0.4-4%; at 6 bits the first factor is as good as more). V is the same after its best common
 * gain, and NMSE / (1 - NMSE) as stored; at 2 bits the trellis code has 0.076 and 0.082.
 */
#ifndef KVM_KVTYPE_H
#define KVM_KVTYPE_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KVM_PAGE = 128, KVM_LANES = 16, KVM_LINE = 64, KVM_GROUP = 64, KVM_SINK_MAX = 64, KVM_HEAD_DIM_MAX = 256 };

/*  X(enum, name, bits, llama.cpp's name for the nearest thing, or NULL) */
#define KVM_KVTYPE_LIST(X)                                                                                             \
    X(F16, "f16", 16, "f16")                                                                                           \
    X(Q8, "q8", 8, "q8_0")                                                                                             \
    X(Q6, "q6", 6, "q6_0")                                                                                             \
    X(Q5, "q5", 5, "q5_0")                                                                                             \
    X(Q4, "q4", 4, "q4_0")                                                                                             \
    X(Q3, "q3", 3, "q3_0")                                                                                             \
    X(Q2, "q2", 2, "q2_0")

typedef enum {
#define X(id, name, bits, alias) KVM_KVTYPE_##id,
    KVM_KVTYPE_LIST(X)
#undef X
        KVM_KVTYPE_COUNT
} kvm_kvtype;

typedef enum { KVM_SIDE_K, KVM_SIDE_V } kvm_side;

typedef struct {
    const char *name, *alias;
    int32_t bits;
    int32_t n_planes, plane_bits[2]; /* high bits first */
    int32_t n_positive;              /* positive levels, 0 for q8 (all integers to 127) and f16 */
    int16_t level[8];                /* the positive levels, ascending; none where they are the odd integers (q5, q6) */
    int32_t n_factors;
    float factor[8]; /* F of section 3: f / (largest level) by one f32 division; f = 1 .9 .8 .7 .6 .5, q5 1 .95 .9
                           .85 .8, q6 and q8 1 */
    bool v_trellis;  /* V is the code of section 5 */
} kvm_kvtype_info;

extern const kvm_kvtype_info kvm_kvtypes[KVM_KVTYPE_COUNT];

/* by our name or llama.cpp's alias; false when there is no such type */
bool kvm_kvtype_from_name(const char *name, size_t n_bytes, kvm_kvtype *out);

/* which of the two codecs a side has */
static inline bool kvm_is_trellis(kvm_kvtype type, kvm_side side) {
    return side == KVM_SIDE_V && kvm_kvtypes[type].v_trellis;
}

extern const int8_t kvm_trellis_a[16], kvm_trellis_b[16];

static inline int32_t kvm_trellis_level(int32_t window) {
    int32_t a = kvm_trellis_a[window & 15];
    return a + kvm_trellis_b[((window >> 4) + a) & 15];
}

static inline int32_t kvm_trellis_position(int32_t step) { return 16 * (step / 4 % 8) + 4 * (step % 4) + step / 32; }

/* the level of each code that is not a trellis': table [2^bits] */
void kvm_kvtype_levels(kvm_kvtype type, int8_t table[256]);

/* codes [d][128] of a quantized side -> levels [d][128], in units of the scale */
void kvm_levels_of(kvm_kvtype type, kvm_side side, const uint8_t *codes, int32_t d, int8_t *levels);

/* Where the parts of one side of one head's page lie; all in bytes from its start. total is a multiple of 64. */
typedef struct {
    int32_t tile_bytes, n_tiles;
    int32_t scales, mean, balance; /* offsets; mean and balance -1 where absent */
    int32_t total;
} kvm_page_layout;
kvm_page_layout kvm_page_layout_of(kvm_kvtype type, kvm_side side, int32_t d, bool balance_page);

static inline int32_t kvm_group_of(int32_t d) { return d % KVM_GROUP == 0 ? KVM_GROUP : d; }
int32_t kvm_hadamard_block(int32_t d, kvm_side side);

static inline uint16_t kvm_f16_sat(float x) {
    return kvm_f32_to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

/* x: [d][n] in place, blocks over the slow index; n = 128 for a page, 1 for a vector */
void kvm_hadamard(float *x, int32_t d, int32_t n, int32_t block);

/* Section 2. x: [d][128] in and out; q_rms: [d][128] f16 or NULL when `frozen` is given;
 * frozen: [d] f16 or NULL; mean, balance: [d] f16 out (balance is a copy of frozen if given). */
void kvm_precondition_k(float *x, int32_t d, int32_t first, int32_t n_valid, const uint16_t *q_rms,
                        const uint16_t *frozen, uint16_t *mean, uint16_t *balance);

/* Sections 3 and 5, for a quantized type. x: [d][128]; codes: [d][128]; scales: [d/G][128] f16. */
void kvm_encode(kvm_kvtype type, kvm_side side, const float *x, int32_t d, uint8_t *codes, uint16_t *scales);

/* Section 4: planes of all tiles. codes: [d][128]; page: the side's bytes. And back. */
void kvm_planes_pack(kvm_kvtype type, kvm_side side, const uint8_t *codes, int32_t d, uint8_t *page);
void kvm_planes_unpack(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, uint8_t *codes);

/* The plain decoder: page bytes -> out, K: [d][128], V: [128][d], as stored (in the rotated, balanced frame).
 * Only the codes and scales are read. Any type, f16 too. */
void kvm_decode_page(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out);

/* What a quantized type makes of a side, in the model's frame: x [d][128], K or V, is preconditioned with the page's
 * own statistics (q_rms as above, not used for V), encoded, decoded and turned back. 0 outside [first, n_valid). */
void kvm_roundtrip(kvm_kvtype type, kvm_side side, float *x, int32_t d, int32_t first, int32_t n_valid,
                   const uint16_t *q_rms);

#ifdef __cplusplus
}
#endif
#endif
