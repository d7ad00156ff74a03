/* attend_avx2.c - the attention kernels of the AVX2 table, and load_packed, which decodes like them.
 *
 * A packed tile is decoded once, into bytes of the order in which its planes lie (kvtype.h 4): a *quad* is 64 bytes,
 * 16 lanes by 4 reduced indices. vpmaddubsw and vpmaddwd then multiply half a quad with 4 bytes of a query, or of its
 * weights, and add up over the indices: a lane is an output, nothing is ever summed across lanes. The decoded bytes
 * serve all queries of the KV head.
 *
 * vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits. Nothing saturates: keys are 127 * 127 * 2
 * (levels to 63, made unsigned by adding 64), values 255 * 63 * 2. At 8 bits a product alone fills the 16 bits, so
 * even and odd bytes go apart: twice the work, for twice the bytes.
 *
 * Bytes: each byte of codes and scales once, asked for a page ahead. Work for 32 codes: 3 to 7 instructions to decode,
 * then 3 a query (7 at 8 bits). With 3 queries of 64 channels that is 7 to 10 cycles a position and side: f16 and 8
 * bits are bound by reading, fewer bits by arithmetic, which falls with them only slowly.
 */
#include <immintrin.h>

#include "attend_x86.h"
#include "kernels_avx2.h"

#define INLINE static inline __attribute__((always_inline))

enum { W = 8, QUAD = 64, HALF = 32, V_QUADS = KVM_PAGE / 4, N_BLOCKS = KVM_PAGE / KVM_WEIGHT_BLOCK, ROWS = 4 };

INLINE __m128i load_16(const void *src) { return _mm_loadu_si128((const __m128i *)src); }
INLINE __m256i load_half(const uint8_t *src) { return _mm256_loadu_si256((const __m256i *)(const void *)src); }
INLINE void store_half(uint8_t *dst, __m256i v) { _mm256_storeu_si256((__m256i *)(void *)dst, v); }
INLINE __m256i bytes_of(int32_t value) { return _mm256_set1_epi8((char)value); }
INLINE __m256 load_halves(const uint16_t *src) { return _mm256_cvtph_ps(load_16(src)); }
INLINE void prefetch(const void *at, ptrdiff_t ahead) {
    _mm_prefetch((const char *)((uintptr_t)at + (uintptr_t)ahead), _MM_HINT_T0);
}
/* into the second level: a page of f16 is more than the first one holds */
INLINE void prefetch_far(const void *at, ptrdiff_t ahead) {
    _mm_prefetch((const char *)((uintptr_t)at + (uintptr_t)ahead), _MM_HINT_T1);
}
/* four bytes in all lanes */
INLINE __m256i broadcast_4(const void *src) {
    int32_t four;
    memcpy(&four, src, sizeof four);
    return _mm256_set1_epi32(four);
}

/* ---- decoding ------------------------------------------------------------------------------------------------ */

/* added to the levels of keys to make them unsigned */
INLINE int32_t key_bias(bool q8) { return q8 ? 128 : 64; }

/* The level of each code of up to 4 bits, plus bias, over and over. Codes half + k and half - 1 - k are plus and minus
 * level k. */
static __m256i level_table(const kvm_kvtype_info *info, int32_t bias) {
    const __m128i iota = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i words = load_16(info->level);
    __m128i code = _mm_and_si128(iota, _mm_set1_epi8((char)((1 << info->bits) - 1)));
    __m128i t = _mm_sub_epi8(code, _mm_set1_epi8((char)(1 << (info->bits - 1))));
    __m128i minus = _mm_cmpgt_epi8(_mm_setzero_si128(), t); /* x ^ -1 is -1 - x */
    __m128i level = _mm_shuffle_epi8(_mm_packs_epi16(words, words), _mm_xor_si128(t, minus));
    level = _mm_sub_epi8(_mm_xor_si128(level, minus), minus);
    return _mm256_broadcastsi128_si256(_mm_add_epi8(level, _mm_set1_epi8((char)bias)));
}

