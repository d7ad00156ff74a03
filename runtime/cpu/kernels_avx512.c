/* kernels_avx512.c - the table of kernels.h for AVX-512 (F BW DQ VL VNNI VBMI); matmul_avx512.c has the matmul. Entries
 * that 512 bits do not make faster are the AVX2 table's. */
#include <immintrin.h>

#include "../kvencode.h"
#include "attend_x86.h"
#include "kernels_avx2.h"
#include "matmul_avx512.h"

#define INLINE static inline __attribute__((always_inline))

enum { W = 16 }; /* floats of a vector */

/* __builtin_cpu_supports also asks whether the system saves the registers */
static bool supported(void) {
    return kvm_kernels_avx2.supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

INLINE __mmask16 first_lanes(int32_t n) { return (__mmask16)((1u << kvm_min(n, W)) - 1u); }

/* ---- gemm_f32 ----------------------------------------------------------------------------------------------- */

enum { GEMM_ROWS = 12, GEMM_VECTORS = 8 }; /* the most rows, and the most vectors, of a block of c */

/* One block of c in registers: `rows` by `vectors` x 16; of the last vector, `lanes` exist. */
INLINE void gemm_block(const int32_t rows, const int32_t vectors, __mmask16 lanes, int32_t k, const float *a,
                       size_t lda, const float *b, size_t ldb, float *c, size_t ldc) {
    __m512 acc[GEMM_ROWS][GEMM_VECTORS];
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) {
            const float *src = c + (size_t)i * ldc + W * v;
            acc[i][v] = v + 1 < vectors ? _mm512_loadu_ps(src) : _mm512_maskz_loadu_ps(lanes, src);
        }
    }
    for (int32_t l = 0; l < k; l++, b += ldb) {
        __m512 column[GEMM_VECTORS];
#pragma GCC unroll 8
        for (int32_t v = 0; v < vectors; v++) {
            column[v] = v + 1 < vectors ? _mm512_loadu_ps(b + W * v) : _mm512_maskz_loadu_ps(lanes, b + W * v);
        }
#pragma GCC unroll 12
        for (int32_t i = 0; i < rows; i++) {
            __m512 value = _mm512_set1_ps(a[(size_t)i * lda + (size_t)l]);
#pragma GCC unroll 8
            for (int32_t v = 0; v < vectors; v++) acc[i][v] = _mm512_fmadd_ps(value, column[v], acc[i][v]);
        }
    }
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t v = 0; v < vectors; v++) {
            float *dst = c + (size_t)i * ldc + W * v;
            if (v + 1 < vectors) _mm512_storeu_ps(dst, acc[i][v]);
            else _mm512_mask_storeu_ps(dst, lanes, acc[i][v]);
        }
    }
}

INLINE void gemm_rows(const int32_t rows, const int32_t vectors, int32_t n, int32_t k, const float *a, size_t lda,
                      const float *b, size_t ldb, float *c, size_t ldc) {
    const __mmask16 all = 0xffff;
    int32_t j = 0;
    for (; j + W * vectors <= n; j += W * vectors) {
        gemm_block(rows, vectors, all, k, a, lda, b + j, ldb, c + j, ldc);
    }
    for (; vectors > 4 && j + 4 * W <= n; j += 4 * W) {
        gemm_block(rows, 4, all, k, a, lda, b + j, ldb, c + j, ldc);
    }
    for (; j + W < n; j += 2 * W) gemm_block(rows, 2, first_lanes(n - j - W), k, a, lda, b + j, ldb, c + j, ldc);
    if (j < n) gemm_block(rows, 1, first_lanes(n - j), k, a, lda, b + j, ldb, c + j, ldc);
}

/* Blocks of up to 24 vectors hide the latency of the FMAs, and leave registers for a row of b. */
static void gemm_f32(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb,
                     float *c, int32_t ldc) {
    size_t a_step = (size_t)lda, b_step = (size_t)ldb, c_step = (size_t)ldc;
    int32_t most = n < 4 * W ? GEMM_ROWS : GEMM_ROWS / 2;
    for (int32_t i = 0, rows; i < m; i += rows) {
        rows = kvm_ceil_div(m - i, kvm_ceil_div(m - i, most)); /* 13 rows are 7 + 6 */
        const float *a_i = a + (size_t)i * a_step;
        float *c_i = c + (size_t)i * c_step;
        switch (rows) {
#define ROWS(rows, vectors)                                                                                            \
    case rows: gemm_rows(rows, vectors, n, k, a_i, a_step, b, b_step, c_i, c_step); break
            ROWS(1, 8);
            ROWS(2, 8);
            ROWS(3, 8);
            ROWS(4, 4);
            ROWS(5, 4);
            ROWS(6, 4);
            ROWS(7, 2);
            ROWS(8, 2);
            ROWS(9, 2);
            ROWS(10, 2);
            ROWS(11, 2);
            ROWS(12, 2);
#undef ROWS
        }
    }
}

/* ---- softmax_step, silu_mul, gelu_mul ------------------------------------------------------------------------ */

typedef __m512 floats;
typedef int32_t ints __attribute__((vector_size(4 * W)));

INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }

INLINE floats zero_below(floats v, floats x, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), v);
}

INLINE float fold_sum(floats v) { return _mm512_reduce_add_ps(v); }
INLINE float fold_max(floats v) { return _mm512_reduce_max_ps(v); }

INLINE floats load_first(const float *src, int32_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), src); }
INLINE void store_first(float *dst, floats v, int32_t n) { _mm512_mask_storeu_ps(dst, first_lanes(n), v); }

#include "kernels_exp.h"

const kvm_cpu_kernels kvm_kernels_avx512 = {
    .name = "avx512",
    .supported = supported,
    .gemm_f32 = gemm_f32,
    .quantize_q8 = kvm_avx2_quantize_q8,
    .matmul_q8 = kvm_matmul_avx512_q8,
    .load_weights = kvm_matmul_avx512_load,
    .load_packed = kvm_avx2_load_packed,
    .encode = encode_page,
    .hadamard = hadamard,
    .load_f16 = kvm_avx2_load_f16,
    .gemm_f16 = kvm_avx512_gemm_f16,
    .score_packed = kvm_avx512_score_packed,
    .quantize_weights = kvm_avx512_quantize_weights,
    .mix_packed = kvm_avx512_mix_packed,
    .softmax_step = softmax_step,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
};
