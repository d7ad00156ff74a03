/* matmul_avx2.c - block-quantized weights times 8-bit activations, for AVX2.
 *
 * Weights become *tiles*: 8 outputs by 32 inputs, a dword lane for each output, so that no sum ever crosses lanes:
 *
 *   code[g]   byte 4*o + i = code of weight 4g + i of output o      g < 8, o < 8, i < 4
 *   scale[h], min[h]   lane o: weight = scale * code - min, h = half of the 32 inputs (one scale: h = 0 for both)
 *
 * A format is one `fill` function, which makes the tiles of one of its blocks, and four facts about its codes. Eight
 * rows of packed bytes are transposed first and unpacked afterwards, since packed bytes are fewer. The tiles of 256
 * inputs (3 KiB, in L1) then serve all activation rows: per 32 MACs a broadcast of four activations, one multiply
 * (maddubs) and one add.
 *
 * maddubs adds two products of unsigned code and signed activation in 16 bits and saturates. |activation| <= 127, so
 * `chain` sums of pairs fit when chain * 2 * 127 * (largest code) <= 32767; then they are widened to 32 bits. Signed
 * codes are multiplied as |code| * (activation with the code's sign).
 *
 * Each output is the same sequence of operations whatever n_rows, first and last are: for each block of 32 inputs,
 * ascending, for each scale: acc = fma(dot, scale * x_scale, acc), then acc = fma(-min, x_sum, acc) for each sum.
 *
 * Loads stay inside the blocks of the rows asked for. With one activation row the bound is reading the weights once,
 * 0.56 to 1.06 bytes a MAC, so the next eight rows are prefetched while these are used.
 */
#include <immintrin.h>

#include "matmul_avx2.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    OUTS = 8,        /* outputs of a tile */
    TILE = 32,       /* inputs of a tile */
    CHUNK_TILES = 8, /* tiles unpacked at a time: 256 inputs, one block of the K formats */
    ROWS = 4,        /* activation rows in registers */
    ROW_BLOCK = 64,  /* activation rows that stay in L2 while the weights pass by */
    CACHE_LINE = 64,
};

_Static_assert((int)TILE == (int)KVM_Q8_BLOCK, "a tile takes one scale of the activations");

typedef struct {
    __m256i code[8];
    __m256 scale[2], min[2];
} tile;

typedef struct {
    /* the block at row[o] + at of eight rows -> its tiles */
    void (*fill)(const uint8_t *const row[OUTS], size_t at, tile *out);
    int32_t chain, n_scales;
    bool has_min, is_signed;
} format;

/* ---- fields of eight rows ----------------------------------------------------------------------------------- */

/* 16 bytes of each row -> out[g]: lane o = dword g of row o */
INLINE void load_transposed(const uint8_t *const row[OUTS], size_t at, __m256i out[4]) {
    __m256i v[4];
    for (int32_t o = 0; o < 4; o++) {
        __m128i low = _mm_loadu_si128((const __m128i *)(const void *)(row[o] + at));
        __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(row[o + 4] + at));
        v[o] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

INLINE void load_transposed_32(const uint8_t *const row[OUTS], size_t at, __m256i out[8]) {
    load_transposed(row, at, out);
    load_transposed(row, at + 16, out + 4);
}

INLINE int32_t load_i32(const void *src) {
    int32_t value;
    memcpy(&value, src, sizeof value);
    return value;
}

INLINE __m256i load_dwords(const uint8_t *const row[OUTS], size_t at) {
    return _mm256_setr_epi32(load_i32(row[0] + at), load_i32(row[1] + at), load_i32(row[2] + at),
                             load_i32(row[3] + at), load_i32(row[4] + at), load_i32(row[5] + at),
                             load_i32(row[6] + at), load_i32(row[7] + at));
}

INLINE int16_t load_i16(const void *src) {
    int16_t value;
    memcpy(&value, src, sizeof value);
    return value;
}

INLINE __m256 load_halves(const uint8_t *const row[OUTS], size_t at) {
    return _mm256_cvtph_ps(_mm_setr_epi16(load_i16(row[0] + at), load_i16(row[1] + at), load_i16(row[2] + at),
                                          load_i16(row[3] + at), load_i16(row[4] + at), load_i16(row[5] + at),
                                          load_i16(row[6] + at), load_i16(row[7] + at)));
}

INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

/* byte i (0 the lowest) of each lane, as a float */
INLINE __m256 unsigned_byte(__m256i v, int32_t i) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, 8 * i), _mm256_set1_epi32(255)));
}