/* what decode_tile turns codes into levels with: a table, or for 5 and 6 bits the level of code 0 (levels are 2 apart),
 * or for 8 bits what to flip */
static __m256i decode_table(kvm_kvtype type, kvm_side side) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int32_t bias = side == KVM_SIDE_K ? key_bias(type == KVM_KVTYPE_Q8) : 0;
    if (type == KVM_KVTYPE_Q8) return bytes_of(side == KVM_SIDE_K ? 0 : 128);
    return info->level[0] == 0 ? bytes_of(bias + 1 - (1 << info->bits)) : level_table(info, bias);
}

/* v's bits from `down` on moved to bit 0 of each byte; bits of the neighbour come in at the top */
INLINE __m256i shift_down(__m256i v, const int32_t down) {
    return down >= 0 ? _mm256_srli_epi16(v, down) : _mm256_slli_epi16(v, -down);
}

/* one tile's planes -> its quads, as levels */
INLINE void decode_tile(const int32_t bits, __m256i table, const uint8_t *tile, int32_t n_quads, uint8_t *quads,
                        ptrdiff_t ahead) {
    const int32_t width = bits == 8 ? 8 : bits >= 4 ? 4 : 2, low_width = bits == 8 ? 0 : bits - width;
    const int32_t fields = 8 / width, low_fields = low_width ? 8 / low_width : 1, low_mask = (1 << low_width) - 1;
    const uint8_t *low_plane = tile + KVM_LINE * kvm_ceil_div(n_quads, fields);
    for (int32_t q = 0; q < n_quads; q += 4, quads += 4 * QUAD, tile += KVM_LINE * 4 / fields) { /* 4 divides n_quads */
        for (int32_t half = 0; half < QUAD; half += HALF) {
            __m256i low = _mm256_setzero_si256();
            if (low_width) {
                const uint8_t *line = low_plane + KVM_LINE * (q / low_fields) + half;
                low = _mm256_srl_epi16(load_half(line), _mm_cvtsi32_si128(low_width * (q % low_fields)));
                if (half == 0) prefetch(line, ahead);
            }
#pragma GCC unroll 4
            for (int32_t j = 0; j < 4; j++) {
                const uint8_t *line = tile + KVM_LINE * (j / fields) + half;
                __m256i code = shift_down(load_half(line), width * (j % fields) - low_width);
                if (half == 0 && j % fields == 0) prefetch(line, ahead);
                /* a shuffle looks at 4 bits and at the top one */
                if (bits != 8) code = _mm256_and_si256(code, bytes_of((kvm_max(1 << bits, 16) - 1) & ~low_mask));
                if (low_width) {
                    __m256i rest = _mm256_and_si256(shift_down(low, low_width * j), bytes_of(low_mask));
                    code = _mm256_or_si256(code, rest);
                }
                __m256i level = bits == 8   ? _mm256_xor_si256(code, table)
                                : bits >= 5 ? _mm256_add_epi8(_mm256_add_epi8(code, code), table)
                                            : _mm256_shuffle_epi8(table, code);
                store_half(quads + QUAD * j + half, level);
            }
        }
    }
}

/* The same for the trellis code (kvtype.h 5). A *pair* of a step is its symbol and the one before it,
 * s[t-1] | s[t] << 2: what the second look-up takes; the first takes the pair of two steps before. */
