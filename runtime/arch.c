/* arch.c - the rows of arch.h. */
#include "arch.h"

#define ARCH_LIST(X)                                                                                                   \
    X("llama", .rope_halves = false) /* SmolLM, Llama 1 and 2, Mistral, TinyLlama */                                   \
    X("qwen2", .rope_halves = true, .needs_qkv_bias = true)

#define X(arch_name, ...) {.name = arch_name, __VA_ARGS__},
static const kvm_arch archs[] = {ARCH_LIST(X)};
#undef X

const kvm_arch *kvm_arch_find(const char *name, size_t n_bytes) {
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        if (strlen(archs[i].name) == n_bytes && memcmp(archs[i].name, name, n_bytes) == 0) return &archs[i];
    }
    return NULL;
}

const char *kvm_arch_names(void) {
    static const char names[] =
#define X(arch_name, ...) ", " arch_name
        ARCH_LIST(X);
#undef X
    return names + 2;
}

#define FIELD(field) offsetof(kvm_layer, field)
const kvm_role kvm_roles[] = {
    {"attn_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(attn_norm), false},
    {"attn_q.weight", KVM_DIM_EMBD, KVM_DIM_Q, FIELD(q), false},
    {"attn_k.weight", KVM_DIM_EMBD, KVM_DIM_K, FIELD(k), false},
    {"attn_v.weight", KVM_DIM_EMBD, KVM_DIM_V, FIELD(v), false},
    {"attn_q.bias", KVM_DIM_Q, KVM_DIM_ONE, FIELD(q_bias), true},
    {"attn_k.bias", KVM_DIM_K, KVM_DIM_ONE, FIELD(k_bias), true},
    {"attn_v.bias", KVM_DIM_V, KVM_DIM_ONE, FIELD(v_bias), true},
    {"attn_output.weight", KVM_DIM_O, KVM_DIM_EMBD, FIELD(o), false},
    {"ffn_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(ffn_norm), false},
    {"ffn_gate.weight", KVM_DIM_EMBD, KVM_DIM_FF, FIELD(gate), false},
    {"ffn_up.weight", KVM_DIM_EMBD, KVM_DIM_FF, FIELD(up), false},
    {"ffn_down.weight", KVM_DIM_FF, KVM_DIM_EMBD, FIELD(down), false},
};
const int32_t kvm_n_roles = sizeof kvm_roles / sizeof *kvm_roles;
