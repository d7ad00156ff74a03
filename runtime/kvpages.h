/* kvpages.h - the structures of a cache and what keeps invariants 1, 2, 3 and 7 of kvcache.h; for kvcache.c and
 * kvimage.c alone. */
#ifndef KVM_KVPAGES_H
#define KVM_KVPAGES_H

#include "kvcache.h"

typedef struct {
    int32_t f16, packed; /* slots, -1 = none */
    int32_t fill, refs, f16_refs;
    bool counted_f16, counted_packed; /* by kvm_cache_usage */
    int32_t own_refs, own_f16_refs;   /* of them, those of the sequence that kvm_image_adopt replaces */
} page;

typedef struct {
    int32_t *ids; /* the free ones, a stack */
    int32_t n;
} free_list;

typedef struct {
    int32_t span;
    bool packs;            /* some layer has a quantized side */
    int32_t n_page;
    page *pages;           /* [n_page] */
    free_list free_pages, free_f16, free_packed;
    uint64_t f16_value_bytes; /* of one token */
    uint64_t packed_bytes, store_bytes; /* of a page; of sinks and balance of a sequence */
    kvm_plan plan;
    kvm_plan_row *rows;    /* [n_batch] */
    kvm_view *views;       /* [n_seq] */
    kvm_page_slots *slots; /* [n_seq][max_pages], behind the views */
    kvm_pack_job *packs_list; /* [max_packs] */
    bool *is_new;          /* [max_packs]: the job's packed slot was taken for it */
    kvm_copy_job *copies;  /* [n_seq] */
} group;

typedef struct {
    int32_t *pages; /* [max_pages] page ids, valid from first_page to n_pages - 1 */
    int32_t first_page, n_pages, f16_from;
} page_list;

typedef struct {
    int32_t length;
    bool frozen;       /* its store has the sinks and the balance of page 0 (invariant 9) */
    int32_t owner;     /* of a checkpoint: its sequence, -1 while free */
    uint64_t stamp;    /* of a checkpoint: when it was taken */
    int32_t *tokens;   /* [n_ctx] */
    page_list *lists;  /* [n_group] */
} sequence;

typedef struct { /* what begin() did to one sequence in one group */
    int32_t old_n_pages, old_fill, replaced; /* replaced: page id of the open page that was copied, -1 = none */
} journal_entry;

struct kvm_cache {
    kvm_cache_sizes sizes;
    int32_t n_slots, max_pages, n_group, max_packs;
    kvm_cache_layout layout;
    kvm_layer_layout *layers; /* [n_layer] */
    int32_t *n_f16, *n_packed; /* [n_group] */
    group *groups;
    sequence *sequences; /* [n_slots] */
    uint64_t next_stamp;
    kvm_cache_bytes bytes;

    /* the batch between begin and commit */
    int32_t n_views;
    int32_t *view_seq, *view_rows;  /* [n_seq] sequence and number of rows of each view */
    journal_entry *journal;         /* [n_seq][n_group] */
    kvm_plan *plans;                /* [n_group] */
};

/* ---- pages --------------------------------------------------------------------------------------------------- */

static inline int32_t take(free_list *list) { return list->n > 0 ? list->ids[--list->n] : -1; }
static inline void give(free_list *list, int32_t id) { list->ids[list->n++] = id; }

static inline void drop_packed(group *g, page *p) {
    if (p->packed >= 0) give(&g->free_packed, p->packed);
    p->packed = -1;
}

static inline void release_f16(group *g, page *p) {
    if (--p->f16_refs > 0) return;
    give(&g->free_f16, p->f16);
    p->f16 = -1;
}

static inline void release(group *g, int32_t id, bool holds_f16) {
    page *p = &g->pages[id];
    if (holds_f16) release_f16(g, p);
    if (--p->refs > 0) return;
    drop_packed(g, p);
    give(&g->free_pages, id);
}

