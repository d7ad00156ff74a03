/* gguf.c - the GGUF reader: one pass over the header, then the tensors are placed and checked against each other.
 *
 * Invariants, besides those of gguf.h
 * 1. `reader` is the only way to header bytes: take() compares with the bytes left before it moves. Everything it
 *    hands out lies inside the file.
 * 2. A count is compared with what the bytes left could hold before memory is allocated for it.
 * 3. An object is zero-initialised and freed by kvm_gguf_close alone, however far it came.
 * 4. Names that came from a file appear in sentences through printable(), so that no control byte reaches a terminal.
 *
 * File:    "GGUF" | version u32 | n_tensors u64 | n_keys u64 | keys | tensor records | padding | tensor data
 * key:     name string | type u32 | value, where an array is: element type u32 | n u64 | n elements
 * tensor:  name string | n_dims u32 | dims u64[n_dims] | type u32 | offset u64, from the start of the tensor data
 * string:  n u64 | n bytes
 */
#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers of the file are loaded as they lie");

#define MAX_HEADER_BYTES (UINT64_C(128) << 20)
#define MAX_STRING_BYTES (UINT64_C(64) << 20)
#define MAX_ELEMENTS (UINT64_C(1) << 24)
enum {
    MAX_KEYS = 65536, MAX_KEY_BYTES = 65535, MIN_KEY_RECORD = 8 + 1 + 4 + 1,
    MAX_TENSORS = 65536, MAX_TENSOR_NAME = 64, MIN_TENSOR_RECORD = 8 + 1 + 4 + 8 + 4 + 8,
    MIN_ALIGNMENT = 8, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 65536
};

enum value_kind { UNSIGNED, SIGNED, OTHER };
static const struct {
    const char *name;
    enum value_kind kind;
    uint8_t n_bytes; /* of an element; a string has at least its length */
} value_types[KVM_GGUF_TYPE_COUNT] = {
    [KVM_GGUF_U8] = {"u8", UNSIGNED, 1},       [KVM_GGUF_I8] = {"i8", SIGNED, 1},
    [KVM_GGUF_U16] = {"u16", UNSIGNED, 2},     [KVM_GGUF_I16] = {"i16", SIGNED, 2},
    [KVM_GGUF_U32] = {"u32", UNSIGNED, 4},     [KVM_GGUF_I32] = {"i32", SIGNED, 4},
    [KVM_GGUF_U64] = {"u64", UNSIGNED, 8},     [KVM_GGUF_I64] = {"i64", SIGNED, 8},
    [KVM_GGUF_F32] = {"f32", OTHER, 4},        [KVM_GGUF_F64] = {"f64", OTHER, 8},
    [KVM_GGUF_BOOL] = {"bool", OTHER, 1},      [KVM_GGUF_STRING] = {"string", OTHER, 8},
    [KVM_GGUF_ARRAY] = {"array", OTHER, 0},
};

typedef struct {
    kvm_text name;        /* first, as in kvm_gguf_tensor: name_table points at it */
    bool is_array;
    kvm_gguf_array value; /* a single value is an array of one */
} key_entry;

/* Open addressing over the names of keys or of tensors; at most half full. */
typedef struct {
    const kvm_text **slots; /* [mask + 1], NULL where empty; each the first member of its key_entry or tensor */
    uint64_t mask;
    uint64_t seed;
} name_table;

struct kvm_gguf {
    char *name;
    const uint8_t *bytes;     /* [n_bytes] */
    uint64_t n_bytes, n_header_bytes; /* the tensor data comes after the header */
    enum { BORROWED, MAPPED, ALLOCATED } storage;
    key_entry *keys;          /* [n_keys] */
    kvm_gguf_tensor *tensors; /* [n_tensors] */
    uint64_t n_keys, n_tensors;
    name_table key_table, tensor_table;
    kvm_gguf *next; /* the part appended to it, and so on */
};

typedef struct {
    uint64_t begin, end; /* bytes from the start of the tensor data */
    uint64_t at;         /* where the header says so */
    const kvm_text *name;
} extent;

typedef struct {
    kvm_gguf *file;
    uint64_t pos, end;  /* the header is read from bytes[pos, end) */
    const char *record; /* "key" or "tensor" with the name `subject`, for error sentences; NULL outside */
    kvm_text subject;
    extent *extents;    /* [n_tensors], in the order of the records */
} reader;

