/* state.c - states (state.h): one walk over the parts of a layer serves for writing, measuring and reading. */
#include "state.h"

#include <stdlib.h>

#include "kvimage.h"
#include "sealed.h"

static const char magic[8] = "kvmix kv";

_Static_assert(sizeof(kvm_state_head) == 56, "no gaps: the structure is the file's");
_Static_assert(sizeof(kvm_state_layer) == 40, "no gaps: the structure is the file's");

/* ---- what a session's states begin with ---------------------------------------------------------------------- */

static kvm_state_head head_of(const kvm_state_owner *o) {
    const kvm_cache_layout *layout = kvm_cache_get_layout(o->cache);
    kvm_state_head head = {
        .version = KVM_STATE_VERSION, .model_crc32 = kvm_gguf_header_crc32(o->model->file),
        .model_bytes = kvm_gguf_file_bytes(o->model->file), .n_layer = layout->n_layer, .n_group = layout->n_group,
        .window = layout->window, .sink = layout->sink, .balance_page = layout->balance_page,
        .n_recipe = (int32_t)strlen(o->recipe->text)};
    memcpy(head.magic, magic, sizeof magic);
    return head;
}

static kvm_state_layer layer_of(const kvm_state_owner *o, int32_t i) {
    const kvm_layer *layer = &o->model->layers[i];
    const kvm_layer_layout *l = &kvm_cache_get_layout(o->cache)->layers[i];
    return (kvm_state_layer){
        .k_type = (int32_t)l->k_type, .v_type = (int32_t)l->v_type, .n_head_kv = layer->n_head_kv, .d_k = layer->d_k,
        .d_v = layer->d_v, .span = layer->span, .group = layer->group, .f16_bytes = l->f16.head_bytes,
        .packed_bytes = l->packed.head_bytes, .store_bytes = l->store.head_bytes};
}

/* ---- parts --------------------------------------------------------------------------------------------------- */

/* A slot, and what of it is in a state. */
typedef struct {
    kvm_slot_kind kind;
    int32_t layer, slot;
    int32_t n_valid;   /* of an f16 page: positions; of a store: columns of query rms rows, 0 = none */
    bool has_sinks;    /* of a store */
    uint64_t n_bytes;
} part;

typedef kvmix_status (*part_fn)(void *context, const part *it);

/* bytes of a store's head: sinks and balance; query rms rows */
static int32_t sink_bytes(const kvm_layer_layout *l) { return l->store.q_rms >= 0 ? l->store.q_rms : l->store.head_bytes; }
static int32_t rows_bytes(const kvm_layer *layer) { return 2 * layer->d_k * KVM_PAGE; }

static part store_part(const kvm_state_owner *o, const kvm_image *image, int32_t i, int32_t mark) {
    const kvm_layer *layer = &o->model->layers[i];
    const kvm_layer_layout *l = &kvm_cache_get_layout(o->cache)->layers[i];
    bool may_pack = l->store.q_rms >= 0 && image->lists[mark * image->n_group + layer->group].f16_from == 0;
    part it = {.kind = KVM_SLOT_STORE, .layer = i, .slot = image->stores[mark],
               .n_valid = may_pack ? kvm_min(image->marks[mark].length, KVM_PAGE) : 0,
               .has_sinks = image->marks[mark].frozen != 0};
    uint64_t head_bytes = (uint64_t)(it.has_sinks ? sink_bytes(l) : 0) + (uint64_t)(it.n_valid ? rows_bytes(layer) : 0);
    it.n_bytes = head_bytes * (uint64_t)layer->n_head_kv;
    return it;
}

/* all parts of a layer, in their order in the file */
static kvmix_status for_parts(const kvm_state_owner *o, const kvm_image *image, int32_t layer, part_fn fn, void *context) {
    const kvm_layer_layout *l = &kvm_cache_get_layout(o->cache)->layers[layer];
    int32_t g = o->model->layers[layer].group;
    for (int32_t i = 0; i < image->n_pages[g]; i++) {
        const kvm_image_page *page = &image->pages[g][i];
        part f16 = {.kind = KVM_SLOT_F16, .layer = layer, .slot = page->slots.f16, .n_valid = page->n_valid,
                    .n_bytes = l->f16_bytes};
        part packed = {.kind = KVM_SLOT_PACKED, .layer = layer, .slot = page->slots.packed, .n_bytes = l->packed_bytes};
        if (f16.slot >= 0) KVM_TRY(fn(context, &f16));
        if (packed.slot >= 0) KVM_TRY(fn(context, &packed));
    }
    for (int32_t mark = 0; mark < image->n_marks; mark++) {
        part store = store_part(o, image, layer, mark);
        KVM_TRY(fn(context, &store));
    }
    return KVMIX_OK;
}

