/* arch.h - the model families: one row each, and the tensors that a layer is made of.
 *
 * A family is a row of switches over one baseline decoder (RMSNorm, rotary GQA attention, gated feed-forward). A
 * tensor role says where a tensor goes and what shape the hyper-parameters imply.
 */
#ifndef KVM_ARCH_H
#define KVM_ARCH_H

#include "backend.h"

/* tensors that only some families have, in sets */
enum { KVM_HAS_QKV_BIAS = 1, KVM_HAS_QK_NORM = 2, KVM_HAS_POST_NORM = 4, KVM_HAS_ROPE_FREQS = 8 };

typedef struct {
    const char *name; /* general.architecture, the prefix of its keys */
    int32_t needs;    /* KVM_HAS_* sets that must be there */
    int32_t may_have; /* and those that may */
    bool rope_halves; /* rotary pairs (i, i + n_rot/2); else neighbours */
    bool gelu;        /* GELU gate; else SiLU */
    bool scales_embd; /* embeddings times sqrt(n_embd) */
    int32_t global_every;  /* with attention.sliding_window: layers n-1, 2n-1 .. see all, unless the file says which */
    float local_rope_base; /* of the layers that slide; 0 = as the others */
} kvm_arch;

/* NULL for a family without a row */
const kvm_arch *kvm_arch_find(const char *name, size_t n_bytes);
/* "llama, qwen2" */
const char *kvm_arch_names(void);

typedef enum { KVM_DIM_ONE, KVM_DIM_EMBD, KVM_DIM_FF, KVM_DIM_Q, KVM_DIM_K, KVM_DIM_V, KVM_DIM_O, KVM_DIM_HEAD } kvm_dim;

typedef struct {
    const char *name;   /* behind "blk.N." */
    kvm_dim n_in, n_out; /* n_out = KVM_DIM_ONE: a vector, decoded to f32; else a matrix of n_out rows */
    size_t offset;      /* of the field in kvm_layer: a kvm_matrix, or a const float * */
    int32_t set;        /* KVM_HAS_*, 0 = every family has it */
} kvm_role;

extern const kvm_role kvm_roles[];
extern const int32_t kvm_n_roles;

#endif