/* ---- sentences --------------------------------------------------------------------------------------------- */

enum { SHOWN_BYTES = 64 };

static const char *printable(kvm_text text, char buf[SHOWN_BYTES + 4]) {
    size_t n = text.n_bytes < SHOWN_BYTES ? text.n_bytes : SHOWN_BYTES;
    for (size_t i = 0; i < n; i++) buf[i] = (char)(text.data[i] >= ' ' && text.data[i] <= '~' ? text.data[i] : '?');
    strcpy(&buf[n], n < text.n_bytes ? "..." : "");
    return buf;
}

/* The header breaks a rule in the item that begins at byte `at`. */
__attribute__((format(printf, 3, 4)))
static kvmix_status damaged(const reader *r, uint64_t at, const char *format, ...) {
    char what[256], subject[SHOWN_BYTES + 4];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    if (r->record != NULL)
        return kvm_fail(KVMIX_FORMAT, "%.300s: byte %" PRIu64 ", %s '%s': %s; the file is damaged or cut off, get it "
                        "again", r->file->name, at, r->record, printable(r->subject, subject), what);
    return kvm_fail(KVMIX_FORMAT, "%.300s: byte %" PRIu64 ": %s; the file is damaged or cut off, get it again",
                    r->file->name, at, what);
}

static kvmix_status out_of_memory(const kvm_gguf *file, const char *what, uint64_t count) {
    return kvm_fail(KVMIX_NOMEM, "%.300s: not enough memory for %" PRIu64 " %s", file->name, count, what);
}

/* ---- names ------------------------------------------------------------------------------------------------- */

static kvmix_status table_init(name_table *table, const kvm_gguf *file, uint64_t n_names) {
    uint64_t n_slots = 2;
    while (n_slots / 2 < n_names) n_slots <<= 1;
    table->slots = kvm_alloc_zero(n_slots, sizeof table->slots[0]);
    if (table->slots == NULL) return out_of_memory(file, "slots of a name table", n_slots);
    table->mask = n_slots - 1;
    table->seed = (uintptr_t)table->slots; /* an address differs from run to run: no file can collide on purpose */
    return KVMIX_OK;
}

/* FNV-1a, folded because only the low bits choose the slot. */
static uint64_t hash_text(kvm_text text, uint64_t seed) {
    uint64_t hash = seed ^ UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < text.n_bytes; i++) {
        hash ^= (uint8_t)text.data[i];
        hash *= UINT64_C(0x100000001b3);
    }
    return hash ^ (hash >> 32);
}

/* The slot that holds `name`, or the empty one where it belongs. */
static const kvm_text **table_slot(const name_table *table, kvm_text name) {
    uint64_t i = hash_text(name, table->seed) & table->mask;
    for (const kvm_text *held; (held = table->slots[i]) != NULL; i = (i + 1) & table->mask)
        if (held->n_bytes == name.n_bytes && memcmp(held->data, name.data, name.n_bytes) == 0) break;
    return &table->slots[i];
}

/* false when the name is there already */
static bool table_insert(name_table *table, const kvm_text *name) {
    const kvm_text **slot = table_slot(table, *name);
    if (*slot != NULL) return false;
    *slot = name;
    return true;
}

static const void *table_find(const name_table *table, const char *name) {
    return *table_slot(table, (kvm_text){name, strlen(name)});
}

/* ---- the bytes of the header ------------------------------------------------------------------------------- */

/* The next n bytes. */
static kvmix_status take(reader *r, uint64_t n, const char *what, const uint8_t **out) {
    uint64_t left = r->end - r->pos;
    if (n > left && r->end < r->file->n_bytes)
        return damaged(r, r->pos, "%s of %" PRIu64 " bytes ends past %" PRIu64 ", the limit of the header", what, n,
                       MAX_HEADER_BYTES);
    if (n > left)
        return damaged(r, r->pos, "%s needs %" PRIu64 " bytes, %" PRIu64 " are left", what, n, left);
    *out = &r->file->bytes[r->pos];
    r->pos += n;
    return KVMIX_OK;
}

/* An integer of n_bytes into *out. */
static kvmix_status take_number(reader *r, uint64_t n_bytes, const char *what, void *out) {
    const uint8_t *bytes = NULL;
    KVM_TRY(take(r, n_bytes, what, &bytes));
    memcpy(out, bytes, n_bytes);
    return KVMIX_OK;
}

