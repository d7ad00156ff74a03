/* attend_avx512.c - the attention kernels of the AVX-512 table (VNNI, VBMI).
 *
 * A packed tile is decoded once, into bytes of the order in which its planes lie (kvtype.h 4): a *quad* is 64 bytes,
 * 16 lanes by 4 reduced indices. vpdpbusd then multiplies a quad with 4 bytes of a query, or of its weights, and adds
 * up over the indices: a lane is an output, nothing is ever summed across lanes. The decoded bytes serve all queries of
 * the KV head.
 *
 * Bytes: each byte of codes and scales once, asked for a page ahead. Work for 64 codes: a load, 1 to 4 instructions to
 * decode, a store; then one vpdpbusd for each query. That is 2 to 3 cycles a position and side with 3 queries of 64
 * channels, where reading 4 bits a channel at a core's share of the memory takes 6.
 */
#include <immintrin.h>

#include "attend_x86.h"

#define INLINE static inline __attribute__((always_inline))

enum { W = 16, QUAD = 64, V_QUADS = KVM_PAGE / 4, N_BLOCKS = KVM_PAGE / KVM_WEIGHT_BLOCK };

INLINE __m512i load_quad(const uint8_t *src) { return _mm512_loadu_si512((const void *)src); }
INLINE __m512 load_halves(const uint16_t *src) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)src));
}
INLINE void prefetch(const void *at, ptrdiff_t ahead) {
    _mm_prefetch((const char *)((uintptr_t)at + (uintptr_t)ahead), _MM_HINT_T0);
}
/* into the second level: a page of f16 is more than the first one holds */
INLINE void prefetch_far(const void *at, ptrdiff_t ahead) {
    _mm_prefetch((const char *)((uintptr_t)at + (uintptr_t)ahead), _MM_HINT_T1);
}
/* four bytes in all lanes */
INLINE __m512i broadcast_4(const void *src) {
    int32_t four;
    memcpy(&four, src, sizeof four);
    return _mm512_set1_epi32(four);
}

/* ---- decoding ------------------------------------------------------------------------------------------------ */

/* added to the levels of keys to make them unsigned */
INLINE int32_t key_bias(kvm_kvtype type) { return type == KVM_KVTYPE_Q8 ? 128 : 64; }

/* The level of each code plus bias, over and over, so that an index may carry any bits above its code (not for q8).
 * Codes half + k and half - 1 - k are plus and minus level k. */
static __m512i level_table(const kvm_kvtype_info *info, int32_t bias) {
    static const uint8_t iota[QUAD] = {
#define EIGHT(i) i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7
        EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56)};
#undef EIGHT
    __m512i code = _mm512_and_si512(load_quad(iota), _mm512_set1_epi8((char)((1 << info->bits) - 1)));
    __m512i t = _mm512_sub_epi8(code, _mm512_set1_epi8((char)(1 << (info->bits - 1))));
    __m512i level = _mm512_add_epi8(_mm512_add_epi8(t, t), _mm512_set1_epi8(1)); /* odd integers */
    if (info->level[0] != 0) {
        __m128i words = _mm_loadu_si128((const __m128i *)(const void *)info->level);
        __m512i positive = _mm512_broadcast_i32x4(_mm_packs_epi16(words, words));
        __m512i minus = _mm512_movm_epi8(_mm512_movepi8_mask(t)); /* x ^ -1 is -1 - x */
        level = _mm512_shuffle_epi8(positive, _mm512_xor_si512(t, minus));
        level = _mm512_sub_epi8(_mm512_xor_si512(level, minus), minus);
    }
    return _mm512_add_epi8(level, _mm512_set1_epi8((char)bias));
}

/* v's bits from `down` on moved to bit 0 of each byte; bits of the neighbour come in at the top */
INLINE __m512i shift_down(__m512i v, const int32_t down) {
    if (down == 0) return v;
    return down > 0 ? _mm512_srli_epi16(v, down) : _mm512_slli_epi16(v, -down);
}

