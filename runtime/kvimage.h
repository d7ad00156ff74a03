/* kvimage.h - a sequence and its checkpoints as numbers and slots: what a saved state consists of, and how one becomes
 * a sequence again.
 *
 * The *marks* of an image are the sequence and then its checkpoints, the shortest first. Which pages they hold, and in
 * which forms, follows from their lengths and lists (invariant 2 of kvcache.h):
 *  - A full page is the same page for all marks that list it (7). It is there in f16 where a mark lists it from its
 *    f16_from on, and packed where one lists it below. A packed twin of a page that is held in f16 is not: it is made
 *    again, the same, when the cut passes the page.
 *  - The open page of a mark is its own, in f16 (marks that share one part when they go on).
 */
#ifndef KVM_KVIMAGE_H
#define KVM_KVIMAGE_H

#include "kvcache.h"

typedef struct {
    int32_t length, frozen; /* frozen: 1 = its store has the sinks and the balance of page 0, else 0 */
} kvm_image_mark;

typedef struct {
    int32_t first_page, f16_from;
} kvm_image_list;

typedef struct {
    int32_t page;  /* it holds positions from 128 * page on */
    int32_t owner; /* the mark whose open page it is; -1 = a full page */
    int32_t n_valid;
    kvm_page_slots slots; /* -1 = not there in this form */
} kvm_image_page;

typedef struct {
    int32_t n_marks, n_group;
    kvm_image_mark *marks;  /* [n_marks] */
    kvm_image_list *lists;  /* [n_marks][n_group] */
    int32_t *stores;        /* [n_marks] slots */
    int32_t *n_pages;       /* [n_group] */
    kvm_image_page **pages; /* [n_group][n_pages] */
} kvm_image;

/* All zero, with room for what n_marks can hold in this cache; closing accepts NULL. */
kvmix_status kvm_image_open(kvm_image **out, const kvm_cache *cache, int32_t n_marks);
void kvm_image_close(kvm_image *image);

/* The image of a sequence, with the slots that its pages and stores are in. */
kvmix_status kvm_image_of(kvm_image **out, const kvm_cache *cache, int32_t seq);

/* Marks and lists out of a file: refuses with FORMAT what no sequence of this cache could be, and lists the pages; their
 * slots are only told apart, as there and not there. `name` appears in the sentence. */
kvmix_status kvm_image_check(kvm_image *image, const kvm_cache *cache, const char *name);
/* Puts a checked image with its tokens [length] in the place of a sequence and its checkpoints; pages and stores get
 * slots, for the caller to fill. Other sequences' oldest checkpoints give way. FULL, with nothing changed, where the
 * pages are taken. */
kvmix_status kvm_image_adopt(kvm_image *image, kvm_cache *cache, int32_t seq, const int32_t *tokens);

#endif
