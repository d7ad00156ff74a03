/* kvcache.c - page lists, references and plans; the numbered invariants are in kvcache.h. */
#include <stdlib.h>

#include "kvpages.h"

/* ---- opening ------------------------------------------------------------------------------------------------- */

static int32_t align_line(int32_t n) { return kvm_ceil_div(n, KVM_LINE) * KVM_LINE; }

static kvm_layer_layout layer_layout(const kvm_layer *layer, kvm_kvtype k, kvm_kvtype v, int32_t sink, bool balance_page,
                                     bool studied) {
    int32_t dk = layer->d_k, dv = layer->d_v, q_rows = 2 * dk * KVM_PAGE;
    bool balanced = k != KVM_KVTYPE_F16;
    kvm_layer_layout l = {.k_type = k, .v_type = v};
    l.k = kvm_page_layout_of(k, KVM_SIDE_K, dk, balance_page);
    l.v = kvm_page_layout_of(v, KVM_SIDE_V, dv, balance_page);
    l.packed.v = l.k.total;
    l.packed.head_bytes = l.k.total + l.v.total;
    l.f16.v = 2 * dk * KVM_PAGE;
    l.f16.head_bytes = l.f16.v + 2 * dv * KVM_PAGE;
    l.f16.q_rms = studied || (balanced && balance_page) ? l.f16.head_bytes : -1;
    if (l.f16.q_rms >= 0) l.f16.head_bytes += q_rows;
    l.store.sink_v = 2 * dk * sink;
    l.store.head_bytes = l.store.sink_v + 2 * dv * sink;
    l.store.balance = l.store.q_rms = -1;
    if (balanced && !balance_page) {
        l.store.balance = l.store.head_bytes;
        l.store.q_rms = l.store.balance + 2 * dk;
        l.store.head_bytes = align_line(l.store.q_rms + q_rows);
    }
    l.store.head_bytes = align_line(l.store.head_bytes);
    l.f16_bytes = (uint64_t)l.f16.head_bytes * (uint64_t)layer->n_head_kv;
    l.packed_bytes = (uint64_t)l.packed.head_bytes * (uint64_t)layer->n_head_kv;
    l.store_bytes = (uint64_t)l.store.head_bytes * (uint64_t)layer->n_head_kv;
    return l;
}

static bool open_free_list(free_list *list, int32_t n) {
    list->ids = kvm_alloc((uint64_t)kvm_max(n, 1), sizeof *list->ids);
    if (list->ids == NULL) return false;
    for (int32_t i = n - 1; i >= 0; i--) give(list, i);
    return true;
}

/* Pages that the pools of a group need so that one sequence can always fill the context (kvcache.h; design 5.1). */
static void size_group(const kvm_cache *cache, const group *g, int32_t *n_f16, int32_t *n_packed) {
    const kvm_cache_sizes *s = &cache->sizes;
    int32_t all = cache->max_pages + cache->n_slots + 1; /* every token, an open page a holder, one being copied */
    int32_t batch = kvm_ceil_div(s->n_batch, KVM_PAGE) + 2 * s->n_seq - 1; /* new pages; an open page copied for each */
    if (g->span > 0) {
        int32_t held = kvm_ceil_div(g->span, KVM_PAGE) + 3; /* partial pages at both ends and 128 to rewind */
        all = kvm_min(all, cache->n_slots * held + batch);
    }
    if (!g->packs) {
        *n_f16 = all;
        *n_packed = 0;
        return;
    }
    int32_t window = kvm_min(cache->layout.window, s->n_ctx);
    int32_t held = kvm_ceil_div(window, KVM_PAGE) + 2; /* a checkpoint holds no page to rewind into */
    *n_f16 = kvm_min(all, cache->n_slots * held - s->n_checkpoint + batch);
    /* besides the context: a checkpoint may be the last to list the page it ends in, and strict mode packs open pages */
    *n_packed = g->span > 0 ? all : cache->max_pages + s->n_checkpoint + (s->strict ? s->n_seq - 1 : 0);
}