static void decode_trellis(const uint8_t *tile, uint8_t *quads, ptrdiff_t ahead) {
    const __m256i low = bytes_of(15);
    /* a shuffle wants the top bit of an index 0, and looks at the low 4: so a is 64 too large until b is added */
    __m256i a_table = _mm256_add_epi8(_mm256_broadcastsi128_si256(load_16(kvm_trellis_a)), bytes_of(64));
    __m256i b_table = _mm256_sub_epi8(_mm256_broadcastsi128_si256(load_16(kvm_trellis_b)), bytes_of(64));
    for (int32_t half = 0; half < QUAD; half += HALF, quads += HALF) {
        __m256i last = load_half(tile + 7 * KVM_LINE + half), pair[6]; /* of steps -2 .. 3 of a byte */
        __m256i before = _mm256_or_si256(_mm256_slli_epi32(last, 8), _mm256_srli_epi32(last, 24)); /* byte i - 1 to i */
        pair[4] = _mm256_and_si256(_mm256_srli_epi16(before, 2), low);
        pair[5] = _mm256_and_si256(_mm256_srli_epi16(before, 4), low);
        for (int32_t g = 0; g < V_QUADS / 4; g++) {
            __m256i byte = load_half(tile + KVM_LINE * g + half);
            if (half == 0) prefetch(tile + KVM_LINE * g, ahead);
            pair[0] = pair[4];
            pair[1] = pair[5];
            pair[2] = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(byte, 2), bytes_of(12)),
                                      _mm256_and_si256(_mm256_srli_epi16(before, 6), bytes_of(3)));
            pair[3] = _mm256_and_si256(byte, low);
            pair[4] = _mm256_and_si256(_mm256_srli_epi16(byte, 2), low);
            pair[5] = _mm256_and_si256(_mm256_srli_epi16(byte, 4), low);
            before = byte;
#pragma GCC unroll 4
            for (int32_t j = 0; j < 4; j++) {
                __m256i a = _mm256_shuffle_epi8(a_table, pair[j]);
                __m256i b = _mm256_shuffle_epi8(b_table, _mm256_add_epi8(pair[j + 2], a));
                store_half(quads + QUAD * (4 * g + j), _mm256_add_epi8(a, b));
            }
        }
    }
}

static void decode(kvm_kvtype type, kvm_side side, __m256i table, const uint8_t *tile, int32_t n_quads, uint8_t *quads,
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

/* ---- load_packed --------------------------------------------------------------------------------------------- */

/* Byte i of all dwords of half a quad is 8 neighbours in a row of the result. Rows are reduced indices: K's are
 * channels, V's positions. A K lane is a position and has its own scale; a V row has one scale for all its lanes. */
INLINE void load_side(const kvm_side side, kvm_kvtype type, const uint8_t *page, int32_t d, const float *scales,
                      float *out) {
    const int32_t n_rows = side == KVM_SIDE_K ? d : KVM_PAGE, row_floats = side == KVM_SIDE_K ? KVM_PAGE : d;
    int32_t group = kvm_group_of(d), tile = tile_bytes(type, n_rows / 4);
    uint8_t quads[KVM_LANES * KVM_HEAD_DIM_MAX];
    __m256i table = decode_table(type, KVM_SIDE_V); /* without what is added to keys */
    for (int32_t lane = 0; lane < row_floats; lane += KVM_LANES, page += tile) {
        decode(type, side, table, page, n_rows / 4, quads, 0);
        for (int32_t row = 0; row < n_rows; row += 4) {
            const float *scale = scales + KVM_PAGE * (side == KVM_SIDE_K ? row / group : lane / group);
            for (int32_t half = 0; half < 2; half++) {
                __m256i levels = load_half(quads + KVM_LANES * row + HALF * half);
                int32_t at = lane + W * half;
#pragma GCC unroll 4
                for (int32_t i = 0; i < 4; i++) {
                    __m256i level = _mm256_srai_epi32(_mm256_slli_epi32(levels, 24 - 8 * i), 24);
                    __m256 factor =
                        side == KVM_SIDE_K ? _mm256_loadu_ps(scale + at) : _mm256_broadcast_ss(scale + row + i);
                    float *to = out + (row + i) * row_floats + at;
                    _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(level), factor));
                }
            }
        }
    }
}

void kvm_avx2_load_packed(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out) {
    const uint16_t *halves = (const uint16_t *)(const void *)page;
    if (type == KVM_KVTYPE_F16) {
        kvm_avx2_load_f16(halves, KVM_PAGE * d, out);
        return;
    }
    float scales[KVM_HEAD_DIM_MAX / KVM_GROUP * KVM_PAGE]; /* [groups][128] */
    int32_t scales_at = kvm_page_layout_of(type, side, d, false).scales / 2;
    kvm_avx2_load_f16(halves + scales_at, d / kvm_group_of(d) * KVM_PAGE, scales);
    if (side == KVM_SIDE_K) load_side(KVM_SIDE_K, type, page, d, scales, out);
    else load_side(KVM_SIDE_V, type, page, d, scales, out);
}