/* One tile's planes -> its quads, as levels; q8: codes ^ table. */
INLINE void decode_tile(const int32_t bits, __m512i table, const uint8_t *tile, int32_t n_quads, uint8_t *quads,
                        ptrdiff_t ahead) {
    const int32_t width = bits == 8 ? 8 : bits >= 4 ? 4 : 2, low_width = bits == 8 ? 0 : bits - width;
    const int32_t fields = 8 / width, low_fields = low_width ? 8 / low_width : 1;
    const uint8_t *low_plane = tile + KVM_LINE * kvm_ceil_div(n_quads, fields);
    const __m512i low_mask = _mm512_set1_epi8((char)((1 << low_width) - 1));
    for (int32_t q = 0; q < n_quads; q += 4, quads += 4 * QUAD, tile += KVM_LINE * 4 / fields) { /* 4 divides n_quads */
        __m512i low = _mm512_setzero_si512();
        if (low_width) {
            const uint8_t *line = low_plane + KVM_LINE * (q / low_fields);
            low = _mm512_srl_epi16(load_quad(line), _mm_cvtsi32_si128(low_width * (q % low_fields)));
            prefetch(line, ahead);
        }
#pragma GCC unroll 4
        for (int32_t j = 0; j < 4; j++) {
            const uint8_t *line = tile + KVM_LINE * (j / fields);
            __m512i code = shift_down(load_quad(line), width * (j % fields) - low_width);
            if (j % fields == 0) prefetch(line, ahead);
            if (low_width) { /* low's bits where low_mask has ones, else the high plane's */
                code = _mm512_ternarylogic_epi32(low_mask, shift_down(low, low_width * j), code, 0xca);
            }
            __m512i level = bits == 8 ? _mm512_xor_si512(code, table) : _mm512_permutexvar_epi8(code, table);
            _mm512_storeu_si512((void *)(quads + QUAD * j), level);
        }
    }
}

/* what decode_tile wants for a type */
static __m512i decode_table(kvm_kvtype type, kvm_side side) {
    if (type == KVM_KVTYPE_Q8) return _mm512_set1_epi8((char)(side == KVM_SIDE_K ? 0 : 128));
    return level_table(&kvm_kvtypes[type], side == KVM_SIDE_K ? key_bias(type) : 0);
}

/* The same for the trellis code (kvtype.h 5). A *pair* of a step is its symbol and the one before it,
 * s[t-1] | s[t] << 2: what the second look-up takes; the first takes the pair of two steps before. The tables stand
 * four times, so that an index may carry any bits above its 4. */
static void decode_trellis(const uint8_t *tile, uint8_t *quads, ptrdiff_t ahead) {
    const __m512i high_symbol = _mm512_set1_epi8(12);
    __m512i a_table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)kvm_trellis_a));
    __m512i b_table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)kvm_trellis_b));
    __m512i before = _mm512_rol_epi32(load_quad(tile + 7 * KVM_LINE), 8), pair[6]; /* of steps -2 .. 3 of a byte */
    pair[4] = _mm512_srli_epi16(before, 2);
    pair[5] = _mm512_srli_epi16(before, 4);
    for (int32_t g = 0; g < V_QUADS / 4; g++, tile += KVM_LINE, quads += 4 * QUAD) {
        __m512i byte = load_quad(tile);
        prefetch(tile, ahead);
        pair[0] = pair[4];
        pair[1] = pair[5];
        pair[2] = _mm512_srli_epi16(before, 6); /* and byte's first symbol where high_symbol has ones */
        pair[2] = _mm512_ternarylogic_epi32(high_symbol, _mm512_slli_epi16(byte, 2), pair[2], 0xca);
        pair[3] = byte;
        pair[4] = _mm512_srli_epi16(byte, 2);
        pair[5] = _mm512_srli_epi16(byte, 4);
        before = byte;
#pragma GCC unroll 4
        for (int32_t j = 0; j < 4; j++) {
            __m512i a = _mm512_permutexvar_epi8(pair[j], a_table);
            __m512i b = _mm512_permutexvar_epi8(_mm512_add_epi8(pair[j + 2], a), b_table);
            _mm512_storeu_si512((void *)(quads + QUAD * j), _mm512_add_epi8(a, b));
        }
    }
}