INLINE __m256 signed_byte(__m256i v, int32_t i) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24));
}

/* ---- the formats; dtype.c draws their bytes ----------------------------------------------------------------- */

/* 16 bytes of nibbles: the low ones are weights 0..15, the high ones 16..31 */
INLINE void fill_nibbles(const uint8_t *const row[OUTS], size_t at, tile *out) {
    __m256i packed[4];
    load_transposed(row, at, packed);
    for (int32_t g = 0; g < 4; g++) {
        out->code[g] = low_nibbles(packed[g]);
        out->code[g + 4] = high_nibbles(packed[g]);
    }
}

/* bit 4g + i of the dword at `at` is worth 16 in weight 4g + i */
INLINE void add_fifth_bits(const uint8_t *const row[OUTS], size_t at, tile *out) {
    __m256i bits = load_dwords(row, at);
    __m256i first_byte = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    for (int32_t g = 0; g < 8; g++) {
        __m256i from = _mm256_add_epi8(first_byte, _mm256_set1_epi8((char)(g / 2)));
        __m256i spread = _mm256_shuffle_epi8(bits, from);
        __m256i mask = _mm256_set1_epi32(g % 2 == 0 ? 0x08040201 : (int32_t)0x80402010u);
        __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
        out->code[g] = _mm256_or_si256(out->code[g], _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
    }
}

/* weight = d * (code - zero) */
INLINE void fill_offset(const uint8_t *const row[OUTS], size_t at, float zero, tile *out) {
    out->scale[0] = load_halves(row, at);
    out->min[0] = _mm256_mul_ps(out->scale[0], _mm256_set1_ps(zero));
}

/* weight = d * code + m */
INLINE void fill_min(const uint8_t *const row[OUTS], size_t at, tile *out) {
    out->scale[0] = load_halves(row, at);
    out->min[0] = _mm256_xor_ps(load_halves(row, at + 2), _mm256_set1_ps(-0.0f));
}

INLINE void fill_Q4_0(const uint8_t *const row[OUTS], size_t at, tile *out) {
    fill_offset(row, at, 8, out);
    fill_nibbles(row, at + 2, out);
}

INLINE void fill_Q4_1(const uint8_t *const row[OUTS], size_t at, tile *out) {
    fill_min(row, at, out);
    fill_nibbles(row, at + 4, out);
}

INLINE void fill_Q5_0(const uint8_t *const row[OUTS], size_t at, tile *out) {
    fill_offset(row, at, 16, out);
    fill_nibbles(row, at + 6, out);
    add_fifth_bits(row, at + 2, out);
}

INLINE void fill_Q5_1(const uint8_t *const row[OUTS], size_t at, tile *out) {
    fill_min(row, at, out);
    fill_nibbles(row, at + 8, out);
    add_fifth_bits(row, at + 4, out);
}

INLINE void fill_Q8_0(const uint8_t *const row[OUTS], size_t at, tile *out) {
    out->scale[0] = load_halves(row, at);
    load_transposed_32(row, at + 2, out->code);
}

/* d, dmin and the 12 bytes of 6-bit scales and minima of Q4_K and Q5_K; each dword below holds four of them */
INLINE void fill_k_scales(const uint8_t *const row[OUTS], size_t at, tile out[8]) {
    __m256i head[4], scales[2], mins[2];
    load_transposed(row, at, head);
    __m256i six_bits = _mm256_set1_epi8(63), top_bits = _mm256_set1_epi8(0x30);
    scales[0] = _mm256_and_si256(head[1], six_bits);
    mins[0] = _mm256_and_si256(head[2], six_bits);
    scales[1] = _mm256_or_si256(low_nibbles(head[3]), _mm256_and_si256(_mm256_srli_epi16(head[1], 2), top_bits));
    mins[1] = _mm256_or_si256(high_nibbles(head[3]), _mm256_and_si256(_mm256_srli_epi16(head[2], 2), top_bits));
    __m256 d = load_halves(row, at), dmin = load_halves(row, at + 2);
    for (int32_t t = 0; t < 8; t++) {
        out[t].scale[0] = _mm256_mul_ps(d, unsigned_byte(scales[t / 4], t % 4));
        out[t].min[0] = _mm256_mul_ps(dmin, unsigned_byte(mins[t / 4], t % 4));
    }
}

/* 32 bytes of nibbles for each two tiles */
INLINE void fill_k_nibbles(const uint8_t *const row[OUTS], size_t at, tile out[8]) {
    for (int32_t t = 0; t < 8; t += 2) {
        __m256i packed[8];
        load_transposed_32(row, at + 16 * (size_t)t, packed);
        for (int32_t g = 0; g < 8; g++) {
            out[t].code[g] = low_nibbles(packed[g]);
            out[t + 1].code[g] = high_nibbles(packed[g]);
        }
    }
}

INLINE void fill_Q4_K(const uint8_t *const row[OUTS], size_t at, tile out[8]) {
    fill_k_scales(row, at, out);
    fill_k_nibbles(row, at + 16, out);
}

INLINE void fill_Q5_K(const uint8_t *const row[OUTS], size_t at, tile out[8]) {
    fill_k_scales(row, at, out);
    fill_k_nibbles(row, at + 48, out);
    __m256i fifth[8];
    load_transposed_32(row, at + 16, fifth);
    for (int32_t g = 0; g < 8; g++) {
        for (int32_t t = 0; t < 8; t++) {
            __m256i bit = t < 4 ? _mm256_slli_epi16(fifth[g], 4 - t) : _mm256_srli_epi16(fifth[g], t - 4);
            out[t].code[g] = _mm256_or_si256(out[t].code[g], _mm256_and_si256(bit, _mm256_set1_epi8(16)));
        }
    }
}

INLINE void fill_Q6_K(const uint8_t *const row[OUTS], size_t at, tile out[8]) {
    for (size_t half = 0; half < 2; half++) {
        __m256i low[2][8], high[8];
        load_transposed_32(row, at + 64 * half, low[0]);
        load_transposed_32(row, at + 64 * half + 32, low[1]);
        load_transposed_32(row, at + 128 + 32 * half, high);
        for (int32_t t = 0; t < 4; t++) {
            for (int32_t g = 0; g < 8; g++) {
                __m256i nibbles = t < 2 ? low_nibbles(low[t][g]) : high_nibbles(low[t - 2][g]);
                __m256i top = t < 3 ? _mm256_slli_epi16(high[g], 4 - 2 * t) : _mm256_srli_epi16(high[g], 2);
                top = _mm256_and_si256(top, _mm256_set1_epi8(0x30));
                out[4 * half + (size_t)t].code[g] = _mm256_or_si256(nibbles, top);
            }
        }
    }
    __m256i scales[4];
    load_transposed(row, at + 192, scales);
    __m256 d = load_halves(row, at + 208);
    for (int32_t s = 0; s < 16; s++) {
        __m256 scale = _mm256_mul_ps(d, signed_byte(scales[s / 4], s % 4));
        out[s / 2].scale[s % 2] = scale;
        out[s / 2].min[s % 2] = _mm256_mul_ps(scale, _mm256_set1_ps(32));
    }
}

/* ---- the product -------------------------------------------------------------------------------------------- */

/* dot[r], lane o = sum of code * activation over n_groups groups of four inputs; x: n rows, their inputs from i0 on */
INLINE void dot_products(format f, const __m256i *code, int32_t n_groups, const kvm_q8_row *x, int32_t n, int32_t i0,
                         __m256i dot[ROWS]) {
    for (int32_t r = 0; r < n; r++) dot[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int32_t g0 = 0; g0 < n_groups; g0 += f.chain) {
        __m256i pairs[ROWS];
        for (int32_t r = 0; r < n; r++) pairs[r] = _mm256_setzero_si256();
#pragma GCC unroll 1 /* unrolled, gcc would make all products before the first sum, and spill */
        for (int32_t g = g0; g < g0 + f.chain; g++) {
            __m256i size = f.is_signed ? _mm256_abs_epi8(code[g]) : code[g];
#pragma GCC unroll 4
            for (int32_t r = 0; r < n; r++) {
                __m256i q = _mm256_set1_epi32(load_i32(x[r].q + i0 + 4 * g));
                if (f.is_signed) q = _mm256_sign_epi8(q, code[g]);
                pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(size, q));
            }
        }
#pragma GCC unroll 4
        for (int32_t r = 0; r < n; r++) {
            dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs[r], _mm256_set1_epi16(1)));
        }
    }
}