static kvmix_status take_u32(reader *r, const char *what, uint32_t *out) { return take_number(r, 4, what, out); }
static kvmix_status take_u64(reader *r, const char *what, uint64_t *out) { return take_number(r, 8, what, out); }

static kvmix_status take_string(reader *r, const char *what, uint64_t low, uint64_t high, kvm_text *out) {
    uint64_t at = r->pos, n;
    const uint8_t *bytes = NULL;
    KVM_TRY(take_u64(r, what, &n));
    if (n < low || n > high)
        return damaged(r, at, "%s has %" PRIu64 " bytes, allowed are %" PRIu64 " to %" PRIu64, what, n, low, high);
    KVM_TRY(take(r, n, what, &bytes));
    *out = (kvm_text){(const char *)bytes, n};
    return KVMIX_OK;
}

/* A number of records, each at least min_bytes long. */
static kvmix_status take_count(reader *r, const char *what, uint64_t high, uint64_t min_bytes, uint64_t *out) {
    uint64_t at = r->pos;
    KVM_TRY(take_u64(r, "a count", out));
    if (*out > high) return damaged(r, at, "%" PRIu64 " %s, at most %" PRIu64 " are allowed", *out, what, high);
    if (*out > (r->end - r->pos) / min_bytes)
        return damaged(r, at, "%" PRIu64 " %s do not fit the %" PRIu64 " bytes left", *out, what, r->end - r->pos);
    return KVMIX_OK;
}

/* ---- the start of the file --------------------------------------------------------------------------------- */

static bool starts_with(const kvm_gguf *file, const char *text) {
    size_t n = strlen(text);
    return file->n_bytes >= n && memcmp(file->bytes, text, n) == 0;
}

/* What a file without the magic is, as far as one can tell. */
static const char *wrong_kind(const kvm_gguf *file) {
    if (file->n_bytes == 0) return "the file is empty; get it again";
    if (starts_with(file, "version https://git-lfs"))
        return "this is a Git LFS pointer, not the model; run 'git lfs pull' or download the file itself";
    if (file->n_bytes > 8 && file->bytes[8] == '{') {
        uint64_t n_json;
        memcpy(&n_json, file->bytes, sizeof n_json);
        if (n_json <= file->n_bytes - 8) return "this is a safetensors file; convert it to GGUF first";
    }
    uint64_t i = 0;
    while (i < file->n_bytes && file->bytes[i] != 0 && strchr(" \t\r\n", file->bytes[i]) != NULL) i++;
    if (i < file->n_bytes && file->bytes[i] == '<')
        return "this is an HTML page, not a model: the download was answered by a web page; check its address";
    return "this is no GGUF file, which begins with the bytes 'GGUF'";
}

static kvmix_status read_magic(reader *r) {
    uint32_t version;
    if (!starts_with(r->file, "GGUF"))
        return kvm_fail(KVMIX_FORMAT, "%.300s: byte 0: %s", r->file->name, wrong_kind(r->file));
    r->pos = 4;
    KVM_TRY(take_u32(r, "the version", &version));
    if (version == 2 || version == 3) return KVMIX_OK;
    if (version != 0 && (version & 0xffffu) == 0)
        return kvm_fail(KVMIX_UNSUPPORTED, "%.300s: byte 4: this is a big-endian GGUF, only little-endian ones are "
                        "read; convert it again for this machine", r->file->name);
    if (version == 0) return damaged(r, 4, "there is no GGUF version 0");
    return kvm_fail(KVMIX_UNSUPPORTED, "%.300s: byte 4: GGUF version %" PRIu32 ", versions 2 and 3 are read; convert "
                    "the model again", r->file->name, version);
}

/* ---- keys and values --------------------------------------------------------------------------------------- */

static bool is_utf8(kvm_text text) {
    const uint8_t *p = (const uint8_t *)text.data, *end = &p[text.n_bytes];
    while (p < end) {
        uint8_t lead = *p++;
        if (lead < 0x80) continue;
        int n_more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
        if (lead < 0xc2 || lead > 0xf4 || end - p < n_more) return false;
        /* the second byte rules out long forms, surrogates and what lies above U+10FFFF */
        uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (*p < low || *p > high) return false;
        for (p++; n_more > 1; n_more--, p++)
            if ((*p & 0xc0) != 0x80) return false;
    }
    return true;
}

