/* kernels_avx2.c - the table of kernels.h for AVX2 + FMA + F16C. matmul_avx2.c has the matmul, attend_avx2.c what reads
 * pages.
 *
 * The rule of kernels.h, that an output's bits depend on its own inputs only, is kept by giving every output one lane
 * from beginning to end: blocks and tails differ in which outputs they hold together, never in what is done to one.
 * quantize_q8, load_packed and load_f16 give the scalar table's bits; the rest differs from it by rounding (fused
 * multiply-adds, an exp of its own, another order of the softmax sum).
 */
#include <immintrin.h>

#include "../kvencode.h"
#include "attend_x86.h"
#include "kernels_avx2.h"
#include "matmul_avx2.h"

#define INLINE static inline __attribute__((always_inline))

enum { W = 8 }; /* floats of a vector */

static bool supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* all bits set in the first n lanes */
INLINE __m256i first_lanes(int32_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE __m256 abs_vector(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

/* lanes j and j + 4, then + 2, then + 1 */
INLINE float fold_sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float fold_max(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* ---- gemm_f32 ----------------------------------------------------------------------------------------------- */

enum { GEMM_ROWS = 6, GEMM_VECTORS = 8 }; /* the most rows, and the most vectors, of a block of c */

/* One block of c in registers: `rows` by `vectors` x 8; with `masked`, one vector of which `lanes` exist. */
INLINE void gemm_block(const int32_t rows, const int32_t vectors, const bool masked, __m256i lanes, int32_t k,
                       const float *a, size_t lda, const float *b, size_t ldb, float *c, size_t ldc) {
    __m256 acc[GEMM_ROWS][GEMM_VECTORS];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) {
            const float *src = c + (size_t)i * ldc + W * v;
            acc[i][v] = masked ? _mm256_maskload_ps(src, lanes) : _mm256_loadu_ps(src);
        }
    }
    for (int32_t l = 0; l < k; l++, b += ldb) {
        __m256 column[GEMM_VECTORS];
#pragma GCC unroll 8
        for (int32_t v = 0; v < vectors; v++) {
            column[v] = masked ? _mm256_maskload_ps(b + W * v, lanes) : _mm256_loadu_ps(b + W * v);
        }
#pragma GCC unroll 8
        for (int32_t i = 0; i < rows; i++) {
            __m256 value = _mm256_broadcast_ss(a + (size_t)i * lda + l);
#pragma GCC unroll 8
            for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm256_fmadd_ps(value, column[v], acc[i][v]);
        }
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) {
            float *dst = c + (size_t)i * ldc + W * v;
            if (masked) _mm256_maskstore_ps(dst, lanes, acc[i][v]);
            else _mm256_storeu_ps(dst, acc[i][v]);
        }
    }
}

INLINE void gemm_rows(const int32_t rows, const int32_t vectors, int32_t n, int32_t k, const float *a, size_t lda,
                      const float *b, size_t ldb, float *c, size_t ldc) {
    int32_t j = 0;
    for (; j + W * vectors <= n; j += W * vectors) {
        gemm_block(rows, vectors, false, _mm256_setzero_si256(), k, a, lda, b + j, ldb, c + j, ldc);
    }
    for (; vectors > 4 && j + W * 4 <= n; j += W * 4) {
        gemm_block(rows, 4, false, _mm256_setzero_si256(), k, a, lda, b + j, ldb, c + j, ldc);
    }
    for (; j < n; j += W) gemm_block(rows, 1, true, first_lanes(n - j), k, a, lda, b + j, ldb, c + j, ldc);
}