static bool open_group(kvm_cache *cache, int32_t index) {
    group *g = &cache->groups[index];
    const kvm_cache_sizes *s = &cache->sizes;
    int32_t *n_f16 = &cache->n_f16[index], *n_packed = &cache->n_packed[index];
    size_group(cache, g, n_f16, n_packed);
    g->n_page = *n_f16 + *n_packed;
    g->pages = kvm_alloc_zero((uint64_t)g->n_page, sizeof *g->pages);
    g->rows = kvm_alloc((uint64_t)s->n_batch, sizeof *g->rows);
    g->views = kvm_alloc((uint64_t)s->n_seq, sizeof *g->views);
    g->slots = kvm_alloc((uint64_t)s->n_seq * (uint64_t)cache->max_pages, sizeof *g->slots);
    g->packs_list = kvm_alloc((uint64_t)cache->max_packs, sizeof *g->packs_list);
    g->is_new = kvm_alloc((uint64_t)cache->max_packs, sizeof *g->is_new);
    g->copies = kvm_alloc((uint64_t)s->n_seq, sizeof *g->copies);
    return g->pages && g->rows && g->views && g->slots && g->packs_list && g->is_new && g->copies &&
           open_free_list(&g->free_pages, g->n_page) && open_free_list(&g->free_f16, *n_f16) &&
           open_free_list(&g->free_packed, *n_packed);
}

static bool open_sequences(kvm_cache *cache) {
    for (int32_t i = 0; i < cache->n_slots; i++) {
        sequence *seq = &cache->sequences[i];
        seq->owner = -1;
        seq->tokens = kvm_alloc((uint64_t)cache->sizes.n_ctx, sizeof *seq->tokens);
        seq->lists = kvm_alloc_zero((uint64_t)cache->n_group, sizeof *seq->lists);
        if (seq->tokens == NULL || seq->lists == NULL) return false;
        for (int32_t g = 0; g < cache->n_group; g++) {
            seq->lists[g].pages = kvm_alloc((uint64_t)cache->max_pages, sizeof(int32_t));
            if (seq->lists[g].pages == NULL) return false;
        }
    }
    return true;
}

/* layouts of all layers, and what groups need to know of them */
static kvmix_status describe_layers(kvm_cache *cache, const kvm_net *net, const kvm_recipe *recipe) {
    for (int32_t i = 0; i < net->n_layer; i++) {
        const kvm_layer *layer = &net->layers[i];
        int32_t d[2] = {layer->d_k, layer->d_v};
        for (int32_t side = 0; side < 2; side++) {
            if (d[side] < KVM_LANES || d[side] > KVM_HEAD_DIM_MAX || d[side] % KVM_LANES != 0) {
                return kvm_fail(KVMIX_UNSUPPORTED, "layer %d has %s of %d channels; the cache takes multiples of 16 up "
                                "to %d", i, side ? "values" : "keys", d[side], KVM_HEAD_DIM_MAX);
            }
        }
        kvm_kvtype k = (kvm_kvtype)recipe->k[i], v = (kvm_kvtype)recipe->v[i];
        kvm_layer_layout *l = &cache->layers[i];
        *l = layer_layout(layer, k, v, recipe->sink, recipe->balance_page, cache->sizes.studied);
        group *g = &cache->groups[layer->group];
        g->span = layer->span;
        g->packs |= cache->sizes.studied || k != KVM_KVTYPE_F16 || v != KVM_KVTYPE_F16;
        g->f16_value_bytes += 2 * (uint64_t)layer->n_head_kv * (uint64_t)(d[0] + d[1]);
        g->packed_bytes += l->packed_bytes;
        int32_t kept = l->store.q_rms >= 0 ? l->store.q_rms : l->store.head_bytes;
        g->store_bytes += (uint64_t)kept * (uint64_t)layer->n_head_kv;
    }
    return KVMIX_OK;
}

/* bytes that row n of a sequence reads of a group: sinks, balance, packed pages and the f16 window */
static uint64_t read_bytes(const kvm_cache *cache, const group *g, int32_t n, uint64_t *n_values) {
    int32_t first_page = g->span > 0 ? kvm_max(0, n - g->span) / KVM_PAGE : 0;
    int32_t cut = kvm_max(kvm_min(cut_of(cache, g, n) / KVM_PAGE, kvm_ceil_div(n, KVM_PAGE)), first_page);
    *n_values += (uint64_t)(n - first_page * KVM_PAGE) * (g->f16_value_bytes / 2);
    uint64_t bytes = (uint64_t)kvm_max(n - cut * KVM_PAGE, 0) * g->f16_value_bytes;
    return bytes + (uint64_t)(cut - first_page) * g->packed_bytes + (g->packs && cut > 0 ? g->store_bytes : 0);
}

