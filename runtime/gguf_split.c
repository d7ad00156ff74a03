/* gguf_split.c - opens the parts of a split model and checks them against each other. */
#include "gguf_split.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_PARTS = 4096, MAX_TENSORS = 65536, SUFFIX_BYTES = 20 };

typedef struct {
    int64_t no, count; /* split.no, from 0; split.count, 1 in a file that is no part */
} place;

static kvmix_status read_place(const kvm_gguf *file, place *out) {
    bool found;
    *out = (place){0, 1};
    KVM_TRY(kvm_gguf_get_int(file, "split.count", 0, MAX_PARTS, &out->count, &found));
    return kvm_gguf_get_int(file, "split.no", 0, MAX_PARTS, &out->no, &found);
}

/* what the path of a part ends in, SUFFIX_BYTES long */
static void write_suffix(place part, char out[64]) {
    snprintf(out, 64, "-%05" PRId64 "-of-%05" PRId64 ".gguf", part.no + 1, part.count);
}

static bool is_named(const char *path, place part) {
    char suffix[64];
    size_t n = strlen(path);
    write_suffix(part, suffix);
    return n >= SUFFIX_BYTES && strcmp(path + n - SUFFIX_BYTES, suffix) == 0;
}

static kvmix_status check_part(const kvm_gguf *first, const kvm_gguf *part, place wanted) {
    place found;
    KVM_TRY(read_place(part, &found));
    if (found.no != wanted.no || found.count != wanted.count) {
        return kvm_fail(KVMIX_FORMAT, "%.300s: this is part %" PRId64 " of %" PRId64 ", wanted is part %" PRId64
                        " of %" PRId64 "; get the model's files again", kvm_gguf_name(part), found.no + 1, found.count,
                        wanted.no + 1, wanted.count);
    }
    if (kvm_gguf_n_tensors(part) > MAX_TENSORS - kvm_gguf_n_tensors(first)) {
        return kvm_fail(KVMIX_FORMAT, "%.300s: with this part the model has more than %d tensors, the limit",
                        kvm_gguf_name(part), MAX_TENSORS);
    }
    for (int32_t i = 0; i < kvm_gguf_n_tensors(part); i++) {
        kvm_text text = kvm_gguf_tensor_at(part, i)->name;
        char name[65]; /* what gguf.h allows, and NUL */
        snprintf(name, sizeof name, "%.*s", (int)text.n_bytes, text.data);
        if (kvm_gguf_find(first, name) == NULL) continue;
        return kvm_fail(KVMIX_FORMAT, "%.300s: tensor '%s' is in an earlier part of the model, too; get the model's "
                        "files again", kvm_gguf_name(part), name);
    }
    return KVMIX_OK;
}

static kvmix_status add_part(kvm_gguf *first, const char *path, place wanted, bool use_mmap) {
    kvm_gguf *part;
    KVM_TRY(kvm_gguf_open(&part, path, use_mmap));
    kvmix_status status = check_part(first, part, wanted);
    if (status == KVMIX_OK) kvm_gguf_append(first, part);
    else kvm_gguf_close(part);
    return status;
}

/* path: the first part's, whose end changes */
static kvmix_status add_parts(kvm_gguf *first, char *path, int64_t count, bool use_mmap) {
    for (place part = {1, count}; part.no < count; part.no++) {
        char suffix[64];
        write_suffix(part, suffix);
        memcpy(path + strlen(path) - SUFFIX_BYTES, suffix, SUFFIX_BYTES);
        KVM_TRY(add_part(first, path, part, use_mmap));
    }
    int64_t n_tensors;
    bool found;
    KVM_TRY(kvm_gguf_get_int(first, "split.tensors.count", 0, INT32_MAX, &n_tensors, &found));
    if (found && n_tensors != kvm_gguf_n_tensors(first)) {
        return kvm_fail(KVMIX_FORMAT, "%.300s: the %" PRId64 " parts have %d tensors, the first one says %" PRId64
                        "; get the model's files again", kvm_gguf_name(first), count, kvm_gguf_n_tensors(first),
                        n_tensors);
    }
    return KVMIX_OK;
}

static kvmix_status open_others(kvm_gguf *first, bool use_mmap) {
    place part;
    KVM_TRY(read_place(first, &part));
    if (part.count <= 1) return KVMIX_OK;
    if (part.no != 0 || !is_named(kvm_gguf_name(first), part)) {
        return kvm_fail(KVMIX_FORMAT, "%.300s: this is part %" PRId64 " of a model in %" PRId64 " files; open the "
                        "first, whose name ends in -00001-of-%05" PRId64 ".gguf", kvm_gguf_name(first), part.no + 1,
                        part.count, part.count);
    }
    char *path = strdup(kvm_gguf_name(first));
    if (path == NULL) return kvm_fail(KVMIX_NOMEM, "%.300s: no memory for its name", kvm_gguf_name(first));
    kvmix_status status = add_parts(first, path, part.count, use_mmap);
    free(path);
    return status;
}

kvmix_status kvm_gguf_split_open(kvm_gguf **out, const char *path, bool use_mmap) {
    KVM_TRY(kvm_gguf_open(out, path, use_mmap));
    kvmix_status status = open_others(*out, use_mmap);
    if (status != KVMIX_OK) {
        kvm_gguf_close(*out);
        *out = NULL;
    }
    return status;
}
