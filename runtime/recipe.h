/* recipe.h - which type every layer's K and V has, the window, the sinks and the kind of key balance.
 *
 * Text form: pair(,A-B:pair)*, `;` for `,` too, spaces anywhere; pair = k<T>v<T>, T = 2 3 4 5 6 8 f16; a bare type
 * ("f16", "q8") is both sides; ranges are inclusive layer numbers, one number is a range; later wins.
 * In a GGUF file: kvmix.version (1), kvmix.k_type and kvmix.v_type (string arrays, one name a layer, authoritative),
 * kvmix.recipe (the text; refused when it disagrees), kvmix.window, kvmix.sink, kvmix.balance ("frozen" | "page").
 * The same keys may lie in a *sidecar*, MODEL.kvmix.gguf beside MODEL.gguf, a GGUF file without tensors. It is used
 * where the model's file has no kvmix.version, and says whose it is: kvmix.sidecar.file_bytes, and
 * kvmix.sidecar.header_crc32 (zlib's, of all that comes before the tensor data).
 */
#ifndef KVM_RECIPE_H
#define KVM_RECIPE_H

#include "backend.h"
#include "gguf.h"

enum { KVM_LAYER_MAX = 1024, KVM_RECIPE_TEXT_MAX = 16384, KVM_WINDOW_MAX = 1 << 24 };

typedef struct {
    int32_t n_layer;
    uint8_t k[KVM_LAYER_MAX], v[KVM_LAYER_MAX]; /* kvm_kvtype */
    int32_t window, sink;
    bool balance_page;
    char source[32];                /* who set the types: "-ctk/-ctv", "--kv", "file", "sidecar", "catalog", "default" */
    char text[KVM_RECIPE_TEXT_MAX]; /* canonical: the commonest pair, then the layers that differ */
} kvm_recipe;

/* Where the kvmix.* keys of a model are. */
typedef struct {
    const kvm_gguf *model;
    kvm_gguf *sidecar; /* NULL = none */
    bool is_strange;   /* the sidecar was made for another file: refused where its recipe would be used */
} kvm_recipe_keys;

/* Opens the sidecar where there is one to use; what is wrong with it as a GGUF file fails here. */
kvmix_status kvm_recipe_open_keys(kvm_recipe_keys *out, const kvm_gguf *model);
void kvm_recipe_close_keys(kvm_recipe_keys *keys);
/* the file that they are in, if there are any; never a strange sidecar */
const kvm_gguf *kvm_recipe_file(const kvm_recipe_keys *keys);

/* Resolves the types by precedence - k_type/v_type, kv, the keys, kv_default, k4v3 - and window, sink and balance
 * apart from them. ARG, FORMAT and UNSUPPORTED say which text, key or layer does not fit. */
kvmix_status kvm_recipe_resolve(kvm_recipe *out, const kvm_recipe_keys *keys, int32_t n_layer,
                                const kvmix_session_options *options);

#endif