/* Adds the products of n_tiles tiles with inputs from 32 * b0 on to eight outputs of n activation rows.
 * acc: [n], lane o = output o. */
INLINE void multiply(format f, const tile *tiles, int32_t n_tiles, const kvm_q8_row *x, int32_t n, int32_t b0,
                     __m256 acc[ROWS]) {
    const int32_t part = TILE / f.n_scales, sums = 2 / f.n_scales;
    for (int32_t b = 0; b < n_tiles; b++) {
        const tile *t = &tiles[b];
        for (int32_t s = 0; s < f.n_scales; s++) {
            __m256i dot[ROWS];
            dot_products(f, t->code + part / 4 * s, part / 4, x, n, TILE * (b0 + b) + part * s, dot);
#pragma GCC unroll 4
            for (int32_t r = 0; r < n; r++) {
                __m256 scale = _mm256_mul_ps(t->scale[s], _mm256_set1_ps(x[r].scale[b0 + b]));
                acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), scale, acc[r]);
                for (int32_t h = sums * s; f.has_min && h < sums * (s + 1); h++) {
                    acc[r] = _mm256_fnmadd_ps(t->min[s], _mm256_set1_ps(x[r].sum[2 * (b0 + b) + h]), acc[r]);
                }
            }
        }
    }
}

