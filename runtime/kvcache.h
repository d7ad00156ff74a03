/* kvcache.h - who holds which page: sequences, checkpoints, page lists, and the plan of every batch.
 *
 * It owns lists, references and the plan; a backend owns the bytes (backend.h). Layers of one attention span form a
 * group with its own page lists and pools. Slots 0..n_seq-1 are the caller's sequences, the rest are checkpoints.
 *
 * Invariants, for each group
 *  1. A page has an f16 slot, a packed slot or both; `refs` sequences list it, `f16_refs` of them hold its f16 form.
 *     When f16_refs falls to 0 the f16 slot is free again, when refs does, the page is.
 *  2. A sequence of length n lists pages first_page .. ceil(n/128)-1; it holds the f16 form of those from f16_from on
 *     and only the packed form of the others. f16_from <= cut(n) / 128: what a next row reads in f16 is there.
 *  3. f16_from >= cut(n)/128 - 1 after a batch: f16 twins live one page past the cut, so the last 128 tokens rewind
 *     exactly. A sliding group keeps 128 positions more than its span for the same reason. A checkpoint, which is
 *     only ever returned to, does without that page.
 *  4. `fill` of a page counts the positions written by whoever wrote last. A sequence whose length ends below the
 *     fill of its open page copies the page before it appends, if others list it too; else it takes it over.
 *  5. A packed form is made from a full page, once (strict mode: from what is there, again after every batch that
 *     touches it), and dropped when the page is appended to again after a rewind.
 *  6. cut(t) = 128 * floor((t - window) / 128), at least 0; strict: 128 * (floor(t / 128) + 1); 0 for ever in a group
 *     that has no packed type (and no page hook).
 *  7. A checkpoint is a prefix of its sequence: shortening the sequence below it drops it.
 *  8. begin() changes nothing that abort() does not undo, but for stale packed forms (5) that it drops; lengths and
 *     tokens change in commit() alone.
 *  9. Sinks and the frozen balance are a function of page 0, but stand in each sequence's store. A sequence whose cut
 *     passes page 0 after a sharer packed it gets a job for its store alone.
 */
#ifndef KVM_KVCACHE_H
#define KVM_KVCACHE_H

#include "backend.h"
#include "recipe.h"

typedef struct kvm_cache kvm_cache;

typedef struct {
    int32_t n_ctx, n_batch, n_seq, n_checkpoint;
    bool strict;
    bool studied; /* a page hook: pages of type f16 are packed too, and every f16 page keeps its query rms rows */
} kvm_cache_sizes;

/* Exact sizes of a cache, before any of it is allocated. */
typedef struct {
    uint64_t total_bytes; /* both pools of all groups and the stores */
    double bits_full;     /* physical bits a value when one sequence fills n_ctx */
} kvm_cache_bytes;

/* The net's layers give heads, spans and groups. UNSUPPORTED for a head size above 256 or not a multiple of 16. */
kvmix_status kvm_cache_open(kvm_cache **out, const kvm_net *net, const kvm_recipe *recipe,
                            const kvm_cache_sizes *sizes);
void kvm_cache_close(kvm_cache *cache);
const kvm_cache_sizes *kvm_cache_get_sizes(const kvm_cache *cache);
const kvm_cache_layout *kvm_cache_get_layout(const kvm_cache *cache);
kvm_cache_bytes kvm_cache_get_bytes(const kvm_cache *cache);
/* What is in use now. Pages that are shared count once. */
typedef struct {
    uint64_t held_bytes; /* all pages (f16 ones by their fill), sinks and balances, those kept for a rewind too */
    uint64_t read_bytes; /* of those, what the next rows of the sequences would read */
    uint64_t n_values;   /* that are held for them */
} kvm_cache_usage;
kvm_cache_usage kvm_cache_get_usage(kvm_cache *cache);

int32_t kvm_cache_length(const kvm_cache *cache, int32_t seq);
const int32_t *kvm_cache_tokens(const kvm_cache *cache, int32_t seq); /* [length] */

/* Plans a batch: plans[n_group] live until commit or abort, one of which must follow. ARG for a bad seq or pos, FULL
 * with the numbers when the context or the page pool is exhausted (nothing is changed then). */
kvmix_status kvm_cache_begin(kvm_cache *cache, const kvmix_row *rows, int32_t n_rows, const kvm_plan **plans);
void kvm_cache_commit(kvm_cache *cache);
void kvm_cache_abort(kvm_cache *cache);

/* The next three may ask the caller to copy a store: *store is {from, to} slots, from = -1 when there is none. */
void kvm_cache_truncate(kvm_cache *cache, int32_t seq, int32_t n_tokens, int32_t *n_held, kvm_copy_job *store);
void kvm_cache_fork(kvm_cache *cache, int32_t src, int32_t dst, kvm_copy_job *store);
void kvm_cache_checkpoint(kvm_cache *cache, int32_t seq, kvm_copy_job *store);

#endif