static void decode(kvm_kvtype type, kvm_side side, __m512i table, const uint8_t *tile, int32_t n_quads, uint8_t *quads,
                   ptrdiff_t ahead) {
    if (kvm_is_trellis(type, side)) {
        decode_trellis(tile, quads, ahead);
        return;
    }
    switch (type) {
    case KVM_KVTYPE_Q8: decode_tile(8, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_Q6: decode_tile(6, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_Q5: decode_tile(5, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_Q4: decode_tile(4, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_Q3: decode_tile(3, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_Q2: decode_tile(2, table, tile, n_quads, quads, ahead); break;
    case KVM_KVTYPE_F16:
    case KVM_KVTYPE_COUNT: break;
    }
}

static int32_t tile_bytes(kvm_kvtype type, int32_t n_quads) {
    int32_t n_lines = 0;
    for (int32_t i = 0; i < kvm_kvtypes[type].n_planes; i++) {
        n_lines += kvm_ceil_div(n_quads * kvm_kvtypes[type].plane_bits[i], 8);
    }
    return KVM_LINE * n_lines;
}

/* ---- the dot products ---------------------------------------------------------------------------------------- */

enum { ROWS = 4, TILES = 4 }; /* the most rows and tiles with their sums in registers */

INLINE int32_t next_rows(int32_t left) { return kvm_ceil_div(left, kvm_ceil_div(left, ROWS)); } /* 7 rows are 4 + 3 */

/* sum[i][t] += n_quads quads of tile t, tiles `tile` bytes apart, times as many fours of bytes of row i, rows `step`
 * apart; unsigned are the levels of K and the bytes of V. Four tiles hide the latency of a single row. */
INLINE void dot_quads(const int32_t rows, const int32_t tiles, const kvm_side side, int32_t n_quads,
                      const uint8_t *quads, int32_t tile, const uint8_t *bytes, int32_t step,
                      __m512i sum[ROWS][TILES]) {
#pragma GCC unroll 4
    for (int32_t j = 0; j < n_quads; j++, quads += QUAD, bytes += 4) {
        __m512i level[TILES];
        for (int32_t t = 0; t < tiles; t++) level[t] = load_quad(quads + t * tile);
#pragma GCC unroll 4
        for (int32_t i = 0; i < rows; i++) {
            __m512i four = broadcast_4(bytes + i * step);
            for (int32_t t = 0; t < tiles; t++) {
                sum[i][t] = side == KVM_SIDE_K ? _mm512_dpbusd_epi32(sum[i][t], level[t], four)
                                               : _mm512_dpbusd_epi32(sum[i][t], four, level[t]);
            }
        }
    }
}

/* calls f(rows, tiles, ...) with a constant number of rows */
#define FOR_ROWS(f, rows, tiles, ...)                                                                                  \
    switch (rows) {                                                                                                    \
    case 1: f(1, tiles, __VA_ARGS__); break;                                                                           \
    case 2: f(2, tiles, __VA_ARGS__); break;                                                                           \
    case 3: f(3, tiles, __VA_ARGS__); break;                                                                           \
    case 4: f(4, tiles, __VA_ARGS__); break;                                                                           \
    }

/* ---- score_packed -------------------------------------------------------------------------------------------- */

/* `rows` queries from row on against `tiles` tiles of 16 positions */
INLINE void score_rows(const int32_t rows, const int32_t tiles, int32_t bias, const uint8_t *quads,
                       const uint16_t *scales, int32_t d, kvm_q8_queries q, int32_t row, const float *start, float *score) {
    int32_t group = kvm_group_of(d), n_groups = d / group;
    const uint8_t *bytes = (const uint8_t *)q.q + (size_t)row * (size_t)d;
    for (int32_t g = 0; g < n_groups; g++) {
        __m512i sum[ROWS][TILES];
        for (int32_t i = 0; i < rows; i++) {
            __m512i start = _mm512_set1_epi32(-bias * q.sum[(row + i) * n_groups + g]);
            for (int32_t t = 0; t < tiles; t++) sum[i][t] = start;
        }
        dot_quads(rows, tiles, KVM_SIDE_K, group / 4, quads + KVM_LANES * group * g, KVM_LANES * d, bytes + group * g,
                  d, sum);
        for (int32_t t = 0; t < tiles; t++) {
            __m512 scale = load_halves(scales + KVM_PAGE * g + W * t);
            for (int32_t i = 0; i < rows; i++) {
                float *out = score + (row + i) * KVM_PAGE + W * t;
                __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(q.scale[(row + i) * n_groups + g]));
                __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][t]), factor);
                __m512 before = g == 0 ? _mm512_set1_ps(start[row + i]) : _mm512_loadu_ps(out);
                _mm512_storeu_ps(out, _mm512_add_ps(before, dot));
            }
        }
    }
}

void kvm_avx512_score_packed(kvm_kvtype type, const uint8_t *codes, const uint16_t *scales, int32_t d, int32_t m,
                             kvm_q8_queries q, const float *start, float *score, ptrdiff_t ahead) {
    uint8_t quads[TILES * KVM_LANES * KVM_HEAD_DIM_MAX];
    __m512i table = decode_table(type, KVM_SIDE_K);
    int32_t tile = tile_bytes(type, d / 4), bias = key_bias(type);
    for (int32_t i = 0; i < KVM_PAGE * (d / kvm_group_of(d)); i += 32) prefetch(scales + i, ahead);
    for (int32_t first = 0; first < KVM_PAGE; first += TILES * KVM_LANES) {
        for (int32_t t = 0; t < TILES; t++, codes += tile) {
            decode(type, KVM_SIDE_K, table, codes, d / 4, quads + t * KVM_LANES * d, ahead);
        }
        for (int32_t i = 0, rows; i < m; i += rows) {
            rows = next_rows(m - i);
            FOR_ROWS(score_rows, rows, TILES, bias, quads, scales + first, d, q, i, start, score + first)
        }
    }
}

/* ---- quantize_weights ---------------------------------------------------------------------------------------- */

/* p: [128] -> w [128], scale [N_BLOCKS] */
INLINE void quantize_row(const float *p, const uint16_t *scales, uint8_t *w, float *scale) {
    for (int32_t b = 0; b < N_BLOCKS; b += 2, p += 4 * W, scales += 4 * W, w += 4 * W) {
        __m512i code[4];
        __m512 x[4];
        for (int32_t i = 0; i < 4; i++) x[i] = _mm512_mul_ps(_mm512_loadu_ps(p + W * i), load_halves(scales + W * i));
        for (int32_t half = 0; half < 2; half++) {
            float max = _mm512_reduce_max_ps(_mm512_max_ps(x[2 * half], x[2 * half + 1]));
            __m512 inv = _mm512_set1_ps(max > 0 ? 255.0f / max : 0.0f);
            scale[b + half] = max / 255.0f;
            for (int32_t i = 2 * half; i < 2 * half + 2; i++) code[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inv));
        }
        __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512((void *)w, _mm512_permutexvar_epi32(order, bytes));
    }
}

