/* test_gguf.c - the GGUF reader over files built in memory: what it hands out, what it refuses, and many mutants.
 *
 * Every file under test ends where an inaccessible page begins, so that a read past its end is a crash even without a
 * sanitizer. The mutants are seeded: a failure names the number of the mutant and comes again.
 *
 * test_gguf [FILE]     with a file of at most 64 KiB, that file's mutants instead of the built one's
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "gguf.h"

/* ---- a file in memory --------------------------------------------------------------------------------------- */

enum { FILE_MAX = 1 << 16, PAGE = 4096 };

enum { MAX_FIELDS = 256 };

typedef struct {
    uint8_t bytes[FILE_MAX];
    size_t n;
    size_t fields[MAX_FIELDS]; /* where the numbers of the header are */
    size_t n_fields;
} image;

static void put(image *file, const void *data, size_t n) {
    memcpy(&file->bytes[file->n], data, n);
    file->n += n;
}

static void put_field(image *file, const void *data, size_t n) {
    if (file->n_fields < MAX_FIELDS) file->fields[file->n_fields++] = file->n;
    put(file, data, n);
}

static void put_u32(image *file, uint32_t value) { put_field(file, &value, sizeof value); }
static void put_u64(image *file, uint64_t value) { put_field(file, &value, sizeof value); }

static void put_string(image *file, const char *text) {
    put_u64(file, strlen(text));
    put(file, text, strlen(text));
}

static void put_key(image *file, const char *key, kvm_gguf_type type) {
    put_string(file, key);
    put_u32(file, (uint32_t)type);
}

static void put_value(image *file, const char *key, kvm_gguf_type type, const void *value, size_t n_bytes) {
    put_key(file, key, type);
    put_field(file, value, n_bytes);
}

static void put_array(image *file, const char *key, kvm_gguf_type type, uint64_t n) {
    put_key(file, key, KVM_GGUF_ARRAY);
    put_u32(file, (uint32_t)type);
    put_u64(file, n);
}

static void put_tensor(image *file, const char *name, uint32_t n_dims, uint64_t dim0, uint64_t dim1, uint32_t type,
                       uint64_t offset) {
    put_string(file, name);
    put_u32(file, n_dims);
    put_u64(file, dim0);
    if (n_dims > 1) put_u64(file, dim1);
    put_u32(file, type);
    put_u64(file, offset);
}

static const char *const words[] = {"a", "", "bc", "\xff", "longer than eight bytes"};
enum { N_WORDS = 5, N_KEYS = 17, N_TENSORS = 3 };

/* A file with every value type and three tensors. */
static void build(image *file) {
    static const int32_t ints[3] = {-1, 0, 7};
    uint16_t u16 = 65535;
    int16_t i16 = -32768;
    uint32_t u32 = 4294967295u, alignment = 64;
    int32_t i32 = INT32_MIN;
    uint64_t u64 = UINT64_MAX;
    int64_t i64 = INT64_MIN;
    float f32 = 0.5f;
    double f64 = -0.25, huge = 1e300;
    file->n = 0;
    put(file, "GGUF", 4);
    put_u32(file, 3);
    put_u64(file, N_TENSORS);
    put_u64(file, N_KEYS);
    put_value(file, "general.alignment", KVM_GGUF_U32, &alignment, 4);
    put_value(file, "u8", KVM_GGUF_U8, "\xff", 1);
    put_value(file, "i8", KVM_GGUF_I8, "\x80", 1);
    put_value(file, "u16", KVM_GGUF_U16, &u16, 2);
    put_value(file, "i16", KVM_GGUF_I16, &i16, 2);
    put_value(file, "u32", KVM_GGUF_U32, &u32, 4);
    put_value(file, "i32", KVM_GGUF_I32, &i32, 4);
    put_value(file, "u64", KVM_GGUF_U64, &u64, 8);
    put_value(file, "i64", KVM_GGUF_I64, &i64, 8);
    put_value(file, "f32", KVM_GGUF_F32, &f32, 4);
    put_value(file, "f64", KVM_GGUF_F64, &f64, 8);
    put_value(file, "huge", KVM_GGUF_F64, &huge, 8);
    put_value(file, "bool", KVM_GGUF_BOOL, "\1", 1);
    put_key(file, "text", KVM_GGUF_STRING);
    put_string(file, "h\xc3\xa9llo");
    put_array(file, "words", KVM_GGUF_STRING, N_WORDS);
    for (int i = 0; i < N_WORDS; i++) put_string(file, words[i]);
    put_array(file, "ints", KVM_GGUF_I32, 3);
    put(file, ints, sizeof ints);
    put_array(file, "none", KVM_GGUF_F32, 0);
    put_tensor(file, "second", 2, 32, 3, 8, 128); /* Q8_0, 102 bytes: the order in the header is not that of the data */
    put_tensor(file, "first", 1, 20, 0, 0, 0);    /* F32, 80 bytes */
    put_tensor(file, "third", 1, 4, 0, 1, 256);   /* F16, 8 bytes, after a gap */
    while (file->n % 64 != 0) put(file, "", 1);
    for (int i = 0; i < 264; i++) put(file, &(uint8_t){(uint8_t)i}, 1);
}

