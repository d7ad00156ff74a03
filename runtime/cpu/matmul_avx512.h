/* matmul_avx512.h - the weights' entries of the AVX-512 table, in a file of their own. */
#ifndef KVM_CPU_MATMUL_AVX512_H
#define KVM_CPU_MATMUL_AVX512_H

#include "kernels.h"

/* kvm_cpu_kernels.matmul_q8 */
void kvm_matmul_avx512_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                          float *y, int32_t ldy);
/* kvm_cpu_kernels.load_weights */
void kvm_matmul_avx512_load(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out);

#endif