/* The elements of a value whose type and count are known. */
static kvmix_status read_elements(reader *r, bool is_array, kvm_gguf_array *value) {
    uint64_t at = r->pos, n_bytes;
    value->data = &r->file->bytes[at];
    if (value->type == KVM_GGUF_STRING) {
        kvm_text text = {NULL, 0};
        for (uint64_t i = 0; i < value->n; i++) KVM_TRY(take_string(r, "a string", 0, MAX_STRING_BYTES, &text));
        /* tokens of a vocabulary may be any bytes, a single string is text */
        if (!is_array && !is_utf8(text)) return damaged(r, at, "the string is not UTF-8");
        return KVMIX_OK;
    }
    if (!kvm_mul(value->n, value_types[value->type].n_bytes, &n_bytes)) return damaged(r, at, "the size overflows");
    KVM_TRY(take(r, n_bytes, "the value", &value->data));
    for (uint64_t i = 0; value->type == KVM_GGUF_BOOL && i < value->n; i++)
        if (value->data[i] > 1) return damaged(r, at, "a bool is %d, allowed are 0 and 1", value->data[i]);
    return KVMIX_OK;
}

static kvmix_status read_key(reader *r, key_entry *entry) {
    uint64_t at = r->pos;
    uint32_t type;
    r->record = NULL;
    KVM_TRY(take_string(r, "a key", 1, MAX_KEY_BYTES, &entry->name));
    r->record = "key";
    r->subject = entry->name;
    if (memchr(entry->name.data, 0, entry->name.n_bytes) != NULL) return damaged(r, at, "the name holds a zero byte");
    if (!table_insert(&r->file->key_table, &entry->name)) return damaged(r, at, "the name is there twice");

    at = r->pos;
    KVM_TRY(take_u32(r, "the type", &type));
    entry->is_array = type == KVM_GGUF_ARRAY;
    entry->value.n = 1;
    if (entry->is_array) {
        at = r->pos;
        KVM_TRY(take_u32(r, "the element type", &type));
        if (type == KVM_GGUF_ARRAY) return damaged(r, at, "an array of arrays is not allowed");
    }
    if (type >= KVM_GGUF_TYPE_COUNT)
        return damaged(r, at, "type %" PRIu32 ", the last known is %d", type, KVM_GGUF_TYPE_COUNT - 1);
    entry->value.type = (kvm_gguf_type)type;
    if (entry->is_array)
        KVM_TRY(take_count(r, "elements", MAX_ELEMENTS, value_types[type].n_bytes, &entry->value.n));
    return read_elements(r, entry->is_array, &entry->value);
}

/* ---- tensors ----------------------------------------------------------------------------------------------- */

#define X(id, name, gguf, values, bytes) ", " name
static const char known_types[] = KVM_DTYPE_LIST(X);
#undef X

static kvmix_status read_dims(reader *r, kvm_gguf_tensor *tensor) {
    uint64_t at = r->pos;
    uint32_t n_dims;
    KVM_TRY(take_u32(r, "the number of dimensions", &n_dims));
    if (n_dims < 1 || n_dims > 4)
        return damaged(r, at, "%" PRIu32 " dimensions, allowed are 1 to 4", n_dims);
    tensor->n_dims = (int32_t)n_dims;
    tensor->n_values = 1;
    for (uint32_t i = 0; i < 4; i++) {
        tensor->dim[i] = 1;
        if (i >= n_dims) continue;
        at = r->pos;
        KVM_TRY(take_u64(r, "a dimension", &tensor->dim[i]));
        if (tensor->dim[i] == 0) return damaged(r, at, "dimension %" PRIu32 " is 0, at least 1 is needed", i);
        if (!kvm_mul(tensor->n_values, tensor->dim[i], &tensor->n_values) || tensor->n_values > INT64_MAX)
            return damaged(r, at, "the dimensions' product passes %" PRId64, INT64_MAX);
    }
    return KVMIX_OK;
}

