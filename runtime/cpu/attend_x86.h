/* attend_x86.h - the attention kernels of the AVX2 and the AVX-512 table, each in a file of its own; kernels.h has their
 * contracts. */
#ifndef KVM_CPU_ATTEND_X86_H
#define KVM_CPU_ATTEND_X86_H

#include "kernels.h"

#define KVM_ATTEND_KERNELS(isa)                                                                                        \
    void kvm_##isa##_gemm_f16(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const uint16_t *b,         \
                              int32_t ldb, float *c, int32_t ldc, ptrdiff_t ahead);                                    \
    void kvm_##isa##_score_packed(kvm_kvtype type, const uint8_t *codes, const uint16_t *scales, int32_t d, int32_t m, \
                                  kvm_q8_queries q, const float *start, float *score, ptrdiff_t ahead);                \
    void kvm_##isa##_quantize_weights(const float *p, const uint16_t *scales, int32_t n_groups, int32_t m,             \
                                      kvm_u8_weights out);                                                             \
    void kvm_##isa##_mix_packed(kvm_kvtype type, const uint8_t *codes, int32_t d, int32_t m, kvm_u8_weights w,         \
                                float *acc, ptrdiff_t ahead)

KVM_ATTEND_KERNELS(avx2);
KVM_ATTEND_KERNELS(avx512);

/* of both tables */
void kvm_avx2_load_packed(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out);

#endif
