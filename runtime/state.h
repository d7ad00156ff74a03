/* state.h - a sequence of a session in a file: its tokens, its part of the cache, its checkpoints, and bytes of the
 * caller's.
 *
 * A state is a sealed file (sealed.h) of these sections; numbers are little-endian:
 *
 *   head     kvm_state_head
 *   recipe   its text, n_recipe bytes
 *   layers   kvm_state_layer[n_layer]
 *   marks    kvm_image_mark[n_marks], then kvm_image_list[n_marks][n_group] (kvimage.h)
 *   tokens   i32[length of mark 0]
 *   note     n_note bytes
 *   for each layer, the pages and stores of its marks in the order of kvimage.h:
 *            page    in f16 (n_valid positions, the others 0), then packed, as far as it is there
 *            store   of each mark, for each KV head: sinks and frozen balance if it is frozen, then the query rms rows
 *                    of page 0 if it holds that page in f16; a checkpoint likewise
 *
 * Slots are as backend.h lays them out. That layout, the codecs of kvtype.h and the structures here belong to the
 * version: a change of any of them is a new one.
 *
 * A file is read against the session it is loaded into. Model, recipe and layers must be the same; marks must be
 * possible in its context (kvm_image_check); every size follows from what the session knows and those numbers, and their
 * sum must be the file's. All of it is read and checked before the sequence is touched.
 */
#ifndef KVM_STATE_H
#define KVM_STATE_H

#include "kvcache.h"
#include "model.h"
#include "recipe.h"

enum { KVM_STATE_VERSION = 1, KVM_NOTE_MAX = 64 << 20 };

typedef struct {
    char magic[8];         /* "kvmix kv" */
    uint32_t version;
    uint32_t model_crc32;  /* with its size, the model: kvm_gguf_header_crc32 */
    uint64_t model_bytes;
    int32_t n_layer, n_group, n_marks;
    int32_t window, sink, balance_page;
    int32_t n_recipe, n_note;
} kvm_state_head;

typedef struct {
    int32_t k_type, v_type, n_head_kv, d_k, d_v, span, group;
    int32_t f16_bytes, packed_bytes, store_bytes; /* of a head */
} kvm_state_layer;

/* the parts of a session that a state concerns */
typedef struct {
    const kvmix_model *model;
    const kvm_recipe *recipe;
    kvm_cache *cache;
    const kvm_backend_ops *ops;
    kvm_backend *backend;
} kvm_state_owner;

kvmix_status kvm_state_save(const kvm_state_owner *owner, int32_t seq, const char *path, const void *note,
                            size_t n_note);
/* *note [*n_note] is the caller's to free; NULL after a failure */
kvmix_status kvm_state_load(const kvm_state_owner *owner, int32_t seq, const char *path, void **note, size_t *n_note);

#endif