/* The same for rows that start at y, with the sums so far taken from y and put back; n_out lanes of it exist. */
INLINE void multiply_rows(format f, const tile *tiles, int32_t n_tiles, const kvm_q8_row *x, int32_t n, int32_t b0,
                          float *y, int32_t ldy, int32_t n_out) {
    __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n_out), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256 acc[ROWS];
    for (int32_t r = 0; r < n; r++) {
        acc[r] = b0 == 0 ? _mm256_setzero_ps() : _mm256_maskload_ps(y + (size_t)r * (size_t)ldy, lanes);
    }
    multiply(f, tiles, n_tiles, x, n, b0, acc);
    for (int32_t r = 0; r < n; r++) {
        if (n_out == OUTS) _mm256_storeu_ps(y + (size_t)r * (size_t)ldy, acc[r]);
        else _mm256_maskstore_ps(y + (size_t)r * (size_t)ldy, lanes, acc[r]);
    }
}

/* y[r][o] for n_out outputs, y pointing at the first one; next: from each row to the one that is read after it */
INLINE void multiply_outputs(format f, const kvm_matrix *w, const uint8_t *const row[OUTS], size_t next,
                             const kvm_q8_row *x, int32_t n_rows, float *y, int32_t ldy, int32_t n_out) {
    const kvm_dtype_info *type = &kvm_dtypes[w->type];
    int32_t n_blocks = w->n_in / type->block_values, tiles_per_block = type->block_values / TILE;
    int32_t chunk_blocks = CHUNK_TILES / tiles_per_block;
    for (int32_t block = 0; block < n_blocks; block += chunk_blocks) {
        tile tiles[CHUNK_TILES];
        int32_t n = kvm_min(chunk_blocks, n_blocks - block);
        size_t at = (size_t)block * (size_t)type->block_bytes, n_bytes = (size_t)n * (size_t)type->block_bytes;
        for (size_t line = 0; line < n_bytes; line += CACHE_LINE) {
            for (int32_t o = 0; o < OUTS; o++) {
                uintptr_t address = (uintptr_t)row[o] + next + at + line; /* may lie behind the last row */
                _mm_prefetch((const char *)address, _MM_HINT_T1);
            }
        }
        for (int32_t b = 0; b < n; b++) {
            f.fill(row, at + (size_t)b * (size_t)type->block_bytes, tiles + b * tiles_per_block);
        }
        int32_t r = 0, b0 = block * tiles_per_block, n_tiles = n * tiles_per_block;
        for (; r + ROWS <= n_rows; r += ROWS) {
            multiply_rows(f, tiles, n_tiles, x + r, ROWS, b0, y + (size_t)r * (size_t)ldy, ldy, n_out);
        }
        for (; r < n_rows; r++) {
            multiply_rows(f, tiles, n_tiles, x + r, 1, b0, y + (size_t)r * (size_t)ldy, ldy, n_out);
        }
    }
}

