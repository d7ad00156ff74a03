/* pack.c - the stage `pack`: f16 pages -> the recipe's types, sinks and frozen balance to the store (kvtype.h 2-4). */
#include "cpu.h"

typedef struct {
    kvm_backend *b;
    int32_t layer, page0; /* page0: 1 = only first pages, which set the balance of the others; 0 = only the others */
    const kvm_plan *plan;
} pack_context;

/* the sinks: rows 0..n-1 of the page -> store K [d_k][sink], V [sink][d_v] */
static void keep_sinks(const pack_context *c, const uint16_t *k, const uint16_t *v, int32_t n, uint8_t *store) {
    const kvm_layer *layer = &c->b->net->layers[c->layer];
    const kvm_layer_layout *l = &c->b->cache->layers[c->layer];
    int32_t sink = c->b->cache->sink;
    uint16_t *sink_k = kvm_cpu_half(store), *sink_v = kvm_cpu_half(store + l->store.sink_v);
    for (int32_t i = 0; i < layer->d_k; i++) memcpy(sink_k + i * sink, k + i * KVM_PAGE, (size_t)n * 2);
    memcpy(sink_v, v, (size_t)(n * layer->d_v) * 2);
}

/* s->k [d][128] -> codes, scales of one side */
static void write_side(const kvm_cpu_kernels *kernels, kvm_side side, kvm_kvtype type, int32_t d,
                       const kvm_page_layout *layout, kvm_cpu_scratch *s, uint8_t *out) {
    kernels->encode(type, side, s->k, d, s->codes, kvm_cpu_half(out + layout->scales));
    kvm_planes_pack(type, side, s->codes, d, out);
}

static void pack_k(const pack_context *c, const kvm_pack_job *job, uint8_t *f16, uint8_t *store, kvm_cpu_scratch *s,
                   uint8_t *out) {
    const kvm_layer_layout *l = &c->b->cache->layers[c->layer];
    int32_t d = c->b->net->layers[c->layer].d_k;
    if (l->k_type == KVM_KVTYPE_F16) {
        if (!job->store_only && c->b->options.page_hook == NULL) memcpy(out, f16, (size_t)l->k.total);
        return;
    }
    c->b->kernels->load_f16(kvm_cpu_half(f16), d * KVM_PAGE, s->k);
    uint16_t balance[KVM_HEAD_DIM_MAX], own_mean[KVM_HEAD_DIM_MAX];
    uint16_t *mean = job->store_only ? own_mean : kvm_cpu_half(out + l->k.mean);
    if (l->k.balance >= 0) {
        if (job->store_only) return; /* every page has its balance */
        kvm_precondition_k(s->k, d, job->first, job->n_valid, kvm_cpu_half(f16 + l->f16.q_rms), NULL, mean,
                           kvm_cpu_half(out + l->k.balance));
    } else if (job->page == 0) {
        kvm_precondition_k(s->k, d, job->first, job->n_valid, kvm_cpu_half(store + l->store.q_rms), NULL, mean, balance);
        memcpy(store + l->store.balance, balance, (size_t)d * 2);
    } else {
        kvm_precondition_k(s->k, d, job->first, job->n_valid, NULL, kvm_cpu_half(store + l->store.balance), mean,
                           balance);
    }
    if (!job->store_only) write_side(c->b->kernels, KVM_SIDE_K, l->k_type, d, &l->k, s, out);
}

static void pack_v(const pack_context *c, const kvm_pack_job *job, uint8_t *f16, kvm_cpu_scratch *s, uint8_t *out) {
    const kvm_layer_layout *l = &c->b->cache->layers[c->layer];
    int32_t d = c->b->net->layers[c->layer].d_v;
    const uint16_t *v = kvm_cpu_half(f16 + l->f16.v);
    if (l->v_type == KVM_KVTYPE_F16) {
        if (c->b->options.page_hook == NULL) memcpy(out, v, (size_t)l->v.total);
        return;
    }
    c->b->kernels->load_f16(v, d * KVM_PAGE, s->v);
    for (int32_t p = 0; p < KVM_PAGE; p++) { /* [128][d] -> [d][128], nothing outside [first, n_valid) */
        bool inside = p >= job->first && p < job->n_valid;
        for (int32_t i = 0; i < d; i++) s->k[i * KVM_PAGE + p] = inside ? s->v[p * d + i] : 0.0f;
    }
    c->b->kernels->hadamard(s->k, d, KVM_PAGE, kvm_hadamard_block(d, KVM_SIDE_V));
    write_side(c->b->kernels, KVM_SIDE_V, l->v_type, d, &l->v, s, out);
}

