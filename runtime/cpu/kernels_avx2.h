/* kernels_avx2.h - entries of the AVX2 table that the AVX-512 table uses as they are; kernels.h has their contracts. */
#ifndef KVM_CPU_KERNELS_AVX2_H
#define KVM_CPU_KERNELS_AVX2_H

#include "kernels.h"

void kvm_avx2_quantize_q8(const float *x, int32_t n, kvm_q8_row out);
void kvm_avx2_load_f16(const uint16_t *src, int32_t n, float *dst);

#endif
