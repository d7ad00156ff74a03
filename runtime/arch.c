/* arch.c - the rows of arch.h. */
#include "arch.h"

#define ARCH_LIST(X)                                                                                                   \
    X("llama", .may_have = KVM_HAS_QKV_BIAS | KVM_HAS_ROPE_FREQS) /* SmolLM, Llama 1-3, Mistral, TinyLlama */          \
    X("qwen2", .needs = KVM_HAS_QKV_BIAS, .rope_halves = true)                                                         \
    X("qwen3", .needs = KVM_HAS_QK_NORM, .rope_halves = true)                                                          \
    X("gemma3", .needs = KVM_HAS_QK_NORM | KVM_HAS_POST_NORM, .rope_halves = true, .gelu = true, .scales_embd = true,  \
      .global_every = 6, .local_rope_base = 10000.0f)

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
    {"attn_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(attn_norm), 0},
    {"attn_q.weight", KVM_DIM_EMBD, KVM_DIM_Q, FIELD(q), 0},
    {"attn_k.weight", KVM_DIM_EMBD, KVM_DIM_K, FIELD(k), 0},
    {"attn_v.weight", KVM_DIM_EMBD, KVM_DIM_V, FIELD(v), 0},
    {"attn_q.bias", KVM_DIM_Q, KVM_DIM_ONE, FIELD(q_bias), KVM_HAS_QKV_BIAS},
    {"attn_k.bias", KVM_DIM_K, KVM_DIM_ONE, FIELD(k_bias), KVM_HAS_QKV_BIAS},
    {"attn_v.bias", KVM_DIM_V, KVM_DIM_ONE, FIELD(v_bias), KVM_HAS_QKV_BIAS},
    {"attn_q_norm.weight", KVM_DIM_HEAD, KVM_DIM_ONE, FIELD(q_norm), KVM_HAS_QK_NORM},
    {"attn_k_norm.weight", KVM_DIM_HEAD, KVM_DIM_ONE, FIELD(k_norm), KVM_HAS_QK_NORM},
    {"attn_output.weight", KVM_DIM_O, KVM_DIM_EMBD, FIELD(o), 0},
    {"post_attention_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(attn_post_norm), KVM_HAS_POST_NORM},
    {"ffn_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(ffn_norm), 0},
    {"ffn_gate.weight", KVM_DIM_EMBD, KVM_DIM_FF, FIELD(gate), 0},
    {"ffn_up.weight", KVM_DIM_EMBD, KVM_DIM_FF, FIELD(up), 0},
    {"ffn_down.weight", KVM_DIM_FF, KVM_DIM_EMBD, FIELD(down), 0},
    {"post_ffw_norm.weight", KVM_DIM_EMBD, KVM_DIM_ONE, FIELD(ffn_post_norm), KVM_HAS_POST_NORM},
};
const int32_t kvm_n_roles = sizeof kvm_roles / sizeof *kvm_roles;
