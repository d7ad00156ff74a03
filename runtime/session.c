/* session.c - kvmix.h: checks arguments, ties model, recipe, cache, engine and sampler together. */
#include <stdio.h>
#include <stdlib.h>

#include "engine.h"
#include "kvcache.h"
#include "model.h"
#include "recipe.h"
#include "sampler.h"
#include "state.h"
#include "threads.h"

struct kvmix_session {
    const kvmix_model *model;
    kvmix_session_options options; /* resolved; its strings are not kept */
    kvm_recipe recipe;
    kvm_cache *cache;
    const kvm_backend_ops *ops;
    kvm_backend *backend;
    kvmix_row *rows;  /* [n_batch], of sync */
    int32_t n_logits; /* rows whose logits the last decode left */
    int64_t n_evaluated;
    uint64_t cache_bytes;
    void *note; /* of the last load */
    atomic_int cancel;
};

static kvmix_status null_argument(const char *what) { return kvm_fail(KVMIX_ARG, "%s is NULL", what); }

int32_t kvmix_abi_version(void) { return 1; }
const char *kvmix_version(void) { return "0.1.0"; }

const char *kvmix_cpu_kernels(void) { return kvm_cpu_backend.kernels(); }

/* ---- model and tokens ---------------------------------------------------------------------------------------- */

kvmix_status kvmix_model_open(kvmix_model **out, const char *path, int32_t use_mmap) {
    if (out == NULL) return null_argument("out");
    *out = NULL;
    return path == NULL ? null_argument("path") : kvm_model_open(out, path, use_mmap != 0);
}

void kvmix_model_close(kvmix_model *model) { kvm_model_close(model); }

kvmix_status kvmix_model_get_info(const kvmix_model *model, kvmix_model_info *out) {
    if (model == NULL || out == NULL) return null_argument(model == NULL ? "model" : "out");
    const kvm_layer *layer = &model->layers[0];
    kvm_specials s = kvm_tokenizer_specials(model->tokenizer);
    *out = (kvmix_model_info){
        .arch = model->arch->name, .name = model->name, .weights = model->weights,
        .file_bytes = kvm_gguf_file_bytes(model->file), .weight_bytes = model->weight_bytes, .n_params = model->n_params,
        .n_layer = model->net.n_layer, .n_embd = model->net.n_embd, .n_ff = model->net.n_ff,
        .n_vocab = model->net.n_vocab, .n_head = layer->n_head, .n_head_kv = layer->n_head_kv, .head_dim = layer->d_k,
        .n_ctx_train = model->n_ctx_train, .bos = s.bos, .eos = s.eos, .eot = s.eot, .eom = s.eom, .add_bos = s.add_bos,
        .add_eos = s.add_eos};
    return KVMIX_OK;
}

static const kvm_gguf *file_of_key(const kvmix_model *model, const char *key) {
    return strncmp(key, "kvmix.", 6) == 0 ? kvm_recipe_file(&model->recipe_keys) : model->file;
}

kvmix_status kvmix_model_get_string(const kvmix_model *model, const char *key, const char **text, size_t *n_bytes) {
    if (model == NULL || key == NULL || text == NULL || n_bytes == NULL) return null_argument("an argument");
    *text = NULL;
    *n_bytes = 0;
    kvm_text value;
    bool found;
    KVM_TRY(kvm_gguf_get_text(file_of_key(model, key), key, &value, &found));
    if (found) {
        *text = value.data;
        *n_bytes = value.n_bytes;
    }
    return KVMIX_OK;
}

kvmix_status kvmix_model_get_floats(const kvmix_model *model, const char *key, float *out, int32_t n_max, int32_t *n) {
    if (model == NULL || key == NULL || n == NULL || (out == NULL && n_max > 0)) return null_argument("an argument");
    *n = 0;
    kvm_gguf_array array;
    bool found;
    KVM_TRY(kvm_gguf_get_array(file_of_key(model, key), key, KVM_GGUF_F32, &array, &found));
    if (!found) return KVMIX_OK;
    *n = (int32_t)array.n; /* at most 2^24 */
    if (*n > n_max) return kvm_fail(KVMIX_FULL, "%s has %d numbers, there is room for %d", key, *n, n_max);
    memcpy(out, array.data, array.n * sizeof *out);
    return KVMIX_OK;
}