/* rows [n_rows][width] of f16: 0 from column n_valid on. What lies there is left of other sequences, perhaps. */
static void clear_columns(uint8_t *rows, int32_t n_rows, int32_t n_valid) {
    for (int32_t i = 0; i < n_rows; i++) {
        memset(rows + 2 * (i * KVM_PAGE + n_valid), 0, (size_t)(2 * (KVM_PAGE - n_valid)));
    }
}

static void clear_f16(const kvm_layer *layer, const kvm_layer_layout *l, int32_t n_valid, uint8_t *slot) {
    for (int32_t h = 0; h < layer->n_head_kv; h++, slot += l->f16.head_bytes) {
        clear_columns(slot, layer->d_k, n_valid);
        memset(slot + l->f16.v + 2 * n_valid * layer->d_v, 0, (size_t)(2 * (KVM_PAGE - n_valid) * layer->d_v));
        if (l->f16.q_rms >= 0) clear_columns(slot + l->f16.q_rms, layer->d_k, n_valid);
    }
}

/* A store's slot, and the bytes that a state has of it: moved to `bytes`, or from there. */
static void move_store(const kvm_layer *layer, const kvm_layer_layout *l, const part *it, uint8_t *slot, uint8_t *bytes,
                       bool to_bytes) {
    struct {
        int32_t at, n;
    } pieces[2] = {{0, it->has_sinks ? sink_bytes(l) : 0}, {l->store.q_rms, it->n_valid > 0 ? rows_bytes(layer) : 0}};
    for (int32_t h = 0; h < layer->n_head_kv; h++, slot += l->store.head_bytes) {
        if (to_bytes && pieces[1].n > 0) clear_columns(slot + l->store.q_rms, layer->d_k, it->n_valid);
        for (int32_t i = 0; i < 2; i++) {
            if (pieces[i].n == 0) continue;
            uint8_t *in_slot = slot + pieces[i].at;
            memcpy(to_bytes ? bytes : in_slot, to_bytes ? in_slot : bytes, (size_t)pieces[i].n);
            bytes += pieces[i].n;
        }
    }
}

typedef struct {
    const kvm_state_owner *owner;
    kvm_sealed *file;        /* writing */
    uint8_t *slot;           /* a slot of any kind */
    uint8_t *bytes;          /* writing: a store's bytes; reading: what is left of all layers' */
    uint64_t n_bytes;        /* measuring: the sum */
} transfer;

static kvmix_status write_part(void *context, const part *it) {
    transfer *t = context;
    const kvm_layer *layer = &t->owner->model->layers[it->layer];
    const kvm_layer_layout *l = &kvm_cache_get_layout(t->owner->cache)->layers[it->layer];
    KVM_TRY(t->owner->ops->export_slot(t->owner->backend, it->layer, it->kind, it->slot, t->slot));
    if (it->kind == KVM_SLOT_F16) clear_f16(layer, l, it->n_valid, t->slot);
    if (it->kind == KVM_SLOT_STORE) move_store(layer, l, it, t->slot, t->bytes, true);
    return kvm_sealed_write(t->file, it->kind == KVM_SLOT_STORE ? t->bytes : t->slot, (size_t)it->n_bytes);
}

static kvmix_status measure_part(void *context, const part *it) {
    transfer *t = context;
    if (kvm_add(t->n_bytes, it->n_bytes, &t->n_bytes)) return KVMIX_OK;
    return kvm_fail(KVMIX_FORMAT, "more bytes than 64 bits can count");
}

static kvmix_status import_part(void *context, const part *it) {
    transfer *t = context;
    const kvm_layer *layer = &t->owner->model->layers[it->layer];
    const kvm_layer_layout *l = &kvm_cache_get_layout(t->owner->cache)->layers[it->layer];
    uint8_t *from = t->bytes;
    t->bytes += it->n_bytes;
    if (it->kind == KVM_SLOT_STORE) {
        memset(t->slot, 0, (size_t)l->store_bytes);
        move_store(layer, l, it, t->slot, from, false);
        from = t->slot;
    }
    return t->owner->ops->import_slot(t->owner->backend, it->layer, it->kind, it->slot, from);
}