static uint8_t *guard; /* FILE_MAX bytes, then a page that must not be touched */

static bool guard_init(void) {
    guard = mmap(NULL, FILE_MAX + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return guard != MAP_FAILED && mprotect(guard + FILE_MAX, PAGE, PROT_NONE) == 0;
}

static kvmix_status open_image(kvm_gguf **out, const image *file) {
    uint8_t *data = guard + FILE_MAX - file->n;
    memcpy(data, file->bytes, file->n);
    return kvm_gguf_open_memory(out, data, file->n, "mem");
}

/* ---- what a good file gives ---------------------------------------------------------------------------------- */

static void test_integers(const kvm_gguf *file) {
    static const struct { const char *key; int64_t value; } cases[] = {
        {"u8", 255}, {"i8", -128}, {"u16", 65535}, {"i16", -32768}, {"u32", 4294967295}, {"i32", INT32_MIN},
        {"i64", INT64_MIN}, {"general.alignment", 64},
    };
    int64_t value;
    bool found;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *key = cases[i].key;
        int64_t want = cases[i].value;
        value = 12345;
        CHECK_STATUS(KVMIX_OK, kvm_gguf_get_int(file, key, want, want, &value, &found));
        CHECK(found && value == want);
        value = 12345;
        if (want > INT64_MIN)
            CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, key, INT64_MIN, want - 1, &value, &found));
        CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, key, want + 1, INT64_MAX, &value, &found));
        CHECK(found && value == 12345);
        CHECK_SAYS(key);
    }
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, "u64", INT64_MIN, INT64_MAX, &value, &found));
    CHECK_SAYS("above 9223372036854775807");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, "f32", 0, 1, &value, &found));
    CHECK_SAYS("key f32 is of type f32, wanted is an integer");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, "ints", -1, 7, &value, &found));
    CHECK_SAYS("an array of i32");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_int(file, "bool", 0, 1, &value, &found));
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_int(file, "absent", 0, 1, &value, &found));
    CHECK(!found && value == 12345);
}

static void test_other_values(const kvm_gguf *file) {
    float number = 9;
    bool flag = false, found;
    kvm_text text = {0};
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_float(file, "f32", &number, &found));
    CHECK(found && number == 0.5f);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_float(file, "f64", &number, &found));
    CHECK(found && number == -0.25f);
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_float(file, "huge", &number, &found));
    CHECK_SAYS("finite");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_float(file, "u32", &number, &found));
    CHECK(number == -0.25f);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_bool(file, "bool", &flag, &found));
    CHECK(found && flag);
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_bool(file, "u8", &flag, &found));
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_text(file, "text", &text, &found));
    CHECK(found && text.n_bytes == 6 && memcmp(text.data, "h\xc3\xa9llo", 6) == 0);
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_text(file, "words", &text, &found));
    CHECK_SAYS("key words is an array of string, wanted is string");
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_float(file, "absent", &number, &found));
    CHECK(!found);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_bool(file, "absent", &flag, &found));
    CHECK(!found);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_text(file, "absent", &text, &found));
    CHECK(!found && text.n_bytes == 6);
}