/* ---- the dot products ---------------------------------------------------------------------------------------- */

/* sum + a . b over the four bytes of each lane; a unsigned, b signed */
INLINE __m256i dot_4(const bool apart, __m256i sum, __m256i a, __m256i b) {
    const __m256i one = _mm256_set1_epi16(1), even = _mm256_set1_epi16(0xff);
    if (!apart) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one));
    __m256i products = _mm256_maddubs_epi16(_mm256_and_si256(a, even), b);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, one));
    products = _mm256_maddubs_epi16(_mm256_andnot_si256(even, a), b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, one));
}

/* sum[i] += n_quads quads of levels times as many fours of bytes of row i, `step` apart */
INLINE void dot_quads(const int32_t rows, const kvm_side side, const bool apart, int32_t n_quads, const uint8_t *quads,
                      const uint8_t *bytes, int32_t step, __m256i sum[ROWS][2]) {
#pragma GCC unroll 2
    for (int32_t j = 0; j < n_quads; j++, quads += QUAD, bytes += 4) {
        __m256i level[2] = {load_half(quads), load_half(quads + HALF)};
#pragma GCC unroll 4
        for (int32_t i = 0; i < rows; i++) {
            __m256i four = broadcast_4(bytes + i * step);
            for (int32_t h = 0; h < 2; h++) {
                sum[i][h] = side == KVM_SIDE_K ? dot_4(apart, sum[i][h], level[h], four)
                                               : dot_4(apart, sum[i][h], four, level[h]);
            }
        }
    }
}

/* calls f(rows, apart, ...) with constants, for at most ROWS of the m - i rows left: 7 rows are 4 + 3 */
#define FOR_ROWS(f, type, n, ...)                                                                                      \
    switch (2 * (n) + (type == KVM_KVTYPE_Q8)) {                                                                       \
    case 2: f(1, false, __VA_ARGS__); break;                                                                           \
    case 3: f(1, true, __VA_ARGS__); break;                                                                            \
    case 4: f(2, false, __VA_ARGS__); break;                                                                           \
    case 5: f(2, true, __VA_ARGS__); break;                                                                            \
    case 6: f(3, false, __VA_ARGS__); break;                                                                           \
    case 7: f(3, true, __VA_ARGS__); break;                                                                            \
    case 8: f(4, false, __VA_ARGS__); break;                                                                           \
    case 9: f(4, true, __VA_ARGS__); break;                                                                            \
    }

INLINE int32_t next_rows(int32_t left) { return kvm_ceil_div(left, kvm_ceil_div(left, ROWS)); }

/* ---- score_packed -------------------------------------------------------------------------------------------- */

/* `rows` queries from row on against a tile of 16 positions */
INLINE void score_rows(const int32_t rows, const bool apart, const uint8_t *quads, const uint16_t *scales, int32_t d,
                       kvm_q8_queries q, int32_t row, const float *start, float *score) {
    int32_t group = kvm_group_of(d), n_groups = d / group, bias = key_bias(apart);
    const uint8_t *bytes = (const uint8_t *)q.q + (size_t)row * (size_t)d;
    for (int32_t g = 0; g < n_groups; g++) {
        __m256i sum[ROWS][2];
        for (int32_t i = 0; i < rows; i++) {
            sum[i][0] = sum[i][1] = _mm256_set1_epi32(-bias * q.sum[(row + i) * n_groups + g]);
        }
        dot_quads(rows, KVM_SIDE_K, apart, group / 4, quads + KVM_LANES * group * g, bytes + group * g, d, sum);
        for (int32_t i = 0; i < rows; i++) {
            __m256 scale = _mm256_set1_ps(q.scale[(row + i) * n_groups + g]);
            for (int32_t h = 0; h < 2; h++) {
                float *out = score + (row + i) * KVM_PAGE + W * h;
                __m256 factor = _mm256_mul_ps(load_halves(scales + KVM_PAGE * g + W * h), scale);
                __m256 dot = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][h]), factor);
                __m256 before = g == 0 ? _mm256_set1_ps(start[row + i]) : _mm256_loadu_ps(out);
                _mm256_storeu_ps(out, _mm256_add_ps(before, dot));
            }
        }
    }
}