/* room for a slot of any kind */
static kvmix_status open_slot(const kvm_cache_layout *layout, uint8_t **out) {
    uint64_t most = 0;
    for (int32_t i = 0; i < layout->n_layer; i++) {
        const kvm_layer_layout *l = &layout->layers[i];
        const uint64_t sizes[] = {l->f16_bytes, l->packed_bytes, l->store_bytes};
        for (int32_t kind = 0; kind < 3; kind++) most = sizes[kind] > most ? sizes[kind] : most;
    }
    *out = kvm_alloc(most, 1);
    return *out != NULL ? KVMIX_OK : kvm_fail(KVMIX_NOMEM, "no memory for a page of %llu bytes", (unsigned long long)most);
}

/* ---- saving -------------------------------------------------------------------------------------------------- */

static kvmix_status write_section(kvm_sealed *f, const void *data, size_t n_bytes) {
    KVM_TRY(kvm_sealed_write(f, data, n_bytes));
    return kvm_sealed_end(f);
}

static kvmix_status write_state(const kvm_state_owner *o, kvm_sealed *f, const kvm_image *image, int32_t seq,
                                const void *note, size_t n_note, transfer *t) {
    kvm_state_head head = head_of(o);
    head.n_marks = image->n_marks;
    head.n_note = (int32_t)n_note;
    KVM_TRY(write_section(f, &head, sizeof head));
    KVM_TRY(write_section(f, o->recipe->text, (size_t)head.n_recipe));
    for (int32_t i = 0; i < head.n_layer; i++) {
        kvm_state_layer layer = layer_of(o, i);
        KVM_TRY(kvm_sealed_write(f, &layer, sizeof layer));
    }
    KVM_TRY(kvm_sealed_end(f));
    size_t n_marks = (size_t)image->n_marks, n_lists = n_marks * (size_t)image->n_group;
    KVM_TRY(kvm_sealed_write(f, image->marks, n_marks * sizeof *image->marks));
    KVM_TRY(write_section(f, image->lists, n_lists * sizeof *image->lists));
    const int32_t *tokens = kvm_cache_tokens(o->cache, seq);
    KVM_TRY(write_section(f, tokens, (size_t)image->marks[0].length * sizeof *tokens));
    KVM_TRY(write_section(f, note, n_note));
    for (int32_t i = 0; i < head.n_layer; i++) {
        KVM_TRY(for_parts(o, image, i, write_part, t));
        KVM_TRY(kvm_sealed_end(f));
    }
    return kvm_sealed_rename(f);
}

kvmix_status kvm_state_save(const kvm_state_owner *o, int32_t seq, const char *path, const void *note, size_t n_note) {
    if (n_note > KVM_NOTE_MAX) {
        return kvm_fail(KVMIX_ARG, "a note of %zu bytes; a state takes %d at most", n_note, KVM_NOTE_MAX);
    }
    const kvm_cache_layout *layout = kvm_cache_get_layout(o->cache);
    kvm_image *image;
    KVM_TRY(kvm_image_of(&image, o->cache, seq));
    kvm_sealed file;
    transfer t = {.owner = o, .file = &file};
    kvmix_status status = open_slot(layout, &t.slot);
    if (status == KVMIX_OK) status = open_slot(layout, &t.bytes);
    if (status == KVMIX_OK) status = kvm_sealed_create(&file, path);
    if (status == KVMIX_OK) {
        status = write_state(o, &file, image, seq, note, n_note, &t);
        kvm_sealed_close(&file);
    }
    free(t.slot);
    free(t.bytes);
    kvm_image_close(image);
    return status;
}

/* ---- loading ------------------------------------------------------------------------------------------------- */

/* What is read before the sequence is touched. */
typedef struct {
    kvm_state_head head;
    kvm_image *image;
    void *tokens, *note, *bytes; /* i32[length]; [n_note]; of all layers' parts */
    uint8_t *slot;
} staging;

static void close_staging(staging *s) {
    kvm_image_close(s->image);
    void *parts[] = {s->tokens, s->note, s->bytes, s->slot};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
}

static kvmix_status read_section(kvm_sealed *f, void *data, size_t n_bytes, const char *section) {
    KVM_TRY(kvm_sealed_read(f, data, n_bytes, section));
    return kvm_sealed_check(f, section);
}

/* memory for n values of the file, refused before it is asked for where the file cannot have them */
static kvmix_status open_values(const kvm_sealed *f, uint64_t n, uint64_t size, const char *section, void **out) {
    uint64_t n_bytes;
    if (!kvm_mul(n, size, &n_bytes) || n_bytes > f->n_bytes - f->at) {
        return kvm_fail(KVMIX_FORMAT, "%s has %llu bytes and ends in its %s: it cannot be used, save it anew", f->path,
                        (unsigned long long)f->n_bytes, section);
    }
    *out = kvm_alloc(n, size);
    if (*out != NULL) return KVMIX_OK;
    return kvm_fail(KVMIX_NOMEM, "no memory for the %s of %s: %llu bytes", section, f->path, (unsigned long long)n_bytes);
}