/* Shows one head of a page to the session's hook; what it leaves of a side of type f16 is that side's packed form. */
static kvmix_status show_page(kvm_backend *b, int32_t layer_index, const kvm_plan *plan, const kvm_pack_job *job,
                              int32_t head) {
    const kvm_layer *layer = &b->net->layers[layer_index];
    const kvm_layer_layout *l = &b->cache->layers[layer_index];
    const kvm_view *view = &plan->views[job->view];
    uint8_t *f16 = kvm_cpu_f16_page(b, layer_index, view->pages[job->page].f16, head);
    uint8_t *packed = kvm_cpu_packed_page(b, layer_index, view->pages[job->page].packed, head);
    kvm_cpu_scratch *s = &b->scratch[0];
    kvmix_page page = {.layer = layer_index, .head = head, .page = job->page, .first = job->first,
                       .n_valid = job->n_valid, .d_k = layer->d_k, .d_v = layer->d_v, .k = s->k, .v = s->v,
                       .q_rms = s->q_rms};
    int32_t n_k = layer->d_k * KVM_PAGE, n_v = layer->d_v * KVM_PAGE;
    b->kernels->load_f16(kvm_cpu_half(f16), n_k, s->k);
    b->kernels->load_f16(kvm_cpu_half(f16 + l->f16.v), n_v, s->v);
    b->kernels->load_f16(kvm_cpu_half(f16 + l->f16.q_rms), n_k, s->q_rms);
    if (b->options.page_hook(b->options.page_hook_user, &page) != 0) {
        return kvm_fail(KVMIX_CANCELLED, "the page hook stopped in layer %d, page %d", layer_index, job->page);
    }
    uint16_t *k = kvm_cpu_half(packed), *v = kvm_cpu_half(packed + l->packed.v);
    for (int32_t i = 0; i < n_k && l->k_type == KVM_KVTYPE_F16; i++) k[i] = kvm_f16_sat(s->k[i]);
    for (int32_t i = 0; i < n_v && l->v_type == KVM_KVTYPE_F16; i++) v[i] = kvm_f16_sat(s->v[i]);
    return KVMIX_OK;
}

static void pack_item(void *context, int32_t item, int32_t thread) {
    const pack_context *c = context;
    kvm_backend *b = c->b;
    const kvm_layer_layout *l = &b->cache->layers[c->layer];
    int32_t n_head_kv = b->net->layers[c->layer].n_head_kv, head = item % n_head_kv;
    const kvm_pack_job *job = &c->plan->packs[item / n_head_kv];
    if ((job->page == 0) != c->page0) return;
    const kvm_view *view = &c->plan->views[job->view];
    kvm_cpu_scratch *s = &b->scratch[thread];
    uint8_t *f16 = kvm_cpu_f16_page(b, c->layer, view->pages[job->page].f16, head);
    uint8_t *packed = kvm_cpu_packed_page(b, c->layer, view->pages[job->page].packed, head);
    uint8_t *store = kvm_cpu_store(b, c->layer, view->store, head);
    if (job->page == 0) keep_sinks(c, kvm_cpu_half(f16), kvm_cpu_half(f16 + l->f16.v), job->first, store);
    pack_k(c, job, f16, store, s, packed);
    if (!job->store_only) pack_v(c, job, f16, s, packed + l->packed.v);
}

kvmix_status kvm_cpu_pack(kvm_backend *b, int32_t layer, const kvm_plan *plan) {
    int32_t n_head_kv = b->net->layers[layer].n_head_kv, n_items = plan->n_packs * n_head_kv;
    for (int32_t i = 0; b->options.page_hook != NULL && i < n_items; i++) {
        const kvm_pack_job *job = &plan->packs[i / n_head_kv];
        if (!job->store_only) KVM_TRY(show_page(b, layer, plan, job, i % n_head_kv));
    }
    pack_context c = {.b = b, .layer = layer, .page0 = 1, .plan = plan};
    kvm_pool_run(b->pool, n_items, pack_item, &c);
    c.page0 = 0;
    kvm_pool_run(b->pool, n_items, pack_item, &c);
    return KVMIX_OK;
}
