/* kernels.h - the hot inner loops of the CPU backend, one table for each instruction set.
 *
 * cpu.c holds every stage, written once against this table; kernels_scalar.c is the plain version of each entry (the
 * oracle), kernels_avx2.c and kernels_avx512.c the fast ones. Which table is used is decided once, when a backend
 * opens. Every entry computes each output element with an order of operations that depends on its own inputs only -
 * never on m, on neighbouring rows or on blocking - so that results do not change with the batch or the threads
 * (design 4).
 */
#ifndef KVM_CPU_KERNELS_H
#define KVM_CPU_KERNELS_H

#include "../backend.h"

enum {
    KVM_Q8_BLOCK = 32,
    KVM_TILE_OUT = 32, /* a tile of weights in f32: [256][32] */
    KVM_TILE_IN = 256,
    KVM_WEIGHT_BLOCK = 32, /* of kvm_u8_weights */
};

#define KVM_GELU_LINEAR 1.5957691216057308f /* 2 sqrt(2 / pi) */
#define KVM_GELU_CUBIC 0.044715f

/* Activations of one row in 8 bits, blocks of 32: x ~ scale * q, scale = max|x| / 127, q rounded to nearest even.
 * A NaN makes the block's scale NaN, an infinity makes it infinite: neither gets lost on its way to the logits.
 * The sums are for formats whose weights have a minimum: scale * (sum of q over a block, over its first 16). */
typedef struct {
    int8_t *q;                  /* [n_in], 32-byte aligned */
    float *scale, *sum, *sum16; /* [n_in / 32] */
} kvm_q8_row;

/* m queries of packed keys in 8 bits, in the groups of the keys' scales (kvtype.h 3): x ~ scale * q, |q| <= 127 */
typedef struct {
    int8_t *q;    /* [m][d] */
    float *scale; /* [m][d / G] */
    int32_t *sum; /* [m][d / G], of q */
} kvm_q8_queries;

/* The weights of a page's packed values for m queries in 8 bits, for each group of channels: blocks of 32 positions,
 * p * (scale of the position) ~ scale * w, scale = the block's largest / 255, w rounded to nearest even. */
typedef struct {
    uint8_t *w;   /* [m][d / G][128] */
    float *scale; /* [m][d / G][128 / 32] */
} kvm_u8_weights;

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
    /* weights of outputs [first, last), at most KVM_TILE_OUT, and of KVM_TILE_IN inputs (or what is left of n_in) from
     * i on, a multiple of KVM_TILE_IN: bit for bit as decoded, transposed. out: [inputs][KVM_TILE_OUT], of which
     * last - first columns are written. W of any type, with n_in % 32 == 0 where it is block-quantized. */
    void (*load_weights)(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out);

    /* a packed side of one head's page -> f32: K [d][128], V [128][d]; what kvm_decode_page gives, bit for bit */
    void (*load_packed)(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out);
    /* kvm_encode and kvm_hadamard, bit for bit */
    void (*encode)(kvm_kvtype type, kvm_side side, const float *x, int32_t d, uint8_t *codes, uint16_t *scales);
    void (*hadamard)(float *x, int32_t d, int32_t n, int32_t block);
    /* f16 -> f32, n values */
    void (*load_f16)(const uint16_t *src, int32_t n, float *dst);

    /* Attention over a page. What is read of it is asked for `ahead` bytes further on, too, where the same part of the
     * page that comes next lies; 0 = there is none. d % 16 == 0, d <= KVM_HEAD_DIM_MAX.
     *
     * gemm_f32 with b in f16, for n % 16 == 0; the bits of load_f16 and gemm_f32 */
    void (*gemm_f16)(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const uint16_t *b, int32_t ldb,
                     float *c, int32_t ldc, ptrdiff_t ahead);
    /* score[m][128] = start[m] + sum over groups, ascending, of (sum of q * level, an exact integer) * (scale of K *
     * scale of q); codes, scales: of a packed K side */
    void (*score_packed)(kvm_kvtype type, const uint8_t *codes, const uint16_t *scales, int32_t d, int32_t m,
                         kvm_q8_queries q, const float *start, float *score, ptrdiff_t ahead);
    /* p: [m][128], not negative; scales: [n_groups][128] of a packed V side. The same bits in every table. */
    void (*quantize_weights)(const float *p, const uint16_t *scales, int32_t n_groups, int32_t m, kvm_u8_weights out);
    /* acc[m][d] += sum over blocks, ascending, of (sum of w * level, an exact integer) * scale; codes of a V side */
    void (*mix_packed)(kvm_kvtype type, const uint8_t *codes, int32_t d, int32_t m, kvm_u8_weights w, float *acc,
                       ptrdiff_t ahead);

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
extern const kvm_cpu_kernels kvm_kernels_avx2, kvm_kernels_avx512;
#endif

#endif