uint32_t kvmix_model_header_crc32(const kvmix_model *model) {
    return model == NULL ? 0 : kvm_gguf_header_crc32(model->file);
}

kvmix_status kvmix_model_get_tensor(const kvmix_model *model, const char *name, kvmix_tensor *out) {
    if (model == NULL || name == NULL || out == NULL) return null_argument("an argument");
    *out = (kvmix_tensor){0};
    const kvm_gguf_tensor *t = kvm_gguf_find(model->file, name);
    if (t == NULL) return KVMIX_OK;
    *out = (kvmix_tensor){.type = kvm_dtypes[t->type].name, .n_in = (int32_t)t->dim[0], .n_rows = (int32_t)t->dim[1]};
    return KVMIX_OK;
}

kvmix_status kvmix_model_read_tensor(const kvmix_model *model, const char *name, int32_t first, int32_t n_rows,
                                     float *out) {
    if (model == NULL || name == NULL || (out == NULL && n_rows > 0)) return null_argument("an argument");
    const kvm_gguf_tensor *t = kvm_gguf_find(model->file, name);
    if (t == NULL) return kvm_fail(KVMIX_ARG, "%s has no tensor '%.64s'", kvm_gguf_name(model->file), name);
    int64_t n_in = (int64_t)t->dim[0], n_all = (int64_t)t->dim[1];
    if (first < 0 || n_rows < 0 || (int64_t)first + n_rows > n_all) {
        return kvm_fail(KVMIX_ARG, "%d rows from %d: the tensor %s has the rows 0 to %lld", n_rows, first, name,
                        (long long)n_all - 1);
    }
    const uint8_t *data = (const uint8_t *)t->data + (size_t)first * kvm_dtype_row_bytes(t->type, n_in);
    kvm_dtypes[t->type].decode(data, out, n_rows * n_in);
    return KVMIX_OK;
}

kvmix_status kvmix_tokenize(const kvmix_model *model, const char *text, size_t n_bytes, const uint8_t *trusted,
                            int32_t flags, int32_t *tokens, int32_t n_max, int32_t *n_tokens) {
    if (model == NULL || n_tokens == NULL || (text == NULL && n_bytes > 0) || (tokens == NULL && n_max > 0)) {
        return null_argument("an argument");
    }
    *n_tokens = 0;
    if (n_bytes >= (size_t)1 << 28 || n_max < 0) {
        return kvm_fail(KVMIX_ARG, "a text of %zu bytes for %d tokens; texts are below 256 MiB, in several calls", n_bytes,
                        n_max);
    }
    return kvm_tokenizer_encode(model->tokenizer, text, n_bytes, trusted, flags, tokens, n_max, n_tokens);
}

static kvmix_status check_token(const kvmix_model *model, int32_t token) {
    if (token >= 0 && token < model->net.n_vocab) return KVMIX_OK;
    return kvm_fail(KVMIX_ARG, "token %d is not in the vocabulary of %d", token, model->net.n_vocab);
}

kvmix_status kvmix_token_bytes(const kvmix_model *model, int32_t token, char *buf, int32_t n_max, int32_t *n_bytes) {
    if (model == NULL || n_bytes == NULL || (buf == NULL && n_max > 0)) return null_argument("an argument");
    *n_bytes = 0;
    KVM_TRY(check_token(model, token));
    return kvm_tokenizer_bytes(model->tokenizer, token, buf, n_max, n_bytes);
}

int32_t kvmix_token_attr(const kvmix_model *model, int32_t token) {
    if (model == NULL || token < 0 || token >= model->net.n_vocab) return 0;
    return kvm_tokenizer_attr(model->tokenizer, token);
}