void kvm_avx512_quantize_weights(const float *p, const uint16_t *scales, int32_t n_groups, int32_t m,
                                 kvm_u8_weights out) {
    for (int32_t i = 0; i < m * n_groups; i++) {
        quantize_row(p + i / n_groups * KVM_PAGE, scales + i % n_groups * KVM_PAGE, out.w + i * KVM_PAGE,
                     out.scale + i * N_BLOCKS);
    }
}

/* ---- mix_packed ---------------------------------------------------------------------------------------------- */

/* `rows` rows of `tiles` tiles of 16 channels; w, scale: of their group in the first row */
INLINE void mix_rows(const int32_t rows, const int32_t tiles, const uint8_t *quads, const uint8_t *w,
                     const float *scale, int32_t n_groups, float *acc, int32_t d) {
    for (int32_t b = 0; b < N_BLOCKS; b++, quads += KVM_LANES * KVM_WEIGHT_BLOCK, w += KVM_WEIGHT_BLOCK) {
        __m512i sum[ROWS][TILES];
        for (int32_t i = 0; i < rows; i++) {
            for (int32_t t = 0; t < tiles; t++) sum[i][t] = _mm512_setzero_si512();
        }
        dot_quads(rows, tiles, KVM_SIDE_V, KVM_WEIGHT_BLOCK / 4, quads, V_QUADS * QUAD, w, n_groups * KVM_PAGE, sum);
        for (int32_t i = 0; i < rows; i++) {
            __m512 factor = _mm512_set1_ps(scale[i * n_groups * N_BLOCKS + b]);
            for (int32_t t = 0; t < tiles; t++) {
                float *out = acc + i * d + W * t;
                _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][t]), factor, _mm512_loadu_ps(out)));
            }
        }
    }
}

