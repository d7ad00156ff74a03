/* kvimage.c - images of sequences (kvimage.h), from a cache's lists and back. */
#include "kvimage.h"

#include <stdlib.h>

#include "kvpages.h"

kvmix_status kvm_image_open(kvm_image **out, const kvm_cache *cache, int32_t n_marks) {
    uint64_t n_group = (uint64_t)cache->n_group, marks = (uint64_t)n_marks;
    kvm_image *image = *out = kvm_alloc_zero(1, sizeof *image);
    if (image == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a saved session");
    image->n_marks = n_marks;
    image->n_group = cache->n_group;
    image->marks = kvm_alloc_zero(marks, sizeof *image->marks);
    image->lists = kvm_alloc_zero(marks * n_group, sizeof *image->lists);
    image->stores = kvm_alloc_zero(marks, sizeof *image->stores);
    image->n_pages = kvm_alloc_zero(n_group, sizeof *image->n_pages);
    image->pages = kvm_alloc_zero(n_group, sizeof *image->pages);
    bool ok = image->marks && image->lists && image->stores && image->n_pages && image->pages;
    for (int32_t g = 0; ok && g < cache->n_group; g++) {
        image->pages[g] = kvm_alloc((uint64_t)(cache->max_pages + n_marks), sizeof **image->pages);
        ok = image->pages[g] != NULL;
    }
    if (ok) return KVMIX_OK;
    kvm_image_close(image);
    *out = NULL;
    return kvm_fail(KVMIX_NOMEM, "no memory for the page lists of a saved session");
}

void kvm_image_close(kvm_image *image) {
    if (image == NULL) return;
    for (int32_t g = 0; image->pages != NULL && g < image->n_group; g++) free(image->pages[g]);
    void *parts[] = {image->marks, image->lists, image->stores, image->n_pages, image->pages};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
    free(image);
}

/* ---- pages of marks ------------------------------------------------------------------------------------------ */

static const kvm_image_list *list_of(const kvm_image *image, int32_t mark, int32_t g) {
    return &image->lists[mark * image->n_group + g];
}

/* does the mark list the page? */
static bool lists(const kvm_image *image, int32_t mark, int32_t g, const kvm_image_page *it) {
    if (it->owner >= 0) return it->owner == mark;
    return it->page >= list_of(image, mark, g)->first_page && it->page < image->marks[mark].length / KVM_PAGE;
}

/* Adds the page in the forms that its marks hold, if any do. */
static void add_page(kvm_image *image, int32_t g, kvm_image_page it) {
    for (int32_t mark = 0; mark < image->n_marks; mark++) {
        if (!lists(image, mark, g, &it)) continue;
        *(it.page >= list_of(image, mark, g)->f16_from ? &it.slots.f16 : &it.slots.packed) = 0;
    }
    if (it.slots.f16 >= 0 || it.slots.packed >= 0) image->pages[g][image->n_pages[g]++] = it;
}

static void list_pages(kvm_image *image) {
    const kvm_page_slots none = {.f16 = -1, .packed = -1};
    for (int32_t g = 0; g < image->n_group; g++) {
        for (int32_t p = 0; p < image->marks[0].length / KVM_PAGE; p++) { /* checkpoints are no longer */
            add_page(image, g, (kvm_image_page){.page = p, .owner = -1, .n_valid = KVM_PAGE, .slots = none});
        }
        for (int32_t mark = 0; mark < image->n_marks; mark++) {
            int32_t length = image->marks[mark].length;
            if (length % KVM_PAGE == 0) continue;
            add_page(image, g, (kvm_image_page){.page = length / KVM_PAGE, .owner = mark, .n_valid = length % KVM_PAGE,
                                                .slots = none});
        }
    }
}

/* ---- from a sequence ----------------------------------------------------------------------------------------- */

/* the shortest checkpoint of a sequence that is longer than this; NULL when there is none */
static const sequence *next_checkpoint(const kvm_cache *cache, int32_t seq, int32_t longer_than) {
    const sequence *best = NULL;
    for (int32_t i = cache->sizes.n_seq; i < cache->n_slots; i++) {
        const sequence *it = &cache->sequences[i];
        if (it->owner == seq && it->length > longer_than && (best == NULL || it->length < best->length)) best = it;
    }
    return best;
}

static void find_slots(kvm_image *image, const kvm_cache *cache, int32_t g, kvm_image_page *it) {
    for (int32_t mark = 0; mark < image->n_marks; mark++) {
        if (!lists(image, mark, g, it)) continue;
        const page_list *list = &cache->sequences[image->stores[mark]].lists[g];
        const page *held = &cache->groups[g].pages[list->pages[it->page]];
        if (it->page >= list->f16_from) it->slots.f16 = held->f16;
        else it->slots.packed = held->packed;
    }
}

kvmix_status kvm_image_of(kvm_image **out, const kvm_cache *cache, int32_t seq) {
    int32_t n_marks = 1;
    for (const sequence *it = NULL; (it = next_checkpoint(cache, seq, it != NULL ? it->length : 0)) != NULL;) n_marks++;
    KVM_TRY(kvm_image_open(out, cache, n_marks));
    kvm_image *image = *out;
    const sequence *it = &cache->sequences[seq];
    for (int32_t mark = 0; mark < n_marks; mark++) {
        image->stores[mark] = slot_of(cache, it);
        image->marks[mark] = (kvm_image_mark){.length = it->length, .frozen = it->frozen};
        for (int32_t g = 0; g < image->n_group; g++) {
            const page_list *list = &it->lists[g];
            image->lists[mark * image->n_group + g] = (kvm_image_list){list->first_page, list->f16_from};
        }
        it = next_checkpoint(cache, seq, mark == 0 ? 0 : it->length);
    }
    list_pages(image);
    for (int32_t g = 0; g < image->n_group; g++) {
        for (int32_t i = 0; i < image->n_pages[g]; i++) find_slots(image, cache, g, &image->pages[g][i]);
    }
    return KVMIX_OK;
}

/* ---- and back ------------------------------------------------------------------------------------------------ */

static kvmix_status check_mark(const kvm_image *image, const kvm_cache *cache, int32_t mark, const char *name) {
    kvm_image_mark it = image->marks[mark];
    int32_t low = mark < 2 ? kvm_min(mark, 1) : image->marks[mark - 1].length + 1;
    int32_t high = mark == 0 ? cache->sizes.n_ctx : image->marks[0].length;
    if (it.length < low || it.length > high) {
        return kvm_fail(KVMIX_FORMAT, "%s has a mark at %d tokens, not in %d to %d: it cannot be used", name, it.length, low,
                        high);
    }
    if (it.frozen != 0 && (it.frozen != 1 || it.length < KVM_PAGE)) {
        return kvm_fail(KVMIX_FORMAT, "%s has sinks (%d) for %d tokens: it cannot be used", name, it.frozen, it.length);
    }
    for (int32_t g = 0; g < image->n_group; g++) {
        const group *group = &cache->groups[g];
        page_list list = {.first_page = list_of(image, mark, g)->first_page, .f16_from = list_of(image, mark, g)->f16_from,
                          .n_pages = kvm_ceil_div(it.length, KVM_PAGE)};
        int32_t least = kvm_min(f16_needed_from(cache, group, it.length), list.n_pages); /* invariant 3 */
        if (list.first_page < 0 || list.first_page > list.n_pages || list.f16_from < kvm_max(list.first_page, least) ||
            list.f16_from > list.n_pages || !list_is_exact(cache, group, &list, it.length) ||
            (list.f16_from > list.first_page && it.frozen == 0)) {
            return kvm_fail(KVMIX_FORMAT, "%s has %d tokens in pages from %d on, in f16 from %d on, as no session does: it "
                            "cannot be used", name, it.length, list.first_page, list.f16_from);
        }
    }
    return KVMIX_OK;
}

kvmix_status kvm_image_check(kvm_image *image, const kvm_cache *cache, const char *name) {
    for (int32_t mark = 0; mark < image->n_marks; mark++) KVM_TRY(check_mark(image, cache, mark, name));
    list_pages(image);
    return KVMIX_OK;
}

/* Counts what a sequence and its checkpoints hold alone: slots that are free once they are gone. */
static void count_own(kvm_cache *cache, int32_t seq, int32_t g_index, int32_t *n_f16, int32_t *n_packed) {
    group *g = &cache->groups[g_index];
    for (int32_t i = 0; i < g->n_page; i++) g->pages[i].own_refs = g->pages[i].own_f16_refs = 0;
    for (int32_t i = 0; i < cache->n_slots; i++) {
        const sequence *it = &cache->sequences[i];
        if (i != seq && it->owner != seq) continue;
        const page_list *list = &it->lists[g_index];
        for (int32_t p = list->first_page; p < list->n_pages; p++) {
            g->pages[list->pages[p]].own_refs++;
            g->pages[list->pages[p]].own_f16_refs += p >= list->f16_from;
        }
    }
    *n_f16 = *n_packed = 0;
    for (int32_t i = 0; i < g->n_page; i++) {
        const page *it = &g->pages[i];
        if (it->own_refs == 0) continue;
        *n_f16 += it->f16 >= 0 && it->own_f16_refs == it->f16_refs;
        *n_packed += it->packed >= 0 && it->own_refs == it->refs;
    }
}

static kvmix_status check_room(const kvm_image *image, kvm_cache *cache, int32_t seq) {
    for (int32_t g = 0; g < image->n_group; g++) {
        int32_t n_f16, n_packed;
        count_own(cache, seq, g, &n_f16, &n_packed);
        n_f16 += cache->groups[g].free_f16.n;
        n_packed += cache->groups[g].free_packed.n;
        for (int32_t i = 0; i < image->n_pages[g]; i++) {
            n_f16 -= image->pages[g][i].slots.f16 >= 0;
            n_packed -= image->pages[g][i].slots.packed >= 0;
        }
        if (n_f16 >= 0 && n_packed >= 0) continue;
        return kvm_fail(KVMIX_FULL, "the page pools lack %d pages for the %d saved tokens: drop a sequence or open the "
                        "session with a larger context (-c)", kvm_max(-n_f16, 0) + kvm_max(-n_packed, 0),
                        image->marks[0].length);
    }
    return KVMIX_OK;
}

/* Gives the page slots, and lists it in the marks that hold it. */
static void adopt_page(const kvm_image *image, kvm_cache *cache, int32_t g_index, kvm_image_page *it) {
    group *g = &cache->groups[g_index];
    if (it->slots.f16 >= 0) it->slots.f16 = take(&g->free_f16);
    if (it->slots.packed >= 0) it->slots.packed = take(&g->free_packed);
    int32_t id = take(&g->free_pages);
    page *held = &g->pages[id];
    *held = (page){.f16 = it->slots.f16, .packed = it->slots.packed, .fill = it->n_valid};
    for (int32_t mark = 0; mark < image->n_marks; mark++) {
        if (!lists(image, mark, g_index, it)) continue;
        page_list *list = &cache->sequences[image->stores[mark]].lists[g_index];
        list->pages[it->page] = id;
        held->refs++;
        held->f16_refs += it->page >= list->f16_from;
    }
}

kvmix_status kvm_image_adopt(kvm_image *image, kvm_cache *cache, int32_t seq, const int32_t *tokens) {
    KVM_TRY(check_room(image, cache, seq));
    drop_checkpoints(cache, seq, -1);
    for (int32_t mark = 0; mark < image->n_marks; mark++) {
        sequence *it = mark == 0 ? &cache->sequences[seq] : new_checkpoint(cache, seq);
        shorten(cache, it, 0);
        it->length = image->marks[mark].length;
        it->frozen = image->marks[mark].frozen != 0;
        memcpy(it->tokens, tokens, (size_t)it->length * sizeof *tokens);
        image->stores[mark] = slot_of(cache, it);
        for (int32_t g = 0; g < image->n_group; g++) {
            const kvm_image_list *list = list_of(image, mark, g);
            it->lists[g] = (page_list){.pages = it->lists[g].pages, .first_page = list->first_page,
                                       .n_pages = kvm_ceil_div(it->length, KVM_PAGE), .f16_from = list->f16_from};
        }
    }
    for (int32_t g = 0; g < image->n_group; g++) {
        for (int32_t i = 0; i < image->n_pages[g]; i++) adopt_page(image, cache, g, &image->pages[g][i]);
    }
    return KVMIX_OK;
}