static kvmix_status read_tensor(reader *r, kvm_gguf_tensor *tensor, extent *place) {
    uint64_t at = r->pos;
    uint32_t type;
    const char *type_name;
    char shown[SHOWN_BYTES + 4];
    r->record = NULL;
    KVM_TRY(take_string(r, "a tensor name", 1, MAX_TENSOR_NAME, &tensor->name));
    r->record = "tensor";
    r->subject = tensor->name;
    for (size_t i = 0; i < tensor->name.n_bytes; i++)
        if (tensor->name.data[i] < ' ' || tensor->name.data[i] > '~')
            return damaged(r, at, "the name holds byte %d, which is not printable", (uint8_t)tensor->name.data[i]);
    if (!table_insert(&r->file->tensor_table, &tensor->name)) return damaged(r, at, "the name is there twice");
    KVM_TRY(read_dims(r, tensor));

    at = r->pos;
    KVM_TRY(take_u32(r, "the type", &type));
    if (!kvm_dtype_from_gguf(type, &tensor->type, &type_name))
        return kvm_fail(KVMIX_UNSUPPORTED, "%.300s: byte %" PRIu64 ", tensor '%s': type %s (%" PRIu32 ") cannot be "
                        "run; get the model with weights in %s", r->file->name, at, printable(tensor->name, shown),
                        type_name == NULL ? "unknown" : type_name, type, &known_types[2]);
    const kvm_dtype_info *info = &kvm_dtypes[tensor->type];
    uint64_t block_values = (uint64_t)info->block_values;
    if (tensor->dim[0] % block_values != 0)
        return damaged(r, at, "rows of %" PRIu64 " values are no multiple of %s's block of %" PRIu64, tensor->dim[0],
                       info->name, block_values);
    if (!kvm_mul(tensor->n_values / block_values, (uint64_t)info->block_bytes, &tensor->n_bytes))
        return damaged(r, at, "the size of %" PRIu64 " values of %s overflows", tensor->n_values, info->name);

    at = r->pos;
    KVM_TRY(take_u64(r, "the offset", &place->begin));
    if (!kvm_add(place->begin, tensor->n_bytes, &place->end))
        return damaged(r, at, "offset %" PRIu64 " and size %" PRIu64 " overflow", place->begin, tensor->n_bytes);
    place->at = at;
    place->name = &tensor->name;
    tensor->index = (int32_t)r->file->n_tensors;
    return KVMIX_OK;
}

static int by_begin(const void *left, const void *right) {
    const extent *a = left, *b = right;
    return a->begin < b->begin ? -1 : a->begin > b->begin;
}

/* Points the tensors at their data, once the header's end and the alignment are known. */
static kvmix_status place_tensors(reader *r, uint64_t alignment) {
    kvm_gguf *file = r->file;
    uint64_t start;
    file->n_header_bytes = file->n_bytes;
    if (file->n_tensors == 0) return KVMIX_OK;
    r->record = NULL;
    if (!kvm_round_up(r->pos, alignment, &start) || start > file->n_bytes)
        return damaged(r, r->pos, "the tensor data is missing: the file ends at byte %" PRIu64, file->n_bytes);
    file->n_header_bytes = start;
    const uint8_t *data = &file->bytes[start];
    uint64_t n_data = file->n_bytes - start;
    r->record = "tensor";
    for (uint64_t i = 0; i < file->n_tensors; i++) {
        const extent *place = &r->extents[i];
        r->subject = *place->name;
        if (place->begin % alignment != 0)
            return damaged(r, place->at, "offset %" PRIu64 " is no multiple of the alignment %" PRIu64, place->begin,
                           alignment);
        if (place->end > n_data)
            return damaged(r, place->at, "its data ends at %" PRIu64 ", past the %" PRIu64 " bytes of tensor data",
                           place->end, n_data);
        file->tensors[i].data = &data[place->begin];
    }
    qsort(r->extents, file->n_tensors, sizeof *r->extents, by_begin);
    for (uint64_t i = 1; i < file->n_tensors; i++) {
        const extent *before = &r->extents[i - 1], *place = &r->extents[i];
        char shown[SHOWN_BYTES + 4];
        r->subject = *place->name;
        if (place->begin < before->end)
            return damaged(r, place->at, "its data at offset %" PRIu64 " overlaps that of '%s', which ends at %" PRIu64,
                           place->begin, printable(*before->name, shown), before->end);
    }
    return KVMIX_OK;
}

/* ---- opening ----------------------------------------------------------------------------------------------- */