static void count_bytes(kvm_cache *cache, const kvm_net *net) {
    kvm_cache_bytes *b = &cache->bytes;
    for (int32_t i = 0; i < net->n_layer; i++) {
        const kvm_layer_layout *l = &cache->layers[i];
        int32_t g = net->layers[i].group;
        b->total_bytes += l->f16_bytes * (uint64_t)cache->n_f16[g] + l->packed_bytes * (uint64_t)cache->n_packed[g] +
                          l->store_bytes * (uint64_t)cache->n_slots;
    }
    uint64_t used = 0, n_values = 0;
    for (int32_t g = 0; g < cache->n_group; g++) {
        used += read_bytes(cache, &cache->groups[g], cache->sizes.n_ctx, &n_values);
    }
    b->bits_full = n_values ? 8.0 * (double)used / (double)n_values : 0;
}

kvmix_status kvm_cache_open(kvm_cache **out, const kvm_net *net, const kvm_recipe *recipe,
                            const kvm_cache_sizes *sizes) {
    *out = NULL;
    kvm_cache *cache = kvm_alloc_zero(1, sizeof *cache);
    if (cache == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for the cache's lists");
    cache->sizes = *sizes;
    cache->n_slots = sizes->n_seq + sizes->n_checkpoint;
    cache->max_pages = kvm_ceil_div(sizes->n_ctx, KVM_PAGE);
    cache->max_packs = sizes->n_batch / KVM_PAGE + 3 * sizes->n_seq + 1;
    for (int32_t i = 0; i < net->n_layer; i++) cache->n_group = kvm_max(cache->n_group, net->layers[i].group + 1);
    size_t n_group = (size_t)cache->n_group, n_seq = (size_t)sizes->n_seq;
    cache->layers = kvm_alloc_zero((uint64_t)net->n_layer, sizeof *cache->layers);
    cache->n_f16 = kvm_alloc_zero(n_group, sizeof(int32_t));
    cache->n_packed = kvm_alloc_zero(n_group, sizeof(int32_t));
    cache->groups = kvm_alloc_zero(n_group, sizeof *cache->groups);
    cache->plans = kvm_alloc_zero(n_group, sizeof *cache->plans);
    cache->sequences = kvm_alloc_zero((uint64_t)cache->n_slots, sizeof *cache->sequences);
    cache->view_seq = kvm_alloc(n_seq, sizeof(int32_t));
    cache->view_rows = kvm_alloc(n_seq, sizeof(int32_t));
    cache->journal = kvm_alloc(n_seq * n_group, sizeof *cache->journal);
    kvmix_status status = KVMIX_NOMEM;
    if (!cache->layers || !cache->n_f16 || !cache->n_packed || !cache->groups || !cache->plans || !cache->sequences ||
        !cache->view_seq || !cache->view_rows || !cache->journal) {
        goto fail;
    }
    cache->layout = (kvm_cache_layout){
        .window = sizes->strict ? 0 : recipe->window, .sink = recipe->sink, .balance_page = recipe->balance_page,
        .n_layer = net->n_layer, .n_group = cache->n_group, .layers = cache->layers, .n_f16 = cache->n_f16,
        .n_packed = cache->n_packed, .n_store = cache->n_slots};
    status = describe_layers(cache, net, recipe);
    if (status != KVMIX_OK) goto fail_told;
    status = KVMIX_NOMEM;
    for (int32_t g = 0; g < cache->n_group; g++) {
        if (!open_group(cache, g)) goto fail;
    }
    if (!open_sequences(cache)) goto fail;
    count_bytes(cache, net);
    *out = cache;
    return KVMIX_OK;
fail:
    kvm_fail(KVMIX_NOMEM, "no memory for the page lists of %d tokens", sizes->n_ctx);
fail_told:
    kvm_cache_close(cache);
    return status;
}

void kvm_cache_close(kvm_cache *cache) {
    if (cache == NULL) return;
    for (int32_t i = 0; cache->groups != NULL && i < cache->n_group; i++) {
        group *g = &cache->groups[i];
        void *parts[] = {g->pages, g->rows, g->views, g->slots, g->packs_list, g->is_new, g->copies,
                         g->free_pages.ids, g->free_f16.ids, g->free_packed.ids};
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) free(parts[p]);
    }
    for (int32_t i = 0; cache->sequences != NULL && i < cache->n_slots; i++) {
        sequence *seq = &cache->sequences[i];
        for (int32_t g = 0; seq->lists != NULL && g < cache->n_group; g++) free(seq->lists[g].pages);
        free(seq->lists);
        free(seq->tokens);
    }
    void *parts[] = {cache->layers, cache->n_f16, cache->n_packed, cache->groups, cache->plans, cache->sequences,
                     cache->view_seq, cache->view_rows, cache->journal};
    for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) free(parts[p]);
    free(cache);
}

