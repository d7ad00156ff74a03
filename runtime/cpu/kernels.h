/* kernels.h - the hot inner loops of the CPU backend, one table for each instruction set.
 *
 * cpu.c holds every stage, written once against this table; kernels_scalar.c is the plain version of each entry (the
 * oracle), kernels_avx2.c the fast one. Which table is used is decided once, when a backend opens. Every entry
 * computes each output element with an order of operations that depends on its own inputs only - never on m, on
 * neighbouring rows or on blocking - so that results do not change with the batch or the threads (design 4).
 */
#ifndef KVM_CPU_KERNELS_H
#define KVM_CPU_KERNELS_H

#include "../backend.h"

enum { KVM_Q8_BLOCK = 32 };

#define KVM_GELU_LINEAR 1.5957691216057308f /* 2 sqrt(2 / pi) */
#define KVM_GELU_CUBIC 0.044715f

/* Activations of one row in 8 bits, blocks of 32: x ~ scale * q, scale = max|x| / 127, q rounded to nearest even.
 * A NaN makes the block's scale NaN, an infinity makes it infinite: neither gets lost on its way to the logits.
 * sum[2b], sum[2b+1] = scale * (sum of q over the first, second 16 of block b), for formats with a minimum. */
typedef struct {
    int8_t *q;    /* [n_in], 32-byte aligned */
    float *scale; /* [n_in / 32] */
    float *sum;   /* [n_in / 16] */
} kvm_q8_row;

typedef struct {
    const char *name;
    bool (*supported)(void); /* by this CPU */

    /* c[i][j] += sum over l ascending of a[i][l] * b[l][j]; a: m x k, b: k x n, c: m x n, leading dimensions lda.. */
    void (*gemm_f32)(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb,
                     float *c, int32_t ldc);

    void (*quantize_q8)(const float *x, int32_t n, kvm_q8_row out);
    /* y[r][o] = W[o] . x[r] for o in [first, last), r in [0, n_rows): W a block-quantized format (not F32 F16 BF16)
     * with n_in % 32 == 0; y row-major with leading dimension ldy */
    void (*matmul_q8)(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows, float *y,
                      int32_t ldy);

    /* a packed side of one head's page -> f32: K [d][128], V [128][d]; what kvm_decode_page gives, bit for bit */
    void (*load_packed)(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out);
    /* kvm_encode and kvm_hadamard, bit for bit */
    void (*encode)(kvm_kvtype type, const float *x, int32_t d, uint8_t *codes, uint16_t *scales);
    void (*hadamard)(float *x, int32_t d, int32_t n, int32_t block);
    /* f16 -> f32, n values */
    void (*load_f16)(const uint16_t *src, int32_t n, float *dst);

    /* One step of the online softmax over a page, for one query. score[128]: logits, -inf where masked, at least one
     * finite; replaced by p = exp(score - m). *m and *l are the running maximum and sum; returns the factor
     * exp(m_old - m_new) by which earlier sums must be scaled (0 when m_old is -inf). */
    float (*softmax_step)(float *score, float *m, float *l);
    /* gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i], n values */
    void (*silu_mul)(float *gate, const float *up, int32_t n);
    /* the same with GELU, approximated by tanh: gate / (1 + exp(-2 sqrt(2 / pi) (gate + 0.044715 gate^3))) * up */
    void (*gelu_mul)(float *gate, const float *up, int32_t n);
} kvm_cpu_kernels;

extern const kvm_cpu_kernels kvm_kernels_scalar;
#if defined(__x86_64__)
extern const kvm_cpu_kernels kvm_kernels_avx2;
#endif

#endif
