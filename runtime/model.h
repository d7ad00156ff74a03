/* model.h - a GGUF file as a model: validated hyper-parameters and typed weights, and its tokenizer.
 *
 * After kvm_model_open every matrix has the shape that the hyper-parameters imply, its data lies in the file's mapping
 * and every tensor of the file has found its place. Vectors (norms, biases) are decoded to f32 once.
 */
#ifndef KVM_MODEL_H
#define KVM_MODEL_H

#include "arch.h"
#include "gguf.h"
#include "recipe.h"
#include "tokenizer.h"

struct kvmix_model {
    kvm_gguf *file;
    kvm_recipe_keys recipe_keys;
    kvm_tokenizer *tokenizer;
    const kvm_arch *arch;
    kvm_net net;
    kvm_layer *layers; /* [n_layer], the net's */
    float *vectors;    /* all norms and biases, one after another */
    int32_t n_ctx_train;
    uint64_t n_params, weight_bytes;
    char name[128], weights[160];
};

/* IO, FORMAT, UNSUPPORTED, NOMEM; the sentence names the key or the first tensor that does not fit */
kvmix_status kvm_model_open(kvmix_model **out, const char *path, bool use_mmap);
void kvm_model_close(kvmix_model *model);

#endif