const kvm_cache_sizes *kvm_cache_get_sizes(const kvm_cache *cache) { return &cache->sizes; }
const kvm_cache_layout *kvm_cache_get_layout(const kvm_cache *cache) { return &cache->layout; }
kvm_cache_bytes kvm_cache_get_bytes(const kvm_cache *cache) { return cache->bytes; }
int32_t kvm_cache_length(const kvm_cache *cache, int32_t seq) { return cache->sequences[seq].length; }
const int32_t *kvm_cache_tokens(const kvm_cache *cache, int32_t seq) { return cache->sequences[seq].tokens; }

/* bytes that the next row of a sequence would read of a group, and values: each page once, whoever reads it too */
static void count_reads(const kvm_cache *cache, int32_t g_index, const sequence *seq, kvm_cache_usage *out) {
    group *g = &cache->groups[g_index];
    const page_list *list = &seq->lists[g_index];
    int32_t cut = cut_of(cache, g, seq->length) / KVM_PAGE;
    for (int32_t p = list->first_page; p < list->n_pages; p++) {
        page *it = &g->pages[list->pages[p]];
        if (!it->counted_f16 && !it->counted_packed) out->n_values += (uint64_t)it->fill * (g->f16_value_bytes / 2);
        bool packed = p < cut && it->packed >= 0;
        bool *counted = packed ? &it->counted_packed : &it->counted_f16;
        if (!*counted) out->read_bytes += packed ? g->packed_bytes : (uint64_t)it->fill * g->f16_value_bytes;
        *counted = true;
    }
    if (cut > 0 && seq->frozen) out->read_bytes += g->store_bytes;
}

kvm_cache_usage kvm_cache_get_usage(kvm_cache *cache) {
    kvm_cache_usage out = {0};
    for (int32_t i = 0; i < cache->n_group; i++) {
        group *g = &cache->groups[i];
        for (int32_t p = 0; p < g->n_page; p++) {
            page *it = &g->pages[p];
            it->counted_f16 = it->counted_packed = false;
            if (it->refs == 0) continue;
            if (it->f16 >= 0) out.held_bytes += (uint64_t)it->fill * g->f16_value_bytes;
            if (it->packed >= 0) out.held_bytes += g->packed_bytes;
        }
        for (int32_t s = 0; s < cache->n_slots; s++) {
            const sequence *seq = &cache->sequences[s];
            if (g->packs && seq->frozen) out.held_bytes += g->store_bytes;
            if (s < cache->sizes.n_seq) count_reads(cache, i, seq, &out);
        }
    }
    return out;
}

/* ---- planning ------------------------------------------------------------------------------------------------ */

/* groups the rows by sequence: views in order of first appearance */
static kvmix_status find_views(kvm_cache *cache, const kvmix_row *rows, int32_t n_rows) {
    cache->n_views = 0;
    for (int32_t i = 0; i < n_rows; i++) {
        int32_t seq = rows[i].seq, v = 0;
        if (seq < 0 || seq >= cache->sizes.n_seq) {
            return kvm_fail(KVMIX_ARG, "row %d names sequence %d; this session has 0 to %d", i, seq,
                            cache->sizes.n_seq - 1);
        }
        while (v < cache->n_views && cache->view_seq[v] != seq) v++;
        if (v == cache->n_views) {
            cache->view_seq[cache->n_views++] = seq;
            cache->view_rows[v] = 0;
        }
        int32_t pos = cache->sequences[seq].length + cache->view_rows[v]++;
        if (rows[i].pos != pos) {
            return kvm_fail(KVMIX_ARG, "row %d of sequence %d has position %d; the next one is %d", i, seq,
                            rows[i].pos, pos);
        }
        if (pos >= cache->sizes.n_ctx) {
            return kvm_fail(KVMIX_FULL, "the context is full: sequence %d needs position %d of %d; shorten it or open "
                            "the session with a larger context (-c)", seq, pos + 1, cache->sizes.n_ctx);
        }
    }
    return KVMIX_OK;
}