/* a new page with an f16 slot, held once; -1 when there is none */
static inline int32_t new_page(group *g, int32_t fill) {
    int32_t slot = take(&g->free_f16);
    if (slot < 0) return -1;
    int32_t id = take(&g->free_pages); /* there are as many pages as slots of both kinds */
    g->pages[id] = (page){.f16 = slot, .packed = -1, .fill = fill, .refs = 1, .f16_refs = 1};
    return id;
}

static inline void cut_list(group *g, page_list *list, int32_t n_pages) {
    for (int32_t p = n_pages; p < list->n_pages; p++) {
        if (p >= list->first_page) release(g, list->pages[p], p >= list->f16_from);
    }
    list->n_pages = kvm_min(list->n_pages, n_pages);
    list->first_page = kvm_min(list->first_page, list->n_pages);
    list->f16_from = kvm_min(list->f16_from, list->n_pages);
}

/* ---- sequences ----------------------------------------------------------------------------------------------- */

static inline int32_t cut_of(const kvm_cache *cache, const group *g, int32_t pos) {
    if (!g->packs) return 0;
    if (cache->sizes.strict) return KVM_PAGE * (pos / KVM_PAGE + 1);
    return kvm_max(0, pos - cache->layout.window) / KVM_PAGE * KVM_PAGE;
}

static inline int32_t first_visible(const group *g, int32_t pos) { return g->span ? kvm_max(0, pos - g->span + 1) : 0; }

/* invariant 3: the first page whose f16 form a sequence of this length must hold */
static inline int32_t f16_needed_from(const kvm_cache *cache, const group *g, int32_t length) {
    if (!g->packs) return 0;
    int32_t cut = kvm_max(0, length - cache->layout.window) / KVM_PAGE;
    return kvm_max(0, cut - 1);
}

static inline int32_t slot_of(const kvm_cache *cache, const sequence *seq) { return (int32_t)(seq - cache->sequences); }

static inline void shorten(kvm_cache *cache, sequence *seq, int32_t n_tokens) {
    for (int32_t g = 0; g < cache->n_group; g++) {
        cut_list(&cache->groups[g], &seq->lists[g], kvm_ceil_div(n_tokens, KVM_PAGE));
        if (n_tokens == 0) seq->lists[g].first_page = seq->lists[g].f16_from = 0;
    }
    seq->length = n_tokens;
    seq->frozen &= n_tokens >= KVM_PAGE;
}

/* invariant 7 */
static inline void drop_checkpoints(kvm_cache *cache, int32_t seq, int32_t longer_than) {
    for (int32_t i = cache->sizes.n_seq; i < cache->n_slots; i++) {
        sequence *checkpoint = &cache->sequences[i];
        if (checkpoint->owner != seq || checkpoint->length <= longer_than) continue;
        shorten(cache, checkpoint, 0);
        checkpoint->owner = -1;
    }
}

/* an empty checkpoint of the sequence: a free one, else the oldest */
static inline sequence *new_checkpoint(kvm_cache *cache, int32_t owner) {
    sequence *slot = NULL;
    for (int32_t i = cache->sizes.n_seq; i < cache->n_slots; i++) {
        sequence *it = &cache->sequences[i];
        bool better = slot == NULL || (it->owner < 0 && slot->owner >= 0) ||
                      ((it->owner < 0) == (slot->owner < 0) && it->stamp < slot->stamp);
        if (better) slot = it;
    }
    shorten(cache, slot, 0);
    slot->owner = owner;
    slot->stamp = ++cache->next_stamp;
    return slot;
}

/* can a sequence with this list be n_tokens long, all that its next row reads still there? */
static inline bool list_is_exact(const kvm_cache *cache, const group *g, const page_list *list, int32_t n_tokens) {
    int32_t cut = g->packs ? kvm_max(0, n_tokens - cache->layout.window) / KVM_PAGE : 0;
    return list->f16_from <= kvm_max(cut, list->first_page) && list->first_page * KVM_PAGE <= first_visible(g, n_tokens);
}

#endif
