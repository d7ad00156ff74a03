/* matmul_avx2.h - the weights' entries of the AVX2 table, in a file of their own. */
#ifndef KVM_CPU_MATMUL_AVX2_H
#define KVM_CPU_MATMUL_AVX2_H

#include "kernels.h"

/* kvm_cpu_kernels.matmul_q8 */
void kvm_matmul_avx2_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows,
                        float *y, int32_t ldy);
/* kvm_cpu_kernels.load_weights */
void kvm_matmul_avx2_load(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out);

#endif
