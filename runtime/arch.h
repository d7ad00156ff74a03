/* arch.h - the model families: one row each, and the tensors that a layer is made of.
 *
 * A family is a row of flags over one baseline decoder (RMSNorm, rotary GQA attention, gated SiLU feed-forward). A
 * tensor role says where a tensor goes and what shape the hyper-parameters imply.
 */
#ifndef KVM_ARCH_H
#define KVM_ARCH_H

#include "backend.h"

typedef struct {
    const char *name;    /* general.architecture, the prefix of its keys */
    bool rope_halves;    /* rotary pairs (i, i + n_rot/2); else neighbours */
    bool needs_qkv_bias; /* without it the biases are optional */
} kvm_arch;

/* NULL for a family without a row */
const kvm_arch *kvm_arch_find(const char *name, size_t n_bytes);
/* "llama, qwen2" */
const char *kvm_arch_names(void);

typedef enum { KVM_DIM_ONE, KVM_DIM_EMBD, KVM_DIM_FF, KVM_DIM_Q, KVM_DIM_K, KVM_DIM_V, KVM_DIM_O } kvm_dim;

typedef struct {
    const char *name;   /* behind "blk.N." */
    kvm_dim n_in, n_out; /* n_out = KVM_DIM_ONE: a vector, decoded to f32; else a matrix of n_out rows */
    size_t offset;      /* of the field in kvm_layer: a kvm_matrix, or a const float * */
    bool is_bias;
} kvm_role;

extern const kvm_role kvm_roles[];
extern const int32_t kvm_n_roles;

#endif
