/* model.c - reads hyper-parameters, finds and checks every tensor. */
#include <stdio.h>
#include <stdlib.h>

#include "gguf_split.h"
#include "model.h"

#define ROPE_FREQS "rope_freqs.weight" /* Llama 3.x: a factor for each rotary pair */

typedef struct {
    kvmix_model *model;
    const kvm_gguf *file;
    char prefix[64];      /* "llama" */
    uint64_t n_vectors;   /* floats needed for norms and biases, then handed out */
    bool *placed;         /* [n_tensors]: those that found their place */
} loader;

/* ---- hyper-parameters ---------------------------------------------------------------------------------------- */

static kvmix_status missing_key(const loader *l, const char *key) {
    return kvm_fail(KVMIX_FORMAT, "%s: the key %s.%s is missing; this is not a complete model file",
                    kvm_gguf_name(l->file), l->prefix, key);
}

/* an integer key behind the family's prefix; `fallback` < 0 = it must be there */
static kvmix_status read_int(const loader *l, const char *key, int32_t low, int32_t high, int32_t fallback,
                             int32_t *out) {
    *out = 0;
    char name[128];
    snprintf(name, sizeof name, "%s.%s", l->prefix, key);
    int64_t value;
    bool found;
    KVM_TRY(kvm_gguf_get_int(l->file, name, low, high, &value, &found));
    if (!found && fallback < 0) return missing_key(l, key);
    *out = found ? (int32_t)value : fallback;
    return KVMIX_OK;
}

static kvmix_status read_float(const loader *l, const char *key, float fallback, float *out) {
    *out = 0;
    char name[128];
    snprintf(name, sizeof name, "%s.%s", l->prefix, key);
    float value;
    bool found;
    KVM_TRY(kvm_gguf_get_float(l->file, name, &value, &found));
    *out = found ? value : fallback;
    if (*out > 0) return KVMIX_OK;
    if (!found) return missing_key(l, key);
    return kvm_fail(KVMIX_FORMAT, "%s: %s is %g; it must be above 0", kvm_gguf_name(l->file), name, (double)*out);
}

/* what this build does not run is refused by name */
static kvmix_status refuse_unsupported(const loader *l) {
    char name[128];
    snprintf(name, sizeof name, "%s.rope.scaling.type", l->prefix);
    kvm_text scaling;
    bool found;
    KVM_TRY(kvm_gguf_get_text(l->file, name, &scaling, &found));
    if (found && !(scaling.n_bytes == 4 && memcmp(scaling.data, "none", 4) == 0)) {
        return kvm_fail(KVMIX_UNSUPPORTED, "%s: rope scaling '%.*s' is not supported yet; only unscaled models run",
                        kvm_gguf_name(l->file), (int)scaling.n_bytes, scaling.data);
    }
    int32_t n_expert;
    KVM_TRY(read_int(l, "expert_count", 0, 1 << 20, 0, &n_expert));
    if (n_expert > 0) {
        return kvm_fail(KVMIX_UNSUPPORTED, "%s: a mixture of %d experts is not supported yet", kvm_gguf_name(l->file),
                        n_expert);
    }
    return KVMIX_OK;
}

/* Which layers slide (layers see all but for attention.sliding_window), and the groups of layers of one span. Only
 * families whose row has a pattern slide: others carry the key without meaning it. */
static kvmix_status read_spans(loader *l) {
    kvmix_model *m = l->model;
    int32_t span, every = m->arch->global_every, n_group = 0, span_of_group[2];
    if (every == 0) return KVMIX_OK;
    KVM_TRY(read_int(l, "attention.sliding_window", 0, 1 << 24, 0, &span));
    char key[128];
    snprintf(key, sizeof key, "%s.attention.sliding_window_pattern", l->prefix);
    kvm_gguf_array pattern;
    bool listed;
    if (kvm_gguf_get_array(l->file, key, KVM_GGUF_BOOL, &pattern, &listed) != KVMIX_OK) {
        listed = false; /* a number instead of a list */
        KVM_TRY(read_int(l, "attention.sliding_window_pattern", 1, 1024, every, &every));
    }
    if (listed && pattern.n != (uint64_t)m->net.n_layer) {
        return kvm_fail(KVMIX_FORMAT, "%s: %s has %llu entries for %d layers", kvm_gguf_name(l->file), key,
                        (unsigned long long)pattern.n, m->net.n_layer);
    }
    for (int32_t i = 0; i < m->net.n_layer; i++) {
        kvm_layer *layer = &m->layers[i];
        bool slides = span > 0 && (listed ? pattern.data[i] != 0 : (i + 1) % every != 0);
        if (slides) {
            layer->span = span;
            if (m->arch->local_rope_base > 0) layer->rope_base = m->arch->local_rope_base;
        }
        while (layer->group < n_group && span_of_group[layer->group] != layer->span) layer->group++;
        if (layer->group == n_group) span_of_group[n_group++] = layer->span;
    }
    return KVMIX_OK;
}