static void test_arrays(const kvm_gguf *file) {
    kvm_gguf_array array = {0};
    kvm_text texts[N_WORDS];
    int32_t ints[3];
    bool found;
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_array(file, "words", KVM_GGUF_STRING, &array, &found));
    if (!CHECK(found && array.n == N_WORDS)) return;
    kvm_gguf_array_texts(&array, texts);
    for (int i = 0; i < N_WORDS; i++)
        CHECK(texts[i].n_bytes == strlen(words[i]) && memcmp(texts[i].data, words[i], texts[i].n_bytes) == 0);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_array(file, "ints", KVM_GGUF_I32, &array, &found));
    if (!CHECK(found && array.n == 3)) return;
    memcpy(ints, array.data, sizeof ints);
    CHECK(ints[0] == -1 && ints[1] == 0 && ints[2] == 7);
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_array(file, "none", KVM_GGUF_F32, &array, &found));
    CHECK(found && array.n == 0);
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_array(file, "ints", KVM_GGUF_U32, &array, &found));
    CHECK_SAYS("key ints is an array of i32, wanted is an array of u32");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_get_array(file, "u32", KVM_GGUF_U32, &array, &found));
    CHECK_STATUS(KVMIX_OK, kvm_gguf_get_array(file, "absent", KVM_GGUF_U32, &array, &found));
    CHECK(!found);
}

static void test_tensors(const kvm_gguf *file) {
    static const struct {
        const char *name;
        kvm_dtype type;
        uint64_t n_values, n_bytes;
        uint8_t first_byte;
    } want[N_TENSORS] = {{"second", KVM_DTYPE_Q8_0, 96, 102, 128},
                         {"first", KVM_DTYPE_F32, 20, 80, 0},
                         {"third", KVM_DTYPE_F16, 4, 8, 0}};
    if (!CHECK(kvm_gguf_n_tensors(file) == N_TENSORS)) return;
    for (int i = 0; i < N_TENSORS; i++) {
        const kvm_gguf_tensor *tensor = kvm_gguf_tensor_at(file, i);
        CHECK(kvm_gguf_find(file, want[i].name) == tensor);
        CHECK(tensor->type == want[i].type && tensor->n_values == want[i].n_values);
        CHECK(tensor->n_bytes == want[i].n_bytes && *(const uint8_t *)tensor->data == want[i].first_byte);
        CHECK(tensor->dim[2] == 1 && tensor->dim[3] == 1);
    }
    CHECK(kvm_gguf_tensor_at(file, 0)->dim[0] == 32 && kvm_gguf_tensor_at(file, 0)->dim[1] == 3);
    CHECK(kvm_gguf_tensor_at(file, 0)->n_dims == 2 && kvm_gguf_tensor_at(file, 1)->n_dims == 1);
    CHECK(kvm_gguf_find(file, "firs") == NULL && kvm_gguf_find(file, "") == NULL);
}

static void test_good_file(const image *good) {
    kvm_gguf *file;
    if (!CHECK_STATUS(KVMIX_OK, open_image(&file, good))) return;
    CHECK(strcmp(kvm_gguf_name(file), "mem") == 0 && kvm_gguf_file_bytes(file) == good->n);
    test_integers(file);
    test_other_values(file);
    test_arrays(file);
    test_tensors(file);
    kvm_gguf_close(file);
    kvm_gguf_close(NULL);
}

/* ---- what cannot be opened at all ----------------------------------------------------------------------------- */

static void test_refusals(const image *good) {
    kvm_gguf *file = (kvm_gguf *)guard;
    CHECK_STATUS(KVMIX_ARG, kvm_gguf_open(&file, NULL, true));
    CHECK(file == NULL);
    CHECK_STATUS(KVMIX_IO, kvm_gguf_open(&file, "no/such/file.gguf", true));
    CHECK_SAYS("no/such/file.gguf: cannot be opened");
    CHECK_STATUS(KVMIX_IO, kvm_gguf_open(&file, "/", false));
    CHECK_SAYS("folder");
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_open_memory(&file, "", 0, "mem"));
    CHECK_SAYS("empty");

    static image newer;
    newer = *good;
    newer.bytes[4] = 4;
    CHECK_STATUS(KVMIX_UNSUPPORTED, open_image(&file, &newer));
    CHECK_SAYS("version 4");
}