static kvmix_status pool_full(const kvm_cache *cache, int32_t g, const char *kind, int32_t n) {
    return kvm_fail(KVMIX_FULL, "the %s page pool of layer group %d is full (%d pages of 128 tokens for %d sequences); "
                    "drop a sequence or open the session with a larger context (-c)", kind, g, n, cache->sizes.n_seq);
}

/* Makes the sequence's pages ready to take rows up to length + n - 1 (invariant 4). */
static kvmix_status extend(kvm_cache *cache, int32_t view, int32_t g_index) {
    group *g = &cache->groups[g_index];
    sequence *seq = &cache->sequences[cache->view_seq[view]];
    page_list *list = &seq->lists[g_index];
    journal_entry *entry = &cache->journal[view * cache->n_group + g_index];
    *entry = (journal_entry){.old_n_pages = list->n_pages, .replaced = -1};
    int32_t end = seq->length + cache->view_rows[view], used = seq->length % KVM_PAGE;
    if (used > 0) {
        int32_t *open = &list->pages[list->n_pages - 1];
        page *p = &g->pages[*open];
        entry->old_fill = p->fill;
        if (p->fill > used && p->refs > 1) {
            int32_t copy = new_page(g, used);
            if (copy < 0) return pool_full(cache, g_index, "f16", cache->n_f16[g_index]);
            g->copies[g->plan.n_copies++] = (kvm_copy_job){.from = p->f16, .to = g->pages[copy].f16};
            entry->replaced = *open;
            *open = copy;
        } else if (p->fill > used) {
            drop_packed(g, p);
        }
        g->pages[*open].fill = kvm_min(KVM_PAGE, used + cache->view_rows[view]);
    }
    for (int32_t p = list->n_pages; p < kvm_ceil_div(end, KVM_PAGE); p++) {
        int32_t id = new_page(g, kvm_min(KVM_PAGE, end - p * KVM_PAGE));
        if (id < 0) return pool_full(cache, g_index, "f16", cache->n_f16[g_index]);
        list->pages[list->n_pages++] = id;
    }
    return KVMIX_OK;
}

/* Packs every page that the last row's cut has passed (invariants 5 and 9). */
static kvmix_status plan_packs(kvm_cache *cache, int32_t view, int32_t g_index) {
    group *g = &cache->groups[g_index];
    const sequence *seq = &cache->sequences[cache->view_seq[view]];
    const page_list *list = &seq->lists[g_index];
    int32_t end = seq->length + cache->view_rows[view], cut = cut_of(cache, g, end - 1) / KVM_PAGE;
    for (int32_t p = kvm_max(list->f16_from, list->first_page); p < cut; p++) {
        page *it = &g->pages[list->pages[p]];
        bool again = cache->sizes.strict && end > p * KVM_PAGE && seq->length < (p + 1) * KVM_PAGE;
        bool is_new = it->packed < 0;
        if (!is_new && !again && (p > 0 || seq->frozen)) continue;
        if (is_new) it->packed = take(&g->free_packed);
        if (it->packed < 0) return pool_full(cache, g_index, "packed", cache->n_packed[g_index]);
        int32_t n_valid = kvm_min(KVM_PAGE, end - p * KVM_PAGE);
        int32_t first = p == 0 ? kvm_min(cache->layout.sink, n_valid) : 0;
        g->is_new[g->plan.n_packs] = is_new;
        g->packs_list[g->plan.n_packs++] = (kvm_pack_job){.view = view, .page = p, .first = first, .n_valid = n_valid,
                                                          .store_only = !is_new && !again};
    }
    return KVMIX_OK;
}

static void plan_view(kvm_cache *cache, int32_t view, int32_t g_index) {
    group *g = &cache->groups[g_index];
    int32_t slot = cache->view_seq[view];
    const page_list *list = &cache->sequences[slot].lists[g_index];
    kvm_page_slots *slots = g->slots + (size_t)view * (size_t)cache->max_pages;
    for (int32_t p = 0; p < list->n_pages; p++) {
        slots[p] = (kvm_page_slots){.f16 = -1, .packed = -1};
        if (p < list->first_page) continue;
        const page *it = &g->pages[list->pages[p]];
        slots[p] = (kvm_page_slots){.f16 = p >= list->f16_from ? it->f16 : -1, .packed = it->packed};
    }
    g->views[view] = (kvm_view){.store = slot, .n_pages = list->n_pages, .pages = slots};
}