void kvm_avx512_mix_packed(kvm_kvtype type, const uint8_t *codes, int32_t d, int32_t m, kvm_u8_weights w, float *acc,
                           ptrdiff_t ahead) {
    uint8_t quads[TILES * V_QUADS * QUAD];
    __m512i table = decode_table(type, KVM_SIDE_V);
    int32_t tile = tile_bytes(type, V_QUADS), n_groups = d / kvm_group_of(d);
    for (int32_t c = 0, tiles; c < d; c += tiles * KVM_LANES) {
        tiles = d - c >= TILES * KVM_LANES ? TILES : 1;
        for (int32_t t = 0; t < tiles; t++, codes += tile) {
            decode(type, KVM_SIDE_V, table, codes, V_QUADS, quads + t * V_QUADS * QUAD, ahead);
        }
        for (int32_t i = 0, rows; i < m; i += rows) {
            int32_t at = i * n_groups + c / kvm_group_of(d);
            const uint8_t *bytes = w.w + at * KVM_PAGE;
            const float *scale = w.scale + at * N_BLOCKS;
            rows = next_rows(m - i);
            if (tiles == 1) FOR_ROWS(mix_rows, rows, 1, quads, bytes, scale, n_groups, acc + i * d + c, d)
            else FOR_ROWS(mix_rows, rows, TILES, quads, bytes, scale, n_groups, acc + i * d + c, d)
        }
    }
}

/* ---- gemm_f16 ------------------------------------------------------------------------------------------------ */

/* One block of c in registers: `rows` by `vectors` x 16. */
INLINE void gemm_block(const int32_t rows, const int32_t vectors, int32_t k, const float *a, size_t lda,
                       const uint16_t *b, size_t ldb, float *c, size_t ldc, ptrdiff_t ahead) {
    __m512 acc[6][8];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm512_loadu_ps(c + (size_t)i * ldc + W * v);
    }
    for (int32_t l = 0; l < k; l++, b += ldb) {
        __m512 column[8];
#pragma GCC unroll 8
        for (int32_t v = 0; v < vectors; v++) {
            column[v] = load_halves(b + W * v);
            if (v % 2 == 0) prefetch_far(b + W * v, ahead);
        }
#pragma GCC unroll 6
        for (int32_t i = 0; i < rows; i++) {
            __m512 value = _mm512_set1_ps(a[(size_t)i * lda + (size_t)l]);
#pragma GCC unroll 8
            for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm512_fmadd_ps(value, column[v], acc[i][v]);
        }
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) _mm512_storeu_ps(c + (size_t)i * ldc + W * v, acc[i][v]);
    }
}

INLINE void gemm_rows(const int32_t rows, const int32_t vectors, int32_t n, int32_t k, const float *a, size_t lda,
                      const uint16_t *b, size_t ldb, float *c, size_t ldc, ptrdiff_t ahead) {
    int32_t j = 0;
    for (; j + W * vectors <= n; j += W * vectors) gemm_block(rows, vectors, k, a, lda, b + j, ldb, c + j, ldc, ahead);
    for (; vectors > 4 && j + 4 * W <= n; j += 4 * W) gemm_block(rows, 4, k, a, lda, b + j, ldb, c + j, ldc, ahead);
    for (; j < n; j += W) gemm_block(rows, 1, k, a, lda, b + j, ldb, c + j, ldc, ahead);
}

void kvm_avx512_gemm_f16(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const uint16_t *b, int32_t ldb,
                         float *c, int32_t ldc, ptrdiff_t ahead) {
    size_t a_step = (size_t)lda, b_step = (size_t)ldb, c_step = (size_t)ldc;
    for (int32_t i = 0, rows; i < m; i += rows, ahead = 0) {
        rows = kvm_ceil_div(m - i, kvm_ceil_div(m - i, 6));
        const float *a_i = a + (size_t)i * a_step;
        float *c_i = c + (size_t)i * c_step;
        switch (rows) {
#define ROWS(rows, vectors)                                                                                            \
    case rows: gemm_rows(rows, vectors, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break
            ROWS(1, 8);
            ROWS(2, 8);
            ROWS(3, 8);
            ROWS(4, 4);
            ROWS(5, 4);
            ROWS(6, 4);
#undef ROWS
        }
    }
}
