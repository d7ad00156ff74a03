/* matmul_avx2.c - weights times activations for AVX2: matmul_tiles.h with eight outputs a tile, and the product.
 *
 * Per 32 MACs a broadcast of four activations, one multiply (maddubs) and one add. maddubs adds two products of
 * unsigned code and signed activation in 16 bits and saturates. |activation| <= 127, so `chain` sums of pairs fit when
 * chain * 2 * 127 * (largest code) <= 32767; then they are widened to 32 bits. Signed codes are multiplied as
 * |code| * (activation with the code's sign).
 */
#include <immintrin.h>

#include "matmul_avx2.h"

enum { OUTS = 8, ROWS = 4, ROW_BLOCK = 64, ZERO_8BIT = 0 };

#include "matmul_tiles.h"

INLINE __m128i load_16(const uint8_t *src) { return _mm_loadu_si128((const __m128i *)(const void *)src); }

INLINE void load_transposed(const rows *from, size_t at, lanes out[4]) {
    __m256i v[4];
#pragma GCC unroll 4
    for (size_t o = 0; o < 4; o++) {
        const uint8_t *row = from->first + at + o * from->stride;
        v[o] = _mm256_castsi128_si256(load_16(row));
        v[o] = _mm256_inserti128_si256(v[o], load_16(row + 4 * from->stride), 1);
    }
    __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = (lanes)_mm256_unpacklo_epi64(a, c);
    out[1] = (lanes)_mm256_unpackhi_epi64(a, c);
    out[2] = (lanes)_mm256_unpacklo_epi64(b, d);
    out[3] = (lanes)_mm256_unpackhi_epi64(b, d);
}

INLINE floats halves(lanes v) {
    __m256i low = (__m256i)(v & 0xffffu), packed = _mm256_packus_epi32(low, low); /* lanes 0-3 0-3 4-7 4-7 */
    return (floats)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}

INLINE void split_halves(lanes v, floats *low, floats *high) {
    const __m256i apart_at = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)v, apart_at), 0xd8);
    *low = (floats)_mm256_cvtph_ps(_mm256_castsi256_si128(apart));
    *high = (floats)_mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
}

INLINE lanes spread_bits(lanes v, int32_t g, int32_t place) {
    __m256i first_byte = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    __m256i spread = _mm256_shuffle_epi8((__m256i)v, _mm256_add_epi8(first_byte, _mm256_set1_epi8((char)(g / 2))));
    __m256i mask = _mm256_set1_epi32(g % 2 == 0 ? 0x08040201 : (int32_t)0x80402010u);
    __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
    return (lanes)_mm256_and_si256(is_set, _mm256_set1_epi8((char)(1 << place)));
}

INLINE lanes repeated(const int8_t bytes[16]) {
    return (lanes)_mm256_broadcastsi128_si256(load_16((const uint8_t *)bytes));
}

INLINE lanes look_up(lanes table, lanes index) {
    return (lanes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
}

INLINE lanes gather(const uint32_t *table, lanes index) {
    return (lanes)_mm256_i32gather_epi32((const int *)table, (__m256i)index, 4);
}

INLINE floats fused(floats a, floats b, floats c) { return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

INLINE void dot_products(format f, const lanes *code, int32_t n_groups, const kvm_q8_row *x, int32_t n, int32_t i0,
                         ints dot[ROWS]) {
    const int32_t fit = f.max_code <= 16 ? 8 : f.max_code <= 32 ? 4 : f.max_code <= 64 ? 2 : 1;
    const int32_t chain = kvm_min(fit, n_groups);
    for (int32_t r = 0; r < n; r++) dot[r] = (ints){0};
#pragma GCC unroll 8
    for (int32_t g0 = 0; g0 < n_groups; g0 += chain) {
        __m256i pairs[ROWS];
        for (int32_t r = 0; r < n; r++) pairs[r] = _mm256_setzero_si256();
#pragma GCC unroll 1 /* unrolled, gcc would make all products before the first sum, and spill */
        for (int32_t g = g0; g < g0 + chain; g++) {
            __m256i signed_code = (__m256i)code[g], size = f.is_signed ? _mm256_abs_epi8(signed_code) : signed_code;
#pragma GCC unroll 4
            for (int32_t r = 0; r < n; r++) {
                int32_t four;
                memcpy(&four, x[r].q + i0 + 4 * g, sizeof four);
                __m256i q = _mm256_set1_epi32(four);
                if (f.is_signed) q = _mm256_sign_epi8(q, signed_code);
                pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(size, q));
            }
        }
#pragma GCC unroll 4
        for (int32_t r = 0; r < n; r++) dot[r] += (ints)_mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1));
    }
}

void kvm_matmul_avx2_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                        float *y, int32_t ldy) {
    matmul_of[w->type](w, first, last, x, n_rows, y, ldy);
}

void kvm_matmul_avx2_load(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out) {
    load_of[w->type](w, first, last, i, out);
}