void kvm_avx2_score_packed(kvm_kvtype type, const uint8_t *codes, const uint16_t *scales, int32_t d, int32_t m,
                           kvm_q8_queries q, const float *start, float *score, ptrdiff_t ahead) {
    uint8_t quads[KVM_LANES * KVM_HEAD_DIM_MAX];
    __m256i table = decode_table(type, KVM_SIDE_K);
    int32_t tile = tile_bytes(type, d / 4);
    for (int32_t i = 0; i < KVM_PAGE * (d / kvm_group_of(d)); i += 32) prefetch(scales + i, ahead);
    for (int32_t first = 0; first < KVM_PAGE; first += KVM_LANES, codes += tile) {
        decode(type, KVM_SIDE_K, table, codes, d / 4, quads, ahead);
        for (int32_t i = 0, rows; i < m; i += rows) {
            rows = next_rows(m - i);
            FOR_ROWS(score_rows, type, rows, quads, scales + first, d, q, i, start, score + first)
        }
    }
}

/* ---- quantize_weights ---------------------------------------------------------------------------------------- */

INLINE float largest(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* p, scales, w: a block of 32 */
INLINE float quantize_block(const float *p, const uint16_t *scales, uint8_t *w) {
    __m256i code[4];
    __m256 x[4];
    for (int32_t i = 0; i < 4; i++) x[i] = _mm256_mul_ps(_mm256_loadu_ps(p + W * i), load_halves(scales + W * i));
    float max = largest(_mm256_max_ps(_mm256_max_ps(x[0], x[1]), _mm256_max_ps(x[2], x[3])));
    __m256 inv = _mm256_set1_ps(max > 0 ? 255.0f / max : 0.0f);
    for (int32_t i = 0; i < 4; i++) code[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inv));
    __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3]));
    store_half(w, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    return max / 255.0f;
}

void kvm_avx2_quantize_weights(const float *p, const uint16_t *scales, int32_t n_groups, int32_t m,
                               kvm_u8_weights out) {
    for (int32_t at = 0; at < m * n_groups * KVM_PAGE; at += KVM_WEIGHT_BLOCK) {
        int32_t row = at / KVM_PAGE / n_groups, in_scales = at % (n_groups * KVM_PAGE);
        out.scale[at / KVM_WEIGHT_BLOCK] =
            quantize_block(p + row * KVM_PAGE + at % KVM_PAGE, scales + in_scales, out.w + at);
    }
}

/* ---- mix_packed ---------------------------------------------------------------------------------------------- */

/* 16 channels of `rows` rows; w, scale: of their group in the first row */
INLINE void mix_rows(const int32_t rows, const bool apart, const uint8_t *quads, const uint8_t *w, const float *scale,
                     int32_t n_groups, float *acc, int32_t d) {
    for (int32_t b = 0; b < N_BLOCKS; b++, quads += KVM_LANES * KVM_WEIGHT_BLOCK, w += KVM_WEIGHT_BLOCK) {
        __m256i sum[ROWS][2];
        for (int32_t i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        dot_quads(rows, KVM_SIDE_V, apart, KVM_WEIGHT_BLOCK / 4, quads, w, n_groups * KVM_PAGE, sum);
        for (int32_t i = 0; i < rows; i++) {
            __m256 factor = _mm256_set1_ps(scale[i * n_groups * N_BLOCKS + b]);
            for (int32_t h = 0; h < 2; h++) {
                float *out = acc + i * d + W * h;
                _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][h]), factor, _mm256_loadu_ps(out)));
            }
        }
    }
}