/* A header that ends past 128 MiB: one array of strings, each within its limit. */
static void test_header_limit(void) {
    size_t n_bytes = (size_t)129 << 20;
    uint8_t *data = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!CHECK(data != MAP_FAILED)) return;
    static image head;
    kvm_gguf *file;
    uint64_t half = (uint64_t)64 << 20;
    head.n = 0;
    put(&head, "GGUF", 4);
    put_u32(&head, 3);
    put_u64(&head, 0);
    put_u64(&head, 1);
    put_array(&head, "a", KVM_GGUF_STRING, 2);
    put_u64(&head, half);
    memcpy(data, head.bytes, head.n);
    memcpy(data + head.n + half, &half, sizeof half);
    CHECK_STATUS(KVMIX_FORMAT, kvm_gguf_open_memory(&file, data, n_bytes, "mem"));
    CHECK_SAYS("ends past 134217728, the limit of the header");
    munmap(data, n_bytes);
}

/* ---- mutants ------------------------------------------------------------------------------------------------- */

static uint64_t random_state;

static uint32_t random_below(uint32_t n) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(((random_state * UINT64_C(0x2545f4914f6cdd1d)) >> 32) % n);
}

static void mutate(image *file) {
    const uint64_t sizes[] = {0, 1, 2, 7, 8, 31, 32, 63, 64, 65, 127, 255, 256, 65535, 65536, 65537, 1u << 24,
                              INT32_MAX, (uint64_t)1 << 31, UINT32_MAX, (uint64_t)1 << 32, INT64_MAX,
                              (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7, file->n - 1, file->n, file->n + 1};
    uint32_t n = (uint32_t)file->n, at = random_below(n), n_run;
    switch (random_below(6)) {
    case 0: file->bytes[at] ^= (uint8_t)(1u << random_below(8)); break;
    case 1: file->bytes[at] = (uint8_t)random_below(256); break;
    case 2: /* a field becomes a number that a check may miss */
        memcpy(&file->bytes[at], &sizes[random_below(sizeof sizes / sizeof *sizes)],
               n - at < 8 ? n - at : random_below(2) ? 8 : 4);
        break;
    case 3: /* one run of bytes is copied over another */
        n_run = 1 + random_below(n - at < 64 ? n - at : 64);
        memmove(&file->bytes[at], &file->bytes[random_below(n - n_run + 1)], n_run);
        break;
    case 4: /* a run is cut out, so that what follows shifts */
        n_run = 1 + random_below(n - at < 16 ? n - at : 16);
        memmove(&file->bytes[at], &file->bytes[at + n_run], n - at - n_run);
        file->n -= n_run;
        break;
    case 5: file->n = random_below(8) == 0 ? at + 1 : n; break; /* the end is missing */
    }
}

static volatile uint8_t touched;
enum { MAX_TEXTS = FILE_MAX / 8 }; /* each has a length of eight bytes */

/* Reads every byte that the file hands out and compares the tensors with the promises of gguf.h. */
static bool promises_kept(const kvm_gguf *file, const image *image_of_it) {
    const uint8_t *end = guard + FILE_MAX, *begin = end - image_of_it->n;
    int32_t n = kvm_gguf_n_tensors(file);
    for (int32_t i = 0; i < n; i++) {
        const kvm_gguf_tensor *a = kvm_gguf_tensor_at(file, i);
        const uint8_t *data = a->data;
        if (data < begin || data > end || a->n_bytes > (size_t)(end - data)) return false;
        if (a->n_dims < 1 || a->n_dims > 4) return false;
        if (a->n_bytes != kvm_dtype_row_bytes(a->type, (int64_t)a->n_values)) return false;
        for (uint64_t k = 0; k < a->n_bytes; k++) touched = data[k];
        for (int32_t j = 0; j < i; j++) {
            const kvm_gguf_tensor *b = kvm_gguf_tensor_at(file, j);
            const uint8_t *other = b->data;
            if (data < other + b->n_bytes && other < data + a->n_bytes) return false;
            if (a->name.n_bytes == b->name.n_bytes && memcmp(a->name.data, b->name.data, b->name.n_bytes) == 0)
                return false;
        }
    }
    kvm_gguf_array array;
    static kvm_text text, texts[MAX_TEXTS];
    bool found;
    if (kvm_gguf_get_text(file, "text", &text, &found) == KVMIX_OK && found)
        for (size_t k = 0; k < text.n_bytes; k++) touched = (uint8_t)text.data[k];
    static const char *const lists[] = {"words", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"};
    for (size_t list = 0; list < sizeof lists / sizeof *lists; list++) {
        if (kvm_gguf_get_array(file, lists[list], KVM_GGUF_STRING, &array, &found) != KVMIX_OK || !found) continue;
        if (array.n > MAX_TEXTS) return false;
        kvm_gguf_array_texts(&array, texts);
        for (uint64_t i = 0; i < array.n; i++)
            for (size_t k = 0; k < texts[i].n_bytes; k++) touched = (uint8_t)texts[i].data[k];
    }
    return true;
}

/* Opens the image; true when it gave a sound file, or a refusal with a whole sentence. */
static bool sound(const image *file, int32_t *n_accepted) {
    kvm_gguf *opened;
    kvmix_status status = open_image(&opened, file);
    if (status == KVMIX_OK) {
        bool kept = promises_kept(opened, file);
        kvm_gguf_close(opened);
        ++*n_accepted;
        return kept;
    }
    const char *said = kvmix_last_error();
    bool sentence = strncmp(said, "mem: byte ", 10) == 0 && strlen(said) < 800 && said[strlen(said) - 1] != '.';
    for (const char *c = said; *c != '\0'; c++) sentence = sentence && *c >= ' ' && *c <= '~';
    return sentence && opened == NULL && (status == KVMIX_FORMAT || status == KVMIX_UNSUPPORTED);
}

static void test_truncation(const image *good) {
    static image file;
    int32_t n_accepted = 0;
    for (size_t n = 0; n <= good->n; n++) {
        file = *good;
        file.n = n;
        if (!sound(&file, &n_accepted)) CHECK(!"a file cut short is refused with a sentence");
    }
    CHECK(n_accepted == 1); /* the last tensor ends with the file */
}

/* Each number of the header becomes each of those that a check is most likely to miss. */
static void test_fields(const image *good) {
    const uint64_t n = good->n, values[] = {0, 1, INT32_MAX, (uint64_t)1 << 31, UINT32_MAX, (uint64_t)1 << 32,
                                            INT64_MAX, (uint64_t)1 << 63, UINT64_MAX - 1, UINT64_MAX, n - 1, n, n + 1};
    static image file;
    int32_t n_accepted = 0;
    CHECK(good->n_fields > 75 && good->n_fields < MAX_FIELDS);
    for (size_t i = 0; i < good->n_fields; i++) {
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            for (size_t width = 4; width <= 8; width += 4) {
                file = *good;
                memcpy(&file.bytes[file.fields[i]], &values[j], width);
                if (!sound(&file, &n_accepted)) CHECK(!"a file with a changed number is opened soundly or refused");
            }
        }
    }
    CHECK(n_accepted > 0);
}

static void test_mutants(const image *good, int32_t n_mutants) {
    static image file;
    int32_t n_accepted = 0, n_unsound = 0;
    for (int32_t i = 0; i < n_mutants; i++) {
        random_state = UINT64_C(0x9e3779b97f4a7c15) * (uint64_t)(i + 1);
        memcpy(file.bytes, good->bytes, good->n);
        file.n = good->n;
        for (uint32_t k = random_below(4); file.n > 64; k--) {
            mutate(&file);
            if (k == 0) break;
        }
        if (sound(&file, &n_accepted)) continue;
        n_unsound++;
        fprintf(stderr, "mutant %d: %s\n", i, kvmix_last_error());
    }
    CHECK(n_unsound == 0);
    CHECK(n_accepted > n_mutants / 50 && n_accepted < n_mutants - n_mutants / 50); /* both ways were tried */
}

static bool read_image(image *file, const char *path) {
    FILE *stream = fopen(path, "rb");
    if (stream == NULL) return false;
    file->n = fread(file->bytes, 1, FILE_MAX, stream);
    bool whole = fgetc(stream) == EOF;
    fclose(stream);
    return whole;
}

int main(int argc, char **argv) {
    static image good;
    if (!CHECK(guard_init())) return check_report();
    if (argc > 1) {
        if (!CHECK(read_image(&good, argv[1]))) return check_report();
        test_truncation(&good);
        test_mutants(&good, 20000);
        return check_report();
    }
    build(&good);
    test_good_file(&good);
    test_refusals(&good);
    test_header_limit();
    test_truncation(&good);
    test_fields(&good);
    test_mutants(&good, 200000);
    return check_report();
}