/* ---- pages under study --------------------------------------------------------------------------------------- */

/* buffers of one side, [d][128] */
typedef struct {
    float x[KVM_HEAD_DIM_MAX * KVM_PAGE];
    uint16_t q_rms[KVM_HEAD_DIM_MAX * KVM_PAGE];
} page_side;

static void roundtrip_k(const kvmix_page *page, kvm_kvtype type, page_side *side) {
    int32_t n = page->d_k * KVM_PAGE;
    for (int32_t i = 0; i < n; i++) side->q_rms[i] = kvm_f16_sat(page->q_rms[i]);
    kvm_roundtrip(type, KVM_SIDE_K, page->k, page->d_k, page->first, page->n_valid, side->q_rms);
}

static void roundtrip_v(const kvmix_page *page, kvm_kvtype type, page_side *side) {
    int32_t d = page->d_v;
    for (int32_t i = 0; i < d * KVM_PAGE; i++) side->x[i % d * KVM_PAGE + i / d] = page->v[i];
    kvm_roundtrip(type, KVM_SIDE_V, side->x, d, page->first, page->n_valid, NULL);
    for (int32_t i = 0; i < d * KVM_PAGE; i++) page->v[i] = side->x[i % d * KVM_PAGE + i / d];
}

kvmix_status kvmix_page_roundtrip(const kvmix_page *page, const char *k_type, const char *v_type) {
    if (page == NULL || page->k == NULL || page->v == NULL || page->q_rms == NULL) return null_argument("an argument");
    const char *names[] = {k_type != NULL ? k_type : "f16", v_type != NULL ? v_type : "f16"};
    kvm_kvtype types[2];
    for (int32_t i = 0; i < 2; i++) {
        if (!kvm_kvtype_from_name(names[i], strlen(names[i]), &types[i])) {
            return kvm_fail(KVMIX_ARG, "'%.32s' is no KV type", names[i]);
        }
        int32_t d = i == 0 ? page->d_k : page->d_v;
        if (d < 8 || d > KVM_HEAD_DIM_MAX || d % 8 != 0) {
            return kvm_fail(KVMIX_ARG, "a page of %d channels; multiples of 8 up to %d are possible", d, KVM_HEAD_DIM_MAX);
        }
    }
    if (page->first < 0 || page->n_valid > KVM_PAGE || page->first >= page->n_valid) {
        return kvm_fail(KVMIX_ARG, "positions %d to %d are not in a page of %d", page->first, page->n_valid, KVM_PAGE);
    }
    page_side *side = kvm_alloc(1, sizeof *side);
    if (side == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a page");
    if (types[0] != KVM_KVTYPE_F16) roundtrip_k(page, types[0], side);
    if (types[1] != KVM_KVTYPE_F16) roundtrip_v(page, types[1], side);
    free(side);
    return KVMIX_OK;
}

/* ---- opening a session --------------------------------------------------------------------------------------- */

void kvmix_session_defaults(kvmix_session_options *options) {
    if (options == NULL) return;
    *options = (kvmix_session_options){.size = sizeof *options, .n_batch = 512, .n_logits = 8, .n_seq_max = 1,
                                       .n_checkpoint = 2, .window = -1, .sink = -1, .balance_page = -1};
}

static kvmix_status check_range(const char *what, int32_t value, int32_t low, int32_t high) {
    if (value >= low && value <= high) return KVMIX_OK;
    return kvm_fail(KVMIX_ARG, "%s is %d; it takes %d to %d", what, value, low, high);
}

static kvmix_status resolve_options(const kvmix_model *model, const kvmix_session_options *in, kvmix_session_options *out) {
    if (in->size != sizeof *in) {
        return kvm_fail(KVMIX_ARG, "options.size is %u, not %zu: fill them with kvmix_session_defaults of this library",
                        in->size, sizeof *in);
    }
    *out = *in;
    if (out->n_ctx == 0) out->n_ctx = model->n_ctx_train;
    KVM_TRY(check_range("n_ctx", out->n_ctx, 1, 1 << 24));
    KVM_TRY(check_range("n_batch", out->n_batch, 1, 4096));
    KVM_TRY(check_range("n_logits", out->n_logits, 1, 4096));
    KVM_TRY(check_range("n_seq_max", out->n_seq_max, 1, 256));
    KVM_TRY(check_range("n_checkpoint", out->n_checkpoint, 0, 64));
    KVM_TRY(check_range("n_threads", out->n_threads, 0, 512));
    KVM_TRY(check_range("balance_page", out->balance_page, -1, 1));
    out->n_logits = kvm_min(out->n_logits, out->n_batch);
    if (out->n_threads == 0) out->n_threads = kvm_pool_default_size();
    if (out->strict && out->n_batch % KVM_PAGE != 0) {
        return kvm_fail(KVMIX_ARG, "strict mode packs whole pages: n_batch %d is not a multiple of %d", out->n_batch, KVM_PAGE);
    }
    return KVMIX_OK;
}

static kvm_backend_options backend_options(const kvmix_session_options *o) {
    return (kvm_backend_options){.n_batch = o->n_batch, .n_logits = o->n_logits, .n_threads = o->n_threads,
                                 .n_ctx = o->n_ctx, .act_f32 = o->act_f32 != 0, .kernels = o->kernels,
                                 .page_hook = o->page_hook, .page_hook_user = o->page_hook_user};
}

static kvmix_status check_backend(const kvm_backend_ops *ops, const kvmix_model *model, const kvm_recipe *recipe) {
    for (int32_t i = 0; i < model->net.n_layer; i++) {
        const kvm_layer *l = &model->layers[i];
        const kvm_matrix *w[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t j = 0; j < sizeof w / sizeof *w; j++) {
            if (ops->can_weight(w[j]->type)) continue;
            return kvm_fail(KVMIX_UNSUPPORTED, "layer %d has weights of type %s, which the %s backend cannot multiply", i,
                            kvm_dtypes[w[j]->type].name, ops->name);
        }
        kvm_kvtype k = (kvm_kvtype)recipe->k[i], v = (kvm_kvtype)recipe->v[i];
        if (ops->can_attend(k, v, l->d_k, l->d_v)) continue;
        return kvm_fail(KVMIX_UNSUPPORTED, "layer %d: the %s backend cannot attend to %s keys of %d and %s values of %d "
                        "channels", i, ops->name, kvm_kvtypes[k].name, l->d_k, kvm_kvtypes[v].name, l->d_v);
    }
    return KVMIX_OK;
}

/* all that needs no large memory: options, recipe, page lists; and what the rest will take */
static kvmix_status prepare(kvmix_session *s, const kvmix_session_options *options, kvmix_memory *memory) {
    KVM_TRY(resolve_options(s->model, options, &s->options));
    KVM_TRY(kvm_recipe_resolve(&s->recipe, &s->model->recipe_keys, s->model->net.n_layer, &s->options));
    kvm_cache_sizes sizes = {.n_ctx = s->options.n_ctx, .n_batch = s->options.n_batch, .n_seq = s->options.n_seq_max,
                             .n_checkpoint = s->options.n_checkpoint, .strict = s->options.strict != 0,
                             .studied = s->options.page_hook != NULL};
    KVM_TRY(kvm_cache_open(&s->cache, &s->model->net, &s->recipe, &sizes)); /* refuses head sizes, with the limits */
    KVM_TRY(check_backend(s->ops, s->model, &s->recipe));
    kvm_cache_bytes bytes = kvm_cache_get_bytes(s->cache);
    kvm_backend_options backend = backend_options(&s->options);
    *memory = (kvmix_memory){.n_ctx = s->options.n_ctx, .n_threads = s->options.n_threads, .kv_bytes = bytes.total_bytes,
                             .workspace_bytes = s->ops->workspace_bytes(&s->model->net, &backend),
                             .bits_full = bytes.bits_full};
    return KVMIX_OK;
}

static kvmix_status check_limit(const kvmix_session *s, const kvmix_memory *m) {
    const double mib = 1024.0 * 1024.0;
    uint64_t limit = s->options.memory_limit;
    if (limit == 0 || m->kv_bytes + m->workspace_bytes <= limit) return KVMIX_OK;
    return kvm_fail(KVMIX_NOMEM, "a context of %d tokens as %s needs %.1f MiB (cache %.1f, workspace %.1f), %.1f MiB are "
                    "free: choose a smaller context (-c) or a recipe with fewer bits (--kv)", m->n_ctx, s->recipe.text,
                    (double)(m->kv_bytes + m->workspace_bytes) / mib, (double)m->kv_bytes / mib,
                    (double)m->workspace_bytes / mib, (double)limit / mib);
}

static kvmix_status new_session(kvmix_session **out, const kvmix_model *model) {
    kvmix_session *s = *out = kvm_alloc_zero(1, sizeof *s);
    if (s == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a session");
    s->model = model;
    s->ops = &kvm_cpu_backend;
    return KVMIX_OK;
}

kvmix_status kvmix_session_plan(const kvmix_model *model, const kvmix_session_options *options, kvmix_memory *out) {
    if (model == NULL || options == NULL || out == NULL) return null_argument("an argument");
    *out = (kvmix_memory){0};
    kvmix_session *s;
    KVM_TRY(new_session(&s, model));
    kvmix_status status = prepare(s, options, out);
    kvmix_session_close(s);
    return status;
}

static kvmix_status open_backend(kvmix_session *s, const kvmix_memory *memory) {
    KVM_TRY(check_limit(s, memory));
    kvm_backend_options options = backend_options(&s->options);
    KVM_TRY(s->ops->open(&s->backend, &s->model->net, kvm_cache_get_layout(s->cache), &options));
    uint64_t workspace;
    s->ops->allocated(s->backend, &s->cache_bytes, &workspace);
    if (s->cache_bytes != memory->kv_bytes || workspace != memory->workspace_bytes) {
        return kvm_fail(KVMIX_STATE, "the %s backend took %llu + %llu bytes where %llu + %llu were predicted; this is a bug",
                        s->ops->name, (unsigned long long)s->cache_bytes, (unsigned long long)workspace,
                        (unsigned long long)memory->kv_bytes, (unsigned long long)memory->workspace_bytes);
    }
    s->rows = kvm_alloc((uint64_t)s->options.n_batch, sizeof *s->rows);
    return s->rows != NULL ? KVMIX_OK : kvm_fail(KVMIX_NOMEM, "no memory for a batch of %d rows", s->options.n_batch);
}

kvmix_status kvmix_session_open(kvmix_session **out, const kvmix_model *model, const kvmix_session_options *options) {
    if (out != NULL) *out = NULL;
    if (out == NULL || model == NULL || options == NULL) return null_argument("an argument");
    kvmix_session *s;
    KVM_TRY(new_session(&s, model));
    kvmix_memory memory;
    kvmix_status status = prepare(s, options, &memory);
    if (status == KVMIX_OK) status = open_backend(s, &memory);
    if (status != KVMIX_OK) {
        kvmix_session_close(s);
        return status;
    }
    *out = s;
    return KVMIX_OK;
}

void kvmix_session_close(kvmix_session *s) {
    if (s == NULL) return;
    s->ops->close(s->backend);
    kvm_cache_close(s->cache);
    free(s->rows);
    free(s->note);
    free(s);
}

/* ---- running ------------------------------------------------------------------------------------------------- */

static kvmix_status check_seq(const kvmix_session *s, int32_t seq) {
    if (s == NULL) return null_argument("session");
    if (seq >= 0 && seq < s->options.n_seq_max) return KVMIX_OK;
    return kvm_fail(KVMIX_ARG, "there is no sequence %d; this session has 0 to %d (n_seq_max)", seq, s->options.n_seq_max - 1);
}

static kvmix_status check_finite(const float *logits, int32_t n_rows, int32_t n_vocab) {
    for (int32_t r = 0; r < n_rows; r++) {
        for (int32_t i = 0; i < n_vocab; i++) {
            if (isfinite(logits[(size_t)r * (size_t)n_vocab + (size_t)i])) continue;
            return kvm_fail(KVMIX_STATE, "the model gave a logit that is not finite (row %d, token %d): the weights may be "
                            "damaged, or their range too wide for this cache; try --kv f16", r, i);
        }
    }
    return KVMIX_OK;
}

kvmix_status kvmix_decode(kvmix_session *s, const kvmix_row *rows, int32_t n_rows) {
    if (s == NULL || rows == NULL) return null_argument(s == NULL ? "session" : "rows");
    s->n_logits = 0;
    KVM_TRY(check_range("n_rows", n_rows, 1, s->options.n_batch));
    int32_t n_wanted = 0;
    for (int32_t i = 0; i < n_rows; i++) {
        KVM_TRY(check_token(s->model, rows[i].token));
        n_wanted += rows[i].want_logits != 0;
    }
    if (n_wanted > s->options.n_logits) {
        return kvm_fail(KVMIX_ARG, "%d rows want logits; the session was opened for %d (n_logits)", n_wanted,
                        s->options.n_logits);
    }
    if (atomic_exchange(&s->cancel, 0)) return kvm_fail(KVMIX_CANCELLED, "cancelled before the batch was run");
    const kvm_plan *plans;
    KVM_TRY(kvm_cache_begin(s->cache, rows, n_rows, &plans));
    kvmix_status status = kvm_engine_forward(s->ops, s->backend, &s->model->net, plans, &s->cancel);
    const float *logits = NULL;
    if (status == KVMIX_OK) status = s->ops->logits(s->backend, &logits);
    if (status == KVMIX_OK) status = check_finite(logits, n_wanted, s->model->net.n_vocab);
    if (status != KVMIX_OK) {
        kvm_cache_abort(s->cache);
        return status;
    }
    kvm_cache_commit(s->cache);
    s->n_logits = n_wanted;
    s->n_evaluated += n_rows;
    return KVMIX_OK;
}

kvmix_status kvmix_logits(const float **out, const kvmix_session *s, int32_t index) {
    if (out != NULL) *out = NULL;
    if (out == NULL || s == NULL) return null_argument("an argument");
    if (index < 0 || index >= s->n_logits) {
        return kvm_fail(KVMIX_STATE, "there are no logits %d; the last decode left %d rows of them", index, s->n_logits);
    }
    KVM_TRY(s->ops->logits(s->backend, out));
    *out += (size_t)index * (size_t)s->model->net.n_vocab;
    return KVMIX_OK;
}

kvmix_status kvmix_truncate(kvmix_session *s, int32_t seq, int32_t n_tokens, int32_t *n_held) {
    KVM_TRY(check_seq(s, seq));
    if (n_held == NULL) return null_argument("n_held");
    *n_held = kvm_cache_length(s->cache, seq);
    KVM_TRY(check_range("n_tokens", n_tokens, 0, 1 << 24));
    kvm_copy_job store;
    kvm_cache_truncate(s->cache, seq, n_tokens, n_held, &store);
    return store.from < 0 ? KVMIX_OK : s->ops->copy_store(s->backend, store.from, store.to);
}

kvmix_status kvmix_fork(kvmix_session *s, int32_t src, int32_t dst) {
    KVM_TRY(check_seq(s, src));
    KVM_TRY(check_seq(s, dst));
    kvm_copy_job store;
    kvm_cache_fork(s->cache, src, dst, &store);
    return store.from < 0 ? KVMIX_OK : s->ops->copy_store(s->backend, store.from, store.to);
}

kvmix_status kvmix_checkpoint(kvmix_session *s, int32_t seq) {
    KVM_TRY(check_seq(s, seq));
    kvm_copy_job store;
    kvm_cache_checkpoint(s->cache, seq, &store);
    return store.from < 0 ? KVMIX_OK : s->ops->copy_store(s->backend, store.from, store.to);
}

kvmix_status kvmix_sync(kvmix_session *s, int32_t seq, const int32_t *tokens, int32_t n_tokens, int32_t *n_held) {
    KVM_TRY(check_seq(s, seq));
    if (n_held == NULL || (tokens == NULL && n_tokens > 0)) return null_argument("an argument");
    *n_held = kvm_cache_length(s->cache, seq);
    if (n_tokens < 0) return kvm_fail(KVMIX_ARG, "n_tokens is %d; it takes 0 and more", n_tokens);
    if (n_tokens > s->options.n_ctx) {
        return kvm_fail(KVMIX_FULL, "%d tokens do not fit the context of %d; shorten the text or open the session with a "
                        "larger context (-c)", n_tokens, s->options.n_ctx);
    }
    for (int32_t i = 0; i < n_tokens; i++) KVM_TRY(check_token(s->model, tokens[i]));
    s->n_logits = 0;
    const int32_t *held = kvm_cache_tokens(s->cache, seq);
    int32_t same = 0, most = kvm_min(*n_held, kvm_max(n_tokens - 1, 0)); /* the last token's logits are wanted */
    while (same < most && held[same] == tokens[same]) same++;
    KVM_TRY(kvmix_truncate(s, seq, same, n_held));
    int32_t n_rows = kvm_min(n_tokens - *n_held, s->options.n_batch);
    for (int32_t i = 0; i < n_rows; i++) {
        int32_t pos = *n_held + i;
        s->rows[i] = (kvmix_row){.token = tokens[pos], .seq = seq, .pos = pos, .want_logits = pos == n_tokens - 1};
    }
    if (n_rows > 0) KVM_TRY(kvmix_decode(s, s->rows, n_rows));
    *n_held += n_rows;
    return KVMIX_OK;
}

int32_t kvmix_length(const kvmix_session *s, int32_t seq) {
    return s == NULL || seq < 0 || seq >= s->options.n_seq_max ? 0 : kvm_cache_length(s->cache, seq);
}

const int32_t *kvmix_tokens(const kvmix_session *s, int32_t seq) {
    return s == NULL || seq < 0 || seq >= s->options.n_seq_max ? NULL : kvm_cache_tokens(s->cache, seq);
}

void kvmix_cancel(kvmix_session *s) {
    if (s != NULL) atomic_store(&s->cancel, 1);
}

kvmix_status kvmix_session_get_stats(const kvmix_session *s, kvmix_stats *out) {
    if (s == NULL || out == NULL) return null_argument("an argument");
    const kvm_cache_layout *layout = kvm_cache_get_layout(s->cache);
    kvm_cache_usage usage = kvm_cache_get_usage(s->cache);
    *out = (kvmix_stats){.recipe = s->recipe.text, .recipe_source = s->recipe.source, .window = layout->window,
                         .sink = layout->sink, .n_ctx = s->options.n_ctx, .n_threads = s->options.n_threads,
                         .n_evaluated = s->n_evaluated, .kv_bytes = s->cache_bytes, .kv_used_bytes = usage.held_bytes,
                         .bits_now = usage.n_values ? 8.0 * (double)usage.read_bytes / (double)usage.n_values : 0,
                         .bits_full = kvm_cache_get_bytes(s->cache).bits_full};
    for (int32_t seq = 0; seq < s->options.n_seq_max; seq++) out->n_tokens += kvm_cache_length(s->cache, seq);
    return KVMIX_OK;
}

kvmix_status kvmix_session_get_layer(const kvmix_session *s, int32_t layer, kvmix_layer_kv *out) {
    if (s == NULL || out == NULL) return null_argument("an argument");
    *out = (kvmix_layer_kv){0};
    KVM_TRY(check_range("layer", layer, 0, s->model->net.n_layer - 1));
    const kvm_cache_layout *layout = kvm_cache_get_layout(s->cache);
    const kvm_layer_layout *l = &layout->layers[layer];
    const kvm_layer *weights = &s->model->layers[layer];
    uint64_t n_f16 = (uint64_t)layout->n_f16[weights->group], n_packed = (uint64_t)layout->n_packed[weights->group];
    *out = (kvmix_layer_kv){.k_type = kvm_kvtypes[l->k_type].name, .v_type = kvm_kvtypes[l->v_type].name,
                            .n_head_kv = weights->n_head_kv, .d_k = weights->d_k, .d_v = weights->d_v,
                            .span = weights->span, .page_bytes = l->packed_bytes,
                            .kv_bytes = n_f16 * l->f16_bytes + n_packed * l->packed_bytes +
                                        (uint64_t)layout->n_store * l->store_bytes};
    return KVMIX_OK;
}

/* ---- saved states -------------------------------------------------------------------------------------------- */

static kvmix_status check_state(const kvmix_session *s, int32_t seq, const char *path, kvm_state_owner *owner) {
    KVM_TRY(check_seq(s, seq));
    if (path == NULL) return null_argument("path");
    if (s->options.strict || s->options.page_hook != NULL) {
        return kvm_fail(KVMIX_UNSUPPORTED, "a session in strict mode or with a page hook is for study: it has no saved states");
    }
    *owner = (kvm_state_owner){.model = s->model, .recipe = &s->recipe, .cache = s->cache, .ops = s->ops,
                               .backend = s->backend};
    return KVMIX_OK;
}

kvmix_status kvmix_save(const kvmix_session *s, int32_t seq, const char *path, const void *note, size_t n_bytes) {
    kvm_state_owner owner;
    KVM_TRY(check_state(s, seq, path, &owner));
    if (note == NULL && n_bytes > 0) return null_argument("note");
    return kvm_state_save(&owner, seq, path, note, n_bytes);
}

kvmix_status kvmix_load(const void **note, kvmix_session *s, int32_t seq, const char *path, size_t *n_bytes) {
    if (note != NULL) *note = NULL;
    if (note == NULL || n_bytes == NULL) return null_argument("an argument");
    *n_bytes = 0;
    kvm_state_owner owner;
    KVM_TRY(check_state(s, seq, path, &owner));
    void *loaded;
    KVM_TRY(kvm_state_load(&owner, seq, path, &loaded, n_bytes));
    free(s->note);
    *note = s->note = loaded;
    return KVMIX_OK;
}

/* ---- sampling ------------------------------------------------------------------------------------------------ */

void kvmix_sampling_defaults(kvmix_sampling *params) {
    if (params == NULL) return;
    *params = (kvmix_sampling){.size = sizeof *params, .temp = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f,
                               .repeat_penalty = 1.0f, .repeat_last_n = 64};
}

kvmix_status kvmix_sampler_open(kvmix_sampler **out, const kvmix_model *model, const kvmix_sampling *params) {
    if (out != NULL) *out = NULL;
    if (out == NULL || model == NULL || params == NULL) return null_argument("an argument");
    if (params->size != sizeof *params) {
        return kvm_fail(KVMIX_ARG, "params.size is %u, not %zu: fill them with kvmix_sampling_defaults of this library",
                        params->size, sizeof *params);
    }
    return kvm_sampler_open(out, model->net.n_vocab, params);
}

void kvmix_sampler_close(kvmix_sampler *sampler) { kvm_sampler_close(sampler); }

kvmix_status kvmix_sampler_accept(kvmix_sampler *sampler, int32_t token) {
    return sampler == NULL ? null_argument("sampler") : kvm_sampler_accept(sampler, token);
}

kvmix_status kvmix_sample(kvmix_sampler *sampler, const float *logits, int32_t *token) {
    if (sampler == NULL || logits == NULL || token == NULL) return null_argument("an argument");
    return kvm_sampler_sample(sampler, logits, token);
}