static kvmix_status read_hyperparameters(loader *l) {
    kvmix_model *m = l->model;
    kvm_net *net = &m->net;
    int32_t n_head, n_head_kv, d_k, d_v, n_rot;
    KVM_TRY(refuse_unsupported(l));
    KVM_TRY(read_int(l, "block_count", 1, 1024, -1, &net->n_layer));
    KVM_TRY(read_int(l, "embedding_length", 1, 1 << 20, -1, &net->n_embd));
    KVM_TRY(read_int(l, "feed_forward_length", 1, 1 << 22, -1, &net->n_ff));
    KVM_TRY(read_int(l, "context_length", 1, 1 << 24, -1, &m->n_ctx_train));
    KVM_TRY(read_int(l, "attention.head_count", 1, 4096, -1, &n_head));
    KVM_TRY(read_int(l, "attention.head_count_kv", 1, 4096, n_head, &n_head_kv));
    KVM_TRY(read_int(l, "attention.key_length", 8, 1024, net->n_embd / n_head, &d_k));
    KVM_TRY(read_int(l, "attention.value_length", 8, 1024, net->n_embd / n_head, &d_v));
    KVM_TRY(read_int(l, "rope.dimension_count", 2, 1024, d_k, &n_rot));
    KVM_TRY(read_float(l, "attention.layer_norm_rms_epsilon", 0, &net->norm_eps));
    float rope_base;
    KVM_TRY(read_float(l, "rope.freq_base", 10000.0f, &rope_base));
    if (n_head % n_head_kv != 0) {
        return kvm_fail(KVMIX_FORMAT, "%s: %d query heads do not divide over %d KV heads", kvm_gguf_name(l->file),
                        n_head, n_head_kv);
    }
    if (n_rot > d_k || n_rot % 2 != 0) {
        return kvm_fail(KVMIX_FORMAT, "%s: %s.rope.dimension_count is %d; it must be even and at most the head size %d",
                        kvm_gguf_name(l->file), l->prefix, n_rot, d_k);
    }
    net->n_vocab = kvm_tokenizer_n_vocab(m->tokenizer);
    net->gelu = m->arch->gelu;
    net->embd_scale = m->arch->scales_embd ? sqrtf((float)net->n_embd) : 1.0f;
    m->layers = kvm_alloc_zero((uint64_t)net->n_layer, sizeof *m->layers);
    if (m->layers == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for %d layers", net->n_layer);
    net->layers = m->layers;
    for (int32_t i = 0; i < net->n_layer; i++) {
        m->layers[i] = (kvm_layer){.n_head = n_head, .n_head_kv = n_head_kv, .d_k = d_k, .d_v = d_v, .n_rot = n_rot,
                                   .rope_halves = m->arch->rope_halves, .rope_base = rope_base,
                                   .scale = 1.0f / sqrtf((float)d_k)};
    }
    return read_spans(l);
}

/* ---- tensors ------------------------------------------------------------------------------------------------- */

static int64_t dim_value(const kvm_net *net, const kvm_layer *layer, kvm_dim dim) {
    switch (dim) {
    case KVM_DIM_ONE: return 1;
    case KVM_DIM_EMBD: return net->n_embd;
    case KVM_DIM_FF: return net->n_ff;
    case KVM_DIM_Q: return (int64_t)layer->n_head * layer->d_k;
    case KVM_DIM_K: return (int64_t)layer->n_head_kv * layer->d_k;
    case KVM_DIM_V: return (int64_t)layer->n_head_kv * layer->d_v;
    case KVM_DIM_O: return (int64_t)layer->n_head * layer->d_v;
    case KVM_DIM_HEAD: return layer->d_k;
    }
    return 0;
}

/* The tensor of that name with shape [n_in] or [n_in, n_out]; NULL when absent and optional. */
static kvmix_status find_tensor(loader *l, const char *name, int64_t n_in, int64_t n_out, bool optional,
                                const kvm_gguf_tensor **out) {
    const kvm_gguf_tensor *t = *out = kvm_gguf_find(l->file, name);
    if (t == NULL) {
        if (optional) return KVMIX_OK;
        return kvm_fail(KVMIX_FORMAT, "%s: the tensor %s is missing; get the complete file", kvm_gguf_name(l->file), name);
    }
    if (t->dim[0] != (uint64_t)n_in || t->dim[1] != (uint64_t)n_out || t->dim[2] != 1 || t->dim[3] != 1) {
        return kvm_fail(KVMIX_FORMAT, "%s: the tensor %s is [%llu, %llu]; the hyper-parameters want [%lld, %lld]",
                        kvm_gguf_name(l->file), name, (unsigned long long)t->dim[0], (unsigned long long)t->dim[1],
                        (long long)n_in, (long long)n_out);
    }
    l->placed[t->index] = true;
    return KVMIX_OK;
}

static kvm_matrix matrix_of(const kvm_gguf_tensor *t) {
    return (kvm_matrix){.type = t->type, .n_in = (int32_t)t->dim[0], .n_out = (int32_t)t->dim[1], .data = t->data};
}

static const float *take_vector(loader *l, const kvm_gguf_tensor *t) {
    float *out = l->model->vectors + l->n_vectors;
    kvm_dtypes[t->type].decode(t->data, out, (int64_t)t->n_values);
    l->n_vectors += t->n_values;
    return out;
}

/* may the family have this tensor, and must it? */
static bool is_allowed(const kvm_arch *arch, int32_t set) { return set == 0 || (set & (arch->needs | arch->may_have)); }
static bool is_needed(const kvm_arch *arch, int32_t set) { return set == 0 || (set & arch->needs); }

static kvmix_status place_layer(loader *l, int32_t index) {
    kvm_layer *layer = &l->model->layers[index];
    for (int32_t i = 0; i < kvm_n_roles; i++) {
        const kvm_role *role = &kvm_roles[i];
        if (!is_allowed(l->model->arch, role->set)) continue;
        char name[96];
        snprintf(name, sizeof name, "blk.%d.%s", index, role->name);
        const kvm_gguf_tensor *t;
        bool optional = !is_needed(l->model->arch, role->set);
        KVM_TRY(find_tensor(l, name, dim_value(&l->model->net, layer, role->n_in),
                            dim_value(&l->model->net, layer, role->n_out), optional, &t));
        char *field = (char *)layer + role->offset;
        if (t == NULL) continue;
        if (role->n_out == KVM_DIM_ONE) {
            const float *vector = take_vector(l, t);
            memcpy(field, &vector, sizeof vector);
        } else {
            kvm_matrix matrix = matrix_of(t);
            memcpy(field, &matrix, sizeof matrix);
        }
    }
    return KVMIX_OK;
}

static kvmix_status place_tensors(loader *l) {
    kvmix_model *m = l->model;
    kvm_net *net = &m->net;
    uint64_t n_floats = 0;
    for (int32_t i = 0; i < kvm_gguf_n_tensors(l->file); i++) {
        const kvm_gguf_tensor *t = kvm_gguf_tensor_at(l->file, i);
        if (t->n_values == t->dim[0]) n_floats += t->n_values; /* it may be a vector; the sum is below the file's size */
        m->n_params += t->n_values;
        m->weight_bytes += t->n_bytes;
    }
    m->vectors = kvm_alloc(n_floats, sizeof *m->vectors);
    if (m->vectors == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for %llu norms and biases", (unsigned long long)n_floats);
    const kvm_gguf_tensor *embd, *norm, *head, *freqs = NULL;
    KVM_TRY(find_tensor(l, "token_embd.weight", net->n_embd, net->n_vocab, false, &embd));
    KVM_TRY(find_tensor(l, "output_norm.weight", net->n_embd, 1, false, &norm));
    KVM_TRY(find_tensor(l, "output.weight", net->n_embd, net->n_vocab, true, &head));
    net->embd = matrix_of(embd);
    net->head = matrix_of(head != NULL ? head : embd);
    net->out_norm = take_vector(l, norm);
    if (is_allowed(m->arch, KVM_HAS_ROPE_FREQS)) {
        KVM_TRY(find_tensor(l, ROPE_FREQS, m->layers[0].n_rot / 2, 1, true, &freqs));
    }
    const float *factors = freqs != NULL ? take_vector(l, freqs) : NULL;
    for (int32_t i = 0; i < net->n_layer; i++) {
        m->layers[i].rope_factors = factors;
        KVM_TRY(place_layer(l, i));
    }
    return KVMIX_OK;
}

/* a tensor that nothing asked for would silently be left out of the model */
static kvmix_status refuse_strangers(const loader *l) {
    for (int32_t i = 0; i < kvm_gguf_n_tensors(l->file); i++) {
        if (l->placed[i]) continue;
        kvm_text name = kvm_gguf_tensor_at(l->file, i)->name;
        return kvm_fail(KVMIX_UNSUPPORTED, "%s: the tensor %.*s has no place in the family %s as this build runs it",
                        kvm_gguf_name(l->file), (int)name.n_bytes, name.data, l->model->arch->name);
    }
    return KVMIX_OK;
}

/* "Q4_1 87%, Q8_0 13%", by bytes, above half a percent */
static void describe_weights(kvmix_model *m) {
    uint64_t bytes[KVM_DTYPE_COUNT] = {0};
    for (int32_t i = 0; i < kvm_gguf_n_tensors(m->file); i++) {
        const kvm_gguf_tensor *t = kvm_gguf_tensor_at(m->file, i);
        bytes[t->type] += t->n_bytes;
    }
    size_t used = 0;
    for (int32_t n = 0; n < KVM_DTYPE_COUNT; n++) {
        int32_t most = 0;
        for (int32_t t = 1; t < KVM_DTYPE_COUNT; t++) most = bytes[t] > bytes[most] ? t : most;
        double percent = 100.0 * (double)bytes[most] / (double)m->weight_bytes;
        if (percent < 0.5 || used + 24 > sizeof m->weights) return;
        used += (size_t)snprintf(m->weights + used, 24, "%s%s %.0f%%", used ? ", " : "", kvm_dtypes[most].name, percent);
        bytes[most] = 0;
    }
}

/* ---- opening ------------------------------------------------------------------------------------------------- */

static kvmix_status find_arch(loader *l) {
    kvm_text arch;
    bool found;
    KVM_TRY(kvm_gguf_get_text(l->file, "general.architecture", &arch, &found));
    if (!found) {
        return kvm_fail(KVMIX_FORMAT, "%s: the key general.architecture is missing; this is not a complete model file",
                        kvm_gguf_name(l->file));
    }
    l->model->arch = kvm_arch_find(arch.data, arch.n_bytes);
    if (l->model->arch == NULL) {
        return kvm_fail(KVMIX_UNSUPPORTED, "%s: the model family '%.*s' is not supported; this build runs %s",
                        kvm_gguf_name(l->file), (int)(arch.n_bytes < 64 ? arch.n_bytes : 64), arch.data, kvm_arch_names());
    }
    snprintf(l->prefix, sizeof l->prefix, "%s", l->model->arch->name);
    return KVMIX_OK;
}

static kvmix_status load(loader *l, const char *path, bool use_mmap) {
    kvmix_model *m = l->model;
    KVM_TRY(kvm_gguf_split_open(&m->file, path, use_mmap));
    l->file = m->file;
    KVM_TRY(kvm_recipe_open_keys(&m->recipe_keys, m->file));
    l->placed = kvm_alloc_zero((uint64_t)kvm_gguf_n_tensors(m->file), sizeof *l->placed);
    if (l->placed == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for %d tensors", kvm_gguf_n_tensors(m->file));
    KVM_TRY(find_arch(l));
    KVM_TRY(kvm_tokenizer_open(&m->tokenizer, m->file));
    KVM_TRY(read_hyperparameters(l));
    KVM_TRY(place_tensors(l));
    KVM_TRY(refuse_strangers(l));
    describe_weights(m);
    kvm_text name;
    bool found;
    KVM_TRY(kvm_gguf_get_text(m->file, "general.name", &name, &found));
    if (found) snprintf(m->name, sizeof m->name, "%.*s", (int)(name.n_bytes < 120 ? name.n_bytes : 120), name.data);
    return KVMIX_OK;
}

kvmix_status kvm_model_open(kvmix_model **out, const char *path, bool use_mmap) {
    *out = NULL;
    kvmix_model *model = kvm_alloc_zero(1, sizeof *model);
    if (model == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a model");
    loader l = {.model = model};
    kvmix_status status = load(&l, path, use_mmap);
    free(l.placed);
    if (status != KVMIX_OK) {
        kvm_model_close(model);
        return status;
    }
    *out = model;
    return KVMIX_OK;
}

void kvm_model_close(kvmix_model *model) {
    if (model == NULL) return;
    kvm_tokenizer_close(model->tokenizer);
    kvm_recipe_close_keys(&model->recipe_keys);
    kvm_gguf_close(model->file);
    free(model->vectors);
    free(model->layers);
    free(model);
}