static kvmix_status read_values(kvm_sealed *f, uint64_t n, uint64_t size, const char *section, void **out) {
    KVM_TRY(open_values(f, n, size, section, out));
    return read_section(f, *out, (size_t)(n * size), section);
}

static kvmix_status check_number(const kvm_sealed *f, const char *what, int32_t saved, int32_t here, const char *way_out) {
    if (saved == here) return KVMIX_OK;
    return kvm_fail(KVMIX_ARG, "%s was saved with %s %d, this session has %d: open it with %s %d", f->path, what, saved,
                    here, way_out, saved);
}

static kvmix_status read_head(const kvm_state_owner *o, kvm_sealed *f, kvm_state_head *head) {
    KVM_TRY(kvm_sealed_read(f, head, sizeof *head, "head"));
    if (memcmp(head->magic, magic, sizeof magic) != 0) {
        return kvm_fail(KVMIX_FORMAT, "%s is no saved session: it does not begin with \"%.8s\"", f->path, magic);
    }
    if (head->version != KVM_STATE_VERSION) {
        return kvm_fail(KVMIX_UNSUPPORTED, "%s is a state of version %u, this library has version %d: load it with the "
                        "kvmix that saved it", f->path, head->version, KVM_STATE_VERSION);
    }
    KVM_TRY(kvm_sealed_check(f, "head"));
    kvm_state_head here = head_of(o);
    if (head->model_bytes != here.model_bytes || head->model_crc32 != here.model_crc32) {
        return kvm_fail(KVMIX_ARG, "%s was saved with another model, %llx-%08x, this one is %llx-%08x: load it with the "
                        "model that it was saved with", f->path, (unsigned long long)head->model_bytes, head->model_crc32,
                        (unsigned long long)here.model_bytes, here.model_crc32);
    }
    KVM_TRY(check_number(f, "a window of", head->window, here.window, "--window"));
    KVM_TRY(check_number(f, "sinks of", head->sink, here.sink, "--sink"));
    KVM_TRY(check_number(f, "balance_page", head->balance_page, here.balance_page, "balance_page"));
    if (head->n_recipe < 0 || head->n_recipe >= KVM_RECIPE_TEXT_MAX || head->n_note < 0 || head->n_note > KVM_NOTE_MAX ||
        head->n_layer != here.n_layer || head->n_group != here.n_group || head->n_marks < 1) {
        return kvm_fail(KVMIX_FORMAT, "%s has a head that no session writes: it cannot be used, save it anew", f->path);
    }
    return KVMIX_OK;
}

static kvmix_status read_recipe(const kvm_state_owner *o, kvm_sealed *f, int32_t n_recipe) {
    char text[KVM_RECIPE_TEXT_MAX] = "";
    KVM_TRY(read_section(f, text, (size_t)n_recipe, "recipe"));
    if (strcmp(text, o->recipe->text) == 0) return KVMIX_OK;
    return kvm_fail(KVMIX_ARG, "%s was saved with the recipe %.100s, this session has %.100s: open it with --kv %.100s",
                    f->path, text, o->recipe->text, text);
}

static kvmix_status read_layers(const kvm_state_owner *o, kvm_sealed *f, int32_t n_layer) {
    int32_t different = -1;
    for (int32_t i = 0; i < n_layer; i++) {
        kvm_state_layer here = layer_of(o, i), saved;
        KVM_TRY(kvm_sealed_read(f, &saved, sizeof saved, "layers"));
        if (different < 0 && memcmp(&saved, &here, sizeof saved) != 0) different = i;
    }
    KVM_TRY(kvm_sealed_check(f, "layers"));
    if (different < 0) return KVMIX_OK;
    return kvm_fail(KVMIX_FORMAT, "%s has other heads or pages in layer %d than this session: it cannot be used", f->path,
                    different);
}

static kvmix_status read_marks(const kvm_state_owner *o, kvm_sealed *f, staging *s) {
    int32_t n_marks = s->head.n_marks, n_kept = kvm_cache_get_sizes(o->cache)->n_checkpoint;
    if (n_marks - 1 > n_kept) {
        return kvm_fail(KVMIX_ARG, "%s has %d checkpoints, this session keeps %d: open it with n_checkpoint %d", f->path,
                        n_marks - 1, n_kept, n_marks - 1);
    }
    KVM_TRY(kvm_image_open(&s->image, o->cache, n_marks));
    size_t n_lists = (size_t)n_marks * (size_t)s->image->n_group;
    KVM_TRY(kvm_sealed_read(f, s->image->marks, (size_t)n_marks * sizeof *s->image->marks, "marks"));
    KVM_TRY(read_section(f, s->image->lists, n_lists * sizeof *s->image->lists, "marks"));
    int32_t length = s->image->marks[0].length, n_ctx = kvm_cache_get_sizes(o->cache)->n_ctx;
    if (length > n_ctx) {
        return kvm_fail(KVMIX_FULL, "%s holds %d tokens, the context of this session %d: open it with a larger one (-c)",
                        f->path, length, n_ctx);
    }
    return kvm_image_check(s->image, o->cache, f->path);
}