static void plan_rows(kvm_cache *cache, const kvmix_row *rows, int32_t n_rows, group *g) {
    int32_t n = 0;
    for (int32_t view = 0; view < cache->n_views; view++) {
        int32_t n_wanted = 0;
        for (int32_t i = 0; i < n_rows; i++) {
            int32_t logits = rows[i].want_logits ? n_wanted++ : -1, pos = rows[i].pos;
            if (rows[i].seq != cache->view_seq[view]) continue;
            g->rows[n++] = (kvm_plan_row){.token = rows[i].token, .pos = pos, .view = view,
                                          .cut = cut_of(cache, g, pos), .first = first_visible(g, pos),
                                          .logits = logits};
        }
    }
}

kvmix_status kvm_cache_begin(kvm_cache *cache, const kvmix_row *rows, int32_t n_rows, const kvm_plan **plans) {
    *plans = NULL;
    KVM_TRY(find_views(cache, rows, n_rows));
    kvmix_status status = KVMIX_OK;
    for (int32_t i = 0; i < cache->n_views * cache->n_group; i++) cache->journal[i].old_n_pages = -1;
    for (int32_t i = 0; i < cache->n_group && status == KVMIX_OK; i++) {
        group *g = &cache->groups[i];
        g->plan = (kvm_plan){.n_rows = n_rows, .n_views = cache->n_views, .rows = g->rows, .views = g->views,
                             .packs = g->packs_list, .copies = g->copies};
        for (int32_t view = 0; view < cache->n_views && status == KVMIX_OK; view++) {
            status = extend(cache, view, i);
            if (status == KVMIX_OK) status = plan_packs(cache, view, i);
            if (status == KVMIX_OK) plan_view(cache, view, i);
        }
        plan_rows(cache, rows, n_rows, g);
        cache->plans[i] = g->plan;
    }
    if (status != KVMIX_OK) {
        kvm_cache_abort(cache);
        return status;
    }
    *plans = cache->plans;
    return KVMIX_OK;
}

/* releases what a sequence of this length needs no more, in f16 (invariant 3) and, in a sliding group, at all */
static void retire(kvm_cache *cache, group *g, page_list *list, int32_t length) {
    int32_t keep_f16 = kvm_min(f16_needed_from(cache, g, length), list->n_pages);
    for (; list->f16_from < keep_f16; list->f16_from++) {
        if (list->f16_from >= list->first_page) release_f16(g, &g->pages[list->pages[list->f16_from]]);
    }
    int32_t first_row = length - KVM_PAGE; /* the earliest that can be evaluated again */
    while (g->span > 0 && KVM_PAGE * (list->first_page + 1) <= first_row - g->span + 1) {
        release(g, list->pages[list->first_page], list->first_page >= list->f16_from);
        list->first_page++;
    }
    list->f16_from = kvm_max(list->f16_from, list->first_page);
}

void kvm_cache_commit(kvm_cache *cache) {
    for (int32_t view = 0; view < cache->n_views; view++) {
        sequence *seq = &cache->sequences[cache->view_seq[view]];
        const group *first = &cache->groups[0];
        for (int32_t i = 0; i < first->plan.n_rows; i++) {
            if (first->rows[i].view == view) seq->tokens[first->rows[i].pos] = first->rows[i].token;
        }
        seq->length += cache->view_rows[view];
        for (int32_t g = 0; g < cache->n_group; g++) {
            seq->frozen |= cut_of(cache, &cache->groups[g], seq->length - 1) > 0;
            const journal_entry *entry = &cache->journal[view * cache->n_group + g];
            if (entry->replaced >= 0) release(&cache->groups[g], entry->replaced, true);
            retire(cache, &cache->groups[g], &seq->lists[g], seq->length);
        }
    }
    cache->n_views = 0;
}

void kvm_cache_abort(kvm_cache *cache) {
    for (int32_t view = 0; view < cache->n_views; view++) {
        sequence *seq = &cache->sequences[cache->view_seq[view]];
        for (int32_t i = 0; i < cache->n_group; i++) {
            group *g = &cache->groups[i];
            page_list *list = &seq->lists[i];
            const journal_entry *entry = &cache->journal[view * cache->n_group + i];
            if (entry->old_n_pages < 0) continue;
            for (int32_t j = 0; j < g->plan.n_packs; j++) { /* half-packed for all we know */
                const kvm_pack_job *job = &g->packs_list[j];
                if (job->view == view && g->is_new[j]) drop_packed(g, &g->pages[list->pages[job->page]]);
            }
            cut_list(g, list, entry->old_n_pages);
            if (seq->length % KVM_PAGE == 0) continue;
            int32_t *open = &list->pages[list->n_pages - 1];
            if (entry->replaced >= 0) {
                release(g, *open, true);
                *open = entry->replaced;
            } else {
                g->pages[*open].fill = entry->old_fill;
            }
        }
    }
    cache->n_views = 0;
}

