/* dtype.h - the weight formats: one table row and one row decoder each.
 *
 * Values are ggml's; a decoder gives exactly what gguf-py's quants.dequantize gives (same operations, same order,
 * f32). dtype.c draws the bytes of each block above its decoder.
 */
#ifndef KVM_DTYPE_H
#define KVM_DTYPE_H

#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/*  X(enum, name, gguf id, values per block, bytes per block) */
#define KVM_DTYPE_LIST(X)                                                                                              \
    X(F32, "F32", 0, 1, 4)                                                                                             \
    X(F16, "F16", 1, 1, 2)                                                                                             \
    X(Q4_0, "Q4_0", 2, 32, 18)                                                                                         \
    X(Q4_1, "Q4_1", 3, 32, 20)                                                                                         \
    X(Q5_0, "Q5_0", 6, 32, 22)                                                                                         \
    X(Q5_1, "Q5_1", 7, 32, 24)                                                                                         \
    X(Q8_0, "Q8_0", 8, 32, 34)                                                                                         \
    X(Q2_K, "Q2_K", 10, 256, 84)                                                                                       \
    X(Q3_K, "Q3_K", 11, 256, 110)                                                                                      \
    X(Q4_K, "Q4_K", 12, 256, 144)                                                                                      \
    X(Q5_K, "Q5_K", 13, 256, 176)                                                                                      \
    X(Q6_K, "Q6_K", 14, 256, 210)                                                                                      \
    X(IQ2_XXS, "IQ2_XXS", 16, 256, 66)                                                                                 \
    X(IQ2_XS, "IQ2_XS", 17, 256, 74)                                                                                   \
    X(IQ3_XXS, "IQ3_XXS", 18, 256, 98)                                                                                 \
    X(IQ1_S, "IQ1_S", 19, 256, 50)                                                                                     \
    X(IQ4_NL, "IQ4_NL", 20, 32, 18)                                                                                    \
    X(IQ3_S, "IQ3_S", 21, 256, 110)                                                                                    \
    X(IQ2_S, "IQ2_S", 22, 256, 82)                                                                                     \
    X(IQ4_XS, "IQ4_XS", 23, 256, 136)                                                                                  \
    X(IQ1_M, "IQ1_M", 29, 256, 56)                                                                                     \
    X(BF16, "BF16", 30, 1, 2)                                                                                          \
    X(MXFP4, "MXFP4", 39, 32, 17)

typedef enum {
#define X(id, name, gguf, values, bytes) KVM_DTYPE_##id,
    KVM_DTYPE_LIST(X)
#undef X
        KVM_DTYPE_COUNT
} kvm_dtype;

typedef struct {
    const char *name;
    uint32_t gguf_id;
    int32_t block_values, block_bytes;
    /* src: n / block_values blocks, any alignment; dst: [n]; n a multiple of block_values */
    void (*decode)(const void *src, float *dst, int64_t n);
} kvm_dtype_info;

extern const kvm_dtype_info kvm_dtypes[KVM_DTYPE_COUNT];

/* false for a gguf type id that has no row; *name is then ggml's name for it, or NULL when unknown to us too */
bool kvm_dtype_from_gguf(uint32_t gguf_id, kvm_dtype *out, const char **name);

/* bytes of a row of n values; n is a multiple of the block, checked when the file was read */
static inline size_t kvm_dtype_row_bytes(kvm_dtype type, int64_t n) {
    return (size_t)(n / kvm_dtypes[type].block_values) * (size_t)kvm_dtypes[type].block_bytes;
}

#ifdef __cplusplus
}
#endif
#endif