static kvmix_status read_alignment(reader *r, uint64_t *alignment) {
    const key_entry *entry = table_find(&r->file->key_table, "general.alignment");
    if (entry == NULL) return KVMIX_OK;
    uint64_t at = (uint64_t)(entry->value.data - r->file->bytes);
    r->record = "key";
    r->subject = entry->name;
    if (entry->is_array || entry->value.type != KVM_GGUF_U32) return damaged(r, at, "the alignment must be a u32");
    uint32_t value;
    memcpy(&value, entry->value.data, sizeof value);
    if (value < MIN_ALIGNMENT || value > MAX_ALIGNMENT || (value & (value - 1)) != 0)
        return damaged(r, at, "alignment %" PRIu32 ", allowed are powers of two from %d to %d", value, MIN_ALIGNMENT,
                       MAX_ALIGNMENT);
    *alignment = value;
    return KVMIX_OK;
}

static kvmix_status read_header(reader *r) {
    kvm_gguf *file = r->file;
    uint64_t n_tensors, n_keys, alignment = DEFAULT_ALIGNMENT;
    KVM_TRY(read_magic(r));
    KVM_TRY(take_count(r, "tensors", MAX_TENSORS, MIN_TENSOR_RECORD, &n_tensors));
    KVM_TRY(take_count(r, "keys", MAX_KEYS, MIN_KEY_RECORD, &n_keys));

    file->keys = kvm_alloc_zero(n_keys, sizeof file->keys[0]);
    file->tensors = kvm_alloc_zero(n_tensors, sizeof file->tensors[0]);
    r->extents = kvm_alloc_zero(n_tensors, sizeof r->extents[0]);
    if (file->keys == NULL) return out_of_memory(file, "keys", n_keys);
    if (file->tensors == NULL || r->extents == NULL) return out_of_memory(file, "tensors", n_tensors);
    KVM_TRY(table_init(&file->key_table, file, n_keys));
    KVM_TRY(table_init(&file->tensor_table, file, n_tensors));

    for (; file->n_keys < n_keys; file->n_keys++) KVM_TRY(read_key(r, &file->keys[file->n_keys]));
    KVM_TRY(read_alignment(r, &alignment));
    for (; file->n_tensors < n_tensors; file->n_tensors++)
        KVM_TRY(read_tensor(r, &file->tensors[file->n_tensors], &r->extents[file->n_tensors]));
    return place_tensors(r, alignment);
}

static kvmix_status parse(kvm_gguf *file) {
    reader r = {.file = file, .end = file->n_bytes < MAX_HEADER_BYTES ? file->n_bytes : MAX_HEADER_BYTES};
    kvmix_status status = read_header(&r);
    free(r.extents);
    return status;
}

static kvmix_status new_file(kvm_gguf **out, const char *name) {
    if (name == NULL) return kvm_fail(KVMIX_ARG, "no path was given for the model");
    kvm_gguf *file = kvm_alloc_zero(1, sizeof(kvm_gguf));
    if (file != NULL && (file->name = strdup(name)) != NULL) {
        *out = file;
        return KVMIX_OK;
    }
    free(file);
    return kvm_fail(KVMIX_NOMEM, "%.300s: not enough memory to open the file", name);
}

/* Closes the object again where opening it failed. */
static kvmix_status finish(kvm_gguf **out, kvm_gguf *file, kvmix_status status) {
    if (status == KVMIX_OK) *out = file;
    else kvm_gguf_close(file);
    return status;
}

static kvmix_status map_bytes(kvm_gguf *file, int fd) {
    void *memory = mmap(NULL, file->n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED)
        return kvm_fail(KVMIX_IO, "%.300s: cannot map %" PRIu64 " bytes: %m; open it without mmap", file->name,
                        file->n_bytes);
    file->bytes = memory;
    file->storage = MAPPED;
    return KVMIX_OK;
}