/* ---- sequences ----------------------------------------------------------------------------------------------- */

/* dst, empty, becomes a copy of src that shares its pages; with `least` only the f16 forms that a next row reads */
static void share(kvm_cache *cache, const sequence *src, sequence *dst, bool least) {
    dst->length = src->length;
    dst->frozen = src->frozen;
    memcpy(dst->tokens, src->tokens, (size_t)src->length * sizeof *src->tokens);
    for (int32_t i = 0; i < cache->n_group; i++) {
        group *g = &cache->groups[i];
        const page_list *from = &src->lists[i];
        page_list *to = &dst->lists[i];
        to->first_page = from->first_page;
        to->n_pages = from->n_pages;
        to->f16_from = from->f16_from;
        int32_t cut = g->packs && src->frozen ? kvm_max(0, src->length - cache->layout.window) / KVM_PAGE : 0;
        while (least && to->f16_from < cut && g->pages[from->pages[to->f16_from]].packed >= 0) to->f16_from++;
        for (int32_t p = from->first_page; p < from->n_pages; p++) {
            page *it = &g->pages[to->pages[p] = from->pages[p]];
            it->refs++;
            if (p >= to->f16_from) it->f16_refs++;
        }
    }
}

static bool is_exact(const kvm_cache *cache, const sequence *seq, int32_t n_tokens) {
    for (int32_t g = 0; g < cache->n_group; g++) {
        if (!list_is_exact(cache, &cache->groups[g], &seq->lists[g], n_tokens)) return false;
    }
    return true;
}

void kvm_cache_truncate(kvm_cache *cache, int32_t seq_index, int32_t n_tokens, int32_t *n_held, kvm_copy_job *store) {
    sequence *seq = &cache->sequences[seq_index];
    *store = (kvm_copy_job){.from = -1, .to = -1};
    if (n_tokens < seq->length) {
        drop_checkpoints(cache, seq_index, n_tokens);
        if (n_tokens == 0 || is_exact(cache, seq, n_tokens)) {
            shorten(cache, seq, n_tokens);
        } else {
            const sequence *best = NULL;
            for (int32_t i = cache->sizes.n_seq; i < cache->n_slots; i++) {
                const sequence *checkpoint = &cache->sequences[i];
                if (checkpoint->owner == seq_index && (best == NULL || checkpoint->length > best->length)) {
                    best = checkpoint;
                }
            }
            shorten(cache, seq, 0);
            if (best != NULL) {
                share(cache, best, seq, false);
                *store = (kvm_copy_job){.from = slot_of(cache, best), .to = seq_index};
            }
        }
    }
    *n_held = seq->length;
}

void kvm_cache_fork(kvm_cache *cache, int32_t src, int32_t dst, kvm_copy_job *store) {
    *store = (kvm_copy_job){.from = -1, .to = -1};
    if (src == dst) return;
    drop_checkpoints(cache, dst, -1);
    shorten(cache, &cache->sequences[dst], 0);
    share(cache, &cache->sequences[src], &cache->sequences[dst], false);
    *store = (kvm_copy_job){.from = src, .to = dst};
}

void kvm_cache_checkpoint(kvm_cache *cache, int32_t seq, kvm_copy_job *store) {
    *store = (kvm_copy_job){.from = -1, .to = -1};
    if (cache->sizes.n_checkpoint == 0 || cache->sequences[seq].length == 0) return;
    for (int32_t i = cache->sizes.n_seq; i < cache->n_slots; i++) { /* one of the same length would be the same */
        const sequence *it = &cache->sequences[i];
        if (it->owner == seq && it->length == cache->sequences[seq].length) return;
    }
    sequence *slot = new_checkpoint(cache, seq);
    share(cache, &cache->sequences[seq], slot, true);
    *store = (kvm_copy_job){.from = seq, .to = slot_of(cache, slot)};
}