/* Blocks of eight to twelve vectors hide the latency of the FMAs, and leave registers for a row of b. */
static void gemm_f32(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb,
                     float *c, int32_t ldc) {
    size_t a_step = (size_t)lda, b_step = (size_t)ldb, c_step = (size_t)ldc;
    for (int32_t i = 0, rows; i < m; i += rows) {
        rows = kvm_ceil_div(m - i, kvm_ceil_div(m - i, GEMM_ROWS)); /* 7 rows are 4 + 3 */
        const float *a_i = a + (size_t)i * a_step;
        float *c_i = c + (size_t)i * c_step;
        switch (rows) {
        case 1: gemm_rows(1, 8, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        case 2: gemm_rows(2, 4, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        case 3: gemm_rows(3, 4, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        case 4: gemm_rows(4, 2, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        case 5: gemm_rows(5, 2, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        case 6: gemm_rows(6, 2, n, k, a_i, a_step, b, b_step, c_i, c_step); break;
        }
    }
}

/* ---- quantize_q8 -------------------------------------------------------------------------------------------- */

void kvm_avx2_quantize_q8(const float *x, int32_t n, kvm_q8_row out) {
    for (int32_t b = 0; b < n / KVM_Q8_BLOCK; b++, x += KVM_Q8_BLOCK) {
        __m256 v[4], amax = _mm256_setzero_ps(), not_number = _mm256_setzero_ps();
        for (int32_t i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + W * i);
            amax = _mm256_max_ps(abs_vector(v[i]), amax); /* amax when v is NaN */
            not_number = _mm256_or_ps(not_number, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
        }
        float max = fold_max(amax), inv = max > 0 ? 127.0f / max : 0.0f;
        float scale = _mm256_movemask_ps(not_number) ? NAN : max / 127.0f;
        __m256i q[4];
        for (int32_t i = 0; i < 4; i++) {
            __m256 t = _mm256_mul_ps(v[i], _mm256_set1_ps(inv));
            __m256 fits = _mm256_cmp_ps(abs_vector(t), _mm256_set1_ps(127.5f), _CMP_LT_OQ); /* else 0: NaN, infinity */
            q[i] = _mm256_cvtps_epi32(_mm256_and_ps(t, fits));
        }
        __m256i pairs = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        __m256i bytes = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(void *)(out.q + KVM_Q8_BLOCK * b), bytes);
        __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
        sum = _mm256_hadd_epi32(sum, sum);
        sum = _mm256_hadd_epi32(sum, sum); /* each half of 16 inputs lies in a 128-bit lane */
        out.scale[b] = scale;
        out.sum[b] = scale * (float)(_mm256_extract_epi32(sum, 0) + _mm256_extract_epi32(sum, 4));
        out.sum16[b] = scale * (float)_mm256_extract_epi32(sum, 0);
    }
}

/* ---- load_f16 ------------------------------------------------------------------------------------------------ */

void kvm_avx2_load_f16(const uint16_t *src, int32_t n, float *dst) {
    int32_t i = 0;
    for (; i + W <= n; i += W) {
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(src + i))));
    }
    for (; i < n; i++) dst[i] = _cvtsh_ss(src[i]);
}

/* ---- softmax_step, silu_mul, gelu_mul ------------------------------------------------------------------------ */

typedef __m256 floats;
typedef int32_t ints __attribute__((vector_size(4 * W)));

INLINE floats fused(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }

INLINE floats zero_below(floats v, floats x, float least) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(least), _CMP_LT_OQ), v);
}

INLINE floats load_first(const float *src, int32_t n) {
    return n == W ? _mm256_loadu_ps(src) : _mm256_maskload_ps(src, first_lanes(n));
}

INLINE void store_first(float *dst, floats v, int32_t n) {
    if (n == W) _mm256_storeu_ps(dst, v);
    else _mm256_maskstore_ps(dst, first_lanes(n), v);
}

#include "kernels_exp.h"

const kvm_cpu_kernels kvm_kernels_avx2 = {
    .name = "avx2",
    .supported = supported,
    .gemm_f32 = gemm_f32,
    .quantize_q8 = kvm_avx2_quantize_q8,
    .matmul_q8 = kvm_matmul_avx2_q8,
    .load_weights = kvm_matmul_avx2_load,
    .load_packed = kvm_avx2_load_packed,
    .encode = encode_page,
    .hadamard = hadamard,
    .load_f16 = kvm_avx2_load_f16,
    .gemm_f16 = kvm_avx2_gemm_f16,
    .score_packed = kvm_avx2_score_packed,
    .quantize_weights = kvm_avx2_quantize_weights,
    .mix_packed = kvm_avx2_mix_packed,
    .softmax_step = softmax_step,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
};
