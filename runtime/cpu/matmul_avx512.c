/* matmul_avx512.c - weights times activations for AVX-512: matmul_tiles.h with 16 outputs a tile, and the integer
 * product: per 64 MACs a broadcast of four activations and one vpdpbusd, which multiplies unsigned codes. */
#include <immintrin.h>

#include "matmul_avx512.h"

enum { OUTS = 16, ROWS = 8, ROW_BLOCK = 128, ZERO_8BIT = 128 };

#include "matmul_tiles.h"

INLINE __m128i load_16(const uint8_t *src) { return _mm_loadu_si128((const __m128i *)(const void *)src); }

INLINE void load_transposed(const rows *from, size_t at, lanes out[4]) {
    __m512i v[4];
#pragma GCC unroll 4
    for (size_t o = 0; o < 4; o++) {
        const uint8_t *row = from->first + at + o * from->stride;
        v[o] = _mm512_castsi128_si512(load_16(row));
        v[o] = _mm512_inserti32x4(v[o], load_16(row + 4 * from->stride), 1);
        v[o] = _mm512_inserti32x4(v[o], load_16(row + 8 * from->stride), 2);
        v[o] = _mm512_inserti32x4(v[o], load_16(row + 12 * from->stride), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = (lanes)_mm512_unpacklo_epi64(a, c);
    out[1] = (lanes)_mm512_unpackhi_epi64(a, c);
    out[2] = (lanes)_mm512_unpacklo_epi64(b, d);
    out[3] = (lanes)_mm512_unpackhi_epi64(b, d);
}

INLINE floats halves(lanes v) { return (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }

INLINE void split_halves(lanes v, floats *low, floats *high) {
    const __m512i apart_at = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, /* */
                                              30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i apart = _mm512_permutexvar_epi16(apart_at, (__m512i)v);
    *low = (floats)_mm512_cvtph_ps(_mm512_castsi512_si256(apart));
    *high = (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(apart, 1));
}

/* byte i of a lane takes the bits from 4g + i - place on, of which number `place` counts */
INLINE lanes spread_bits(lanes v, int32_t g, int32_t place) {
    const uint64_t from = 0x2322212003020100u; /* for two lanes: a qword, whose bits wrap around */
    __m512i at = _mm512_set1_epi64((int64_t)(from + 0x0101010101010101u * (uint64_t)(64 + 4 * g - place)));
    return (lanes)_mm512_multishift_epi64_epi8(at, (__m512i)v) & in_each_byte(1u << place);
}

INLINE lanes repeated(const int8_t bytes[16]) {
    return (lanes)_mm512_broadcast_i32x4(load_16((const uint8_t *)bytes));
}

INLINE lanes look_up(lanes table, lanes index) {
    return (lanes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
}

INLINE lanes gather(const uint32_t *table, lanes index) {
    return (lanes)_mm512_i32gather_epi32((__m512i)index, table, 4);
}

INLINE floats fused(floats a, floats b, floats c) { return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

INLINE void dot_products(format f, const lanes *code, int32_t n_groups, const kvm_q8_row *x, int32_t n, int32_t i0,
                         ints dot[ROWS]) {
    (void)f;
    for (int32_t r = 0; r < n; r++) dot[r] = (ints){0};
#pragma GCC unroll 8
    for (int32_t g = 0; g < n_groups; g++) {
#pragma GCC unroll 8
        for (int32_t r = 0; r < n; r++) {
            int32_t four;
            memcpy(&four, x[r].q + i0 + 4 * g, sizeof four);
            dot[r] = (ints)_mm512_dpbusd_epi32((__m512i)dot[r], (__m512i)code[g], _mm512_set1_epi32(four));
        }
    }
}

void kvm_matmul_avx512_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                          float *y, int32_t ldy) {
    matmul_of[w->type](w, first, last, x, n_rows, y, ldy);
}

void kvm_matmul_avx512_load(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out) {
    load_of[w->type](w, first, last, i, out);
}