INLINE void matmul(format f, const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                   float *y, int32_t ldy) {
    size_t row_bytes = kvm_dtype_row_bytes(w->type, w->n_in);
    for (int32_t r = 0; r < n_rows; r += ROW_BLOCK) {
        for (int32_t o = first; o < last; o += OUTS) {
            int32_t n_out = kvm_min(OUTS, last - o);
            const uint8_t *row[OUTS]; /* the last one stands in for those that do not exist */
            for (int32_t i = 0; i < OUTS; i++) {
                row[i] = (const uint8_t *)w->data + (size_t)(o + kvm_min(i, n_out - 1)) * row_bytes;
            }
            multiply_outputs(f, w, row, OUTS * row_bytes, x + r, kvm_min(ROW_BLOCK, n_rows - r),
                             y + (size_t)r * (size_t)ldy + o, ldy, n_out);
        }
    }
}

/*  X(format, chain, scales in 32 weights, has a minimum, codes are signed) */
#define FORMAT_LIST(X)                                                                                                 \
    X(Q4_0, 8, 1, true, false)                                                                                         \
    X(Q4_1, 8, 1, true, false)                                                                                         \
    X(Q5_0, 4, 1, true, false)                                                                                         \
    X(Q5_1, 4, 1, true, false)                                                                                         \
    X(Q8_0, 1, 1, false, true)                                                                                         \
    X(Q4_K, 8, 1, true, false)                                                                                         \
    X(Q5_K, 4, 1, true, false)                                                                                         \
    X(Q6_K, 2, 2, true, false)

#define X(id, chain, n_scales, has_min, is_signed)                                                                     \
    static void matmul_##id(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,     \
                            float *y, int32_t ldy) {                                                                   \
        matmul((format){fill_##id, chain, n_scales, has_min, is_signed}, w, first, last, x, n_rows, y, ldy);           \
    }
FORMAT_LIST(X)
#undef X

void kvm_matmul_avx2_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                        float *y, int32_t ldy) {
    static void (*const matmuls[KVM_DTYPE_COUNT])(const kvm_matrix *, int32_t, int32_t, const kvm_q8_row *, int32_t,
                                                  float *, int32_t) = {
#define X(id, chain, n_scales, has_min, is_signed) [KVM_DTYPE_##id] = matmul_##id,
        FORMAT_LIST(X)
#undef X
    };
    matmuls[w->type](w, first, last, x, n_rows, y, ldy);
}