void kvm_avx2_mix_packed(kvm_kvtype type, const uint8_t *codes, int32_t d, int32_t m, kvm_u8_weights w, float *acc,
                         ptrdiff_t ahead) {
    uint8_t quads[V_QUADS * QUAD];
    __m256i table = decode_table(type, KVM_SIDE_V);
    int32_t tile = tile_bytes(type, V_QUADS), n_groups = d / kvm_group_of(d);
    for (int32_t c = 0; c < d; c += KVM_LANES, codes += tile) {
        decode(type, KVM_SIDE_V, table, codes, V_QUADS, quads, ahead);
        for (int32_t i = 0, rows; i < m; i += rows) {
            int32_t at = i * n_groups + c / kvm_group_of(d);
            rows = next_rows(m - i);
            FOR_ROWS(mix_rows, type, rows, quads, w.w + at * KVM_PAGE, w.scale + at * N_BLOCKS, n_groups,
                     acc + i * d + c, d)
        }
    }
}

/* ---- gemm_f16 ------------------------------------------------------------------------------------------------ */

enum { GEMM_ROWS = 6, GEMM_VECTORS = 8 };

/* One block of c in registers: `rows` by `vectors` x 8. */
INLINE void gemm_block(const int32_t rows, const int32_t vectors, int32_t k, const float *a, size_t lda,
                       const uint16_t *b, size_t ldb, float *c, size_t ldc, ptrdiff_t ahead) {
    __m256 acc[GEMM_ROWS][GEMM_VECTORS];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm256_loadu_ps(c + (size_t)i * ldc + W * v);
    }
    for (int32_t l = 0; l < k; l++, b += ldb) {
        __m256 column[GEMM_VECTORS];
#pragma GCC unroll 8
        for (int32_t v = 0; v < vectors; v++) {
            column[v] = load_halves(b + W * v);
            if (v % 4 == 0) prefetch_far(b + W * v, ahead);
        }
#pragma GCC unroll 8
        for (int32_t i = 0; i < rows; i++) {
            __m256 value = _mm256_broadcast_ss(a + (size_t)i * lda + l);
#pragma GCC unroll 8
            for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm256_fmadd_ps(value, column[v], acc[i][v]);
        }
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) _mm256_storeu_ps(c + (size_t)i * ldc + W * v, acc[i][v]);
    }
}

INLINE void gemm_rows(const int32_t rows, const int32_t vectors, int32_t n, int32_t k, const float *a, size_t lda,
                      const uint16_t *b, size_t ldb, float *c, size_t ldc, ptrdiff_t ahead) {
    int32_t j = 0;
    for (; j + W * vectors <= n; j += W * vectors) gemm_block(rows, vectors, k, a, lda, b + j, ldb, c + j, ldc, ahead);
    for (; j < n; j += W) gemm_block(rows, 1, k, a, lda, b + j, ldb, c + j, ldc, ahead);
}

void kvm_avx2_gemm_f16(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const uint16_t *b, int32_t ldb,
                       float *c, int32_t ldc, ptrdiff_t ahead) {
    size_t a_step = (size_t)lda, b_step = (size_t)ldb, c_step = (size_t)ldc;
    for (int32_t i = 0, rows; i < m; i += rows, ahead = 0) {
        rows = kvm_ceil_div(m - i, kvm_ceil_div(m - i, GEMM_ROWS)); /* 7 rows are 4 + 3 */
        const float *a_i = a + (size_t)i * a_step;
        float *c_i = c + (size_t)i * c_step;
        switch (rows) {
        case 1: gemm_rows(1, 8, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        case 2: gemm_rows(2, 4, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        case 3: gemm_rows(3, 4, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        case 4: gemm_rows(4, 2, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        case 5: gemm_rows(5, 2, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        case 6: gemm_rows(6, 2, n, k, a_i, a_step, b, b_step, c_i, c_step, ahead); break;
        }
    }
}