static kvmix_status read_tokens(const kvm_state_owner *o, kvm_sealed *f, staging *s) {
    int32_t n = s->image->marks[0].length;
    KVM_TRY(read_values(f, (uint64_t)n, sizeof(int32_t), "tokens", &s->tokens));
    const int32_t *tokens = s->tokens;
    for (int32_t i = 0; i < n; i++) {
        if (tokens[i] >= 0 && tokens[i] < o->model->net.n_vocab) continue;
        return kvm_fail(KVMIX_FORMAT, "%s has token %d, the vocabulary %d tokens: it cannot be used", f->path, tokens[i],
                        o->model->net.n_vocab);
    }
    return KVMIX_OK;
}

static kvmix_status read_parts(const kvm_state_owner *o, kvm_sealed *f, staging *s) {
    int32_t n_layer = s->head.n_layer;
    uint64_t n_all = 0, n_left = f->n_bytes - f->at;
    for (int32_t i = 0; i < n_layer; i++) {
        transfer t = {.owner = o, .n_bytes = n_all};
        KVM_TRY(for_parts(o, s->image, i, measure_part, &t));
        n_all = t.n_bytes;
    }
    uint64_t beside = (uint64_t)n_layer * KVM_SEALED_END_BYTES + KVM_SEALED_BYTES, n_file;
    if (!kvm_add(n_all, beside, &n_file) || n_file != n_left) {
        return kvm_fail(KVMIX_FORMAT, "%s has %llu bytes behind its byte %llu, not the %llu that the cache of its %d tokens "
                        "takes: it cannot be used, save it anew", f->path, (unsigned long long)n_left,
                        (unsigned long long)f->at, (unsigned long long)n_file, s->image->marks[0].length);
    }
    KVM_TRY(open_values(f, n_all, 1, "cache", &s->bytes));
    uint8_t *to = s->bytes;
    for (int32_t i = 0; i < n_layer; i++) {
        transfer t = {.owner = o};
        KVM_TRY(for_parts(o, s->image, i, measure_part, &t));
        KVM_TRY(read_section(f, to, (size_t)t.n_bytes, "cache"));
        to += t.n_bytes;
    }
    return kvm_sealed_check_all(f);
}

static kvmix_status read_state(const kvm_state_owner *o, kvm_sealed *f, staging *s) {
    KVM_TRY(read_head(o, f, &s->head));
    KVM_TRY(read_recipe(o, f, s->head.n_recipe));
    KVM_TRY(read_layers(o, f, s->head.n_layer));
    KVM_TRY(read_marks(o, f, s));
    KVM_TRY(read_tokens(o, f, s));
    KVM_TRY(read_values(f, (uint64_t)s->head.n_note, 1, "note", &s->note));
    KVM_TRY(read_parts(o, f, s));
    return open_slot(kvm_cache_get_layout(o->cache), &s->slot);
}

/* After the image is adopted only a device can fail, and then it is dead. */
static kvmix_status swap_in(const kvm_state_owner *o, int32_t seq, staging *s) {
    KVM_TRY(kvm_image_adopt(s->image, o->cache, seq, s->tokens));
    transfer t = {.owner = o, .slot = s->slot, .bytes = s->bytes};
    for (int32_t i = 0; i < s->head.n_layer; i++) KVM_TRY(for_parts(o, s->image, i, import_part, &t));
    return KVMIX_OK;
}

kvmix_status kvm_state_load(const kvm_state_owner *o, int32_t seq, const char *path, void **note, size_t *n_note) {
    *note = NULL;
    *n_note = 0;
    kvm_sealed file;
    KVM_TRY(kvm_sealed_open(&file, path));
    staging s = {.image = NULL};
    kvmix_status status = read_state(o, &file, &s);
    kvm_sealed_close(&file);
    if (status == KVMIX_OK) status = swap_in(o, seq, &s);
    if (status == KVMIX_OK) {
        *note = s.note;
        *n_note = (size_t)s.head.n_note;
        s.note = NULL;
    }
    close_staging(&s);
    return status;
}