static kvmix_status read_bytes(kvm_gguf *file, int fd) {
    uint8_t *memory = kvm_alloc(1, file->n_bytes);
    if (memory == NULL) return out_of_memory(file, "bytes of the file; open it with mmap", file->n_bytes);
    file->bytes = memory;
    file->storage = ALLOCATED;
    for (uint64_t done = 0; done < file->n_bytes;) {
        ssize_t n = read(fd, &memory[done], file->n_bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return kvm_fail(KVMIX_IO, "%.300s: cannot read at byte %" PRIu64 ": %m", file->name, done);
        if (n == 0)
            return kvm_fail(KVMIX_IO, "%.300s: ended at byte %" PRIu64 " of %" PRIu64 " while it was read; is it still "
                            "being written?", file->name, done, file->n_bytes);
        done += (uint64_t)n;
    }
    return KVMIX_OK;
}

static kvmix_status load_open_file(kvm_gguf *file, int fd, bool use_mmap) {
    struct stat info;
    if (fstat(fd, &info) != 0) return kvm_fail(KVMIX_IO, "%.300s: cannot be examined: %m", file->name);
    if (S_ISDIR(info.st_mode))
        return kvm_fail(KVMIX_IO, "%.300s: this is a folder; give the path of a GGUF file", file->name);
    if (!S_ISREG(info.st_mode))
        return kvm_fail(KVMIX_IO, "%.300s: this is no regular file; give the path of a GGUF file", file->name);
    file->n_bytes = (uint64_t)info.st_size;
    if (file->n_bytes == 0) return KVMIX_OK; /* nothing to map; the parser names it */
    return use_mmap ? map_bytes(file, fd) : read_bytes(file, fd);
}

static kvmix_status load(kvm_gguf *file, bool use_mmap) {
    int fd = open(file->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* not waiting for the writer of a pipe */
    if (fd < 0) return kvm_fail(KVMIX_IO, "%.300s: cannot be opened: %m", file->name);
    kvmix_status status = load_open_file(file, fd, use_mmap);
    close(fd);
    return status;
}

kvmix_status kvm_gguf_open(kvm_gguf **out, const char *path, bool use_mmap) {
    kvm_gguf *file = NULL;
    *out = NULL;
    KVM_TRY(new_file(&file, path));
    kvmix_status status = load(file, use_mmap);
    if (status == KVMIX_OK) status = parse(file);
    return finish(out, file, status);
}

kvmix_status kvm_gguf_open_memory(kvm_gguf **out, const void *data, size_t n_bytes, const char *name) {
    kvm_gguf *file = NULL;
    *out = NULL;
    KVM_TRY(new_file(&file, name));
    file->bytes = data;
    file->n_bytes = n_bytes;
    return finish(out, file, parse(file));
}

void kvm_gguf_close(kvm_gguf *file) {
    if (file == NULL) return;
    kvm_gguf_close(file->next);
    if (file->storage == MAPPED) munmap((void *)file->bytes, file->n_bytes);
    if (file->storage == ALLOCATED) free((void *)file->bytes);
    free(file->key_table.slots);
    free(file->tensor_table.slots);
    free(file->keys);
    free(file->tensors);
    free(file->name);
    free(file);
}

/* ---- questions --------------------------------------------------------------------------------------------- */

const char *kvm_gguf_name(const kvm_gguf *file) { return file->name; }

uint64_t kvm_gguf_file_bytes(const kvm_gguf *file) {
    uint64_t n_bytes = 0;
    for (; file != NULL; file = file->next) n_bytes += file->n_bytes;
    return n_bytes;
}

uint32_t kvm_gguf_header_crc32(const kvm_gguf *file) {
    return kvm_hash_crc32(0, file->bytes, (size_t)file->n_header_bytes);
}

int32_t kvm_gguf_n_tensors(const kvm_gguf *file) {
    uint64_t n_tensors = 0;
    for (; file != NULL; file = file->next) n_tensors += file->n_tensors;
    return (int32_t)n_tensors;
}

const kvm_gguf_tensor *kvm_gguf_tensor_at(const kvm_gguf *file, int32_t index) {
    uint64_t i = (uint64_t)index;
    for (; i >= file->n_tensors; file = file->next) i -= file->n_tensors;
    return &file->tensors[i];
}

const kvm_gguf_tensor *kvm_gguf_find(const kvm_gguf *file, const char *name) {
    const kvm_gguf_tensor *found = NULL;
    for (; file != NULL && found == NULL; file = file->next) found = table_find(&file->tensor_table, name);
    return found;
}

void kvm_gguf_append(kvm_gguf *file, kvm_gguf *part) {
    for (uint64_t i = 0; i < part->n_tensors; i++) part->tensors[i].index += kvm_gguf_n_tensors(file);
    while (file->next != NULL) file = file->next;
    file->next = part;
}

static const key_entry *find_key(const kvm_gguf *file, const char *key, bool *found) {
    const key_entry *entry = table_find(&file->key_table, key);
    *found = entry != NULL;
    return entry;
}

static kvmix_status wrong_type(const kvm_gguf *file, const char *key, const key_entry *entry, const char *wanted) {
    return kvm_fail(KVMIX_FORMAT, "%.300s: key %s is %s%s, wanted is %s; convert the model again", file->name, key,
                    entry->is_array ? "an array of " : "of type ", value_types[entry->value.type].name, wanted);
}

kvmix_status kvm_gguf_get_int(const kvm_gguf *file, const char *key, int64_t low, int64_t high, int64_t *value,
                              bool *found) {
    const key_entry *entry = find_key(file, key, found);
    if (entry == NULL) return KVMIX_OK;
    enum value_kind kind = value_types[entry->value.type].kind;
    if (entry->is_array || kind == OTHER) return wrong_type(file, key, entry, "an integer");

    uint64_t bits = 0;
    uint32_t n_bytes = value_types[entry->value.type].n_bytes, unused_bits = 64 - (n_bytes << 3);
    memcpy(&bits, entry->value.data, n_bytes);
    bool past_i64 = kind == UNSIGNED && bits > INT64_MAX;
    int64_t number = past_i64           ? INT64_MAX
                     : kind == UNSIGNED ? (int64_t)bits
                                        : (int64_t)(bits << unused_bits) >> unused_bits;
    if (past_i64 || number < low || number > high)
        return kvm_fail(KVMIX_FORMAT, "%.300s: key %s is %s%" PRId64 ", allowed are %" PRId64 " to %" PRId64
                        "; convert the model again", file->name, key, past_i64 ? "above " : "", number, low, high);
    *value = number;
    return KVMIX_OK;
}

kvmix_status kvm_gguf_get_float(const kvm_gguf *file, const char *key, float *value, bool *found) {
    const key_entry *entry = find_key(file, key, found);
    if (entry == NULL) return KVMIX_OK;
    float loaded;
    if (!entry->is_array && entry->value.type == KVM_GGUF_F32) {
        memcpy(&loaded, entry->value.data, sizeof loaded);
    } else if (!entry->is_array && entry->value.type == KVM_GGUF_F64) {
        double wide;
        memcpy(&wide, entry->value.data, sizeof wide);
        loaded = (float)wide;
    } else {
        return wrong_type(file, key, entry, "f32 or f64");
    }
    if (!isfinite(loaded))
        return kvm_fail(KVMIX_FORMAT, "%.300s: key %s is %g, a finite f32 is wanted; convert the model again",
                        file->name, key, (double)loaded);
    *value = loaded;
    return KVMIX_OK;
}

kvmix_status kvm_gguf_get_bool(const kvm_gguf *file, const char *key, bool *value, bool *found) {
    const key_entry *entry = find_key(file, key, found);
    if (entry == NULL) return KVMIX_OK;
    if (entry->is_array || entry->value.type != KVM_GGUF_BOOL) return wrong_type(file, key, entry, "bool");
    *value = *entry->value.data != 0;
    return KVMIX_OK;
}

kvmix_status kvm_gguf_get_text(const kvm_gguf *file, const char *key, kvm_text *value, bool *found) {
    const key_entry *entry = find_key(file, key, found);
    if (entry == NULL) return KVMIX_OK;
    if (entry->is_array || entry->value.type != KVM_GGUF_STRING) return wrong_type(file, key, entry, "string");
    kvm_gguf_array_texts(&entry->value, value);
    return KVMIX_OK;
}

kvmix_status kvm_gguf_get_array(const kvm_gguf *file, const char *key, kvm_gguf_type type, kvm_gguf_array *value,
                                bool *found) {
    const key_entry *entry = find_key(file, key, found);
    if (entry == NULL) return KVMIX_OK;
    if (!entry->is_array || entry->value.type != type) {
        char wanted[32];
        snprintf(wanted, sizeof wanted, "an array of %s", value_types[type].name);
        return wrong_type(file, key, entry, wanted);
    }
    *value = entry->value;
    return KVMIX_OK;
}

void kvm_gguf_array_texts(const kvm_gguf_array *array, kvm_text *texts) {
    const uint8_t *next = array->data;
    for (uint64_t i = 0; i < array->n; i++) {
        uint64_t n;
        memcpy(&n, next, sizeof n);
        texts[i] = (kvm_text){(const char *)&next[sizeof n], n};
        next = &next[sizeof n];
        next = &next[n];
    }
}
