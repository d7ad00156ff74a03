/* test_state.c - what saved sessions stand on: checksums, sealed files, and images that come out of a file.
 *
 * (That a loaded session goes on as the one that was saved, and that damaged files are refused, is in test_state.py.)
 */
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "kvimage.h"
#include "sealed.h"

/* ---- chance -------------------------------------------------------------------------------------------------- */

static uint64_t chance = 88172645463325252u;

static int32_t below(int32_t n) { /* xorshift64* */
    chance ^= chance >> 12;
    chance ^= chance << 25;
    chance ^= chance >> 27;
    return (int32_t)((chance * 0x2545f4914f6cdd1du >> 33) % (uint64_t)n);
}

/* ---- checksums ----------------------------------------------------------------------------------------------- */

static void check_sha256(const char *text, size_t n_bytes, const char *want) {
    kvm_sha256 s;
    uint8_t hash[KVM_SHA256_BYTES];
    char hex[2 * KVM_SHA256_BYTES + 1];
    kvm_hash_sha256_init(&s);
    for (size_t at = 0; at < n_bytes;) { /* in pieces of every length */
        size_t n = (size_t)below(100);
        if (n > n_bytes - at) n = n_bytes - at;
        kvm_hash_sha256_add(&s, text + at, n);
        at += n;
    }
    kvm_hash_sha256_finish(&s, hash);
    for (int32_t i = 0; i < KVM_SHA256_BYTES; i++) snprintf(hex + 2 * i, 3, "%02x", hash[i]);
    if (!CHECK(strcmp(hex, want) == 0)) fprintf(stderr, "    %zu bytes: %s\n", n_bytes, hex);
}

static void test_checksums(void) {
    static char million[1000000];
    memset(million, 'a', sizeof million);
    check_sha256("", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    check_sha256("abc", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    check_sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56,
                 "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    check_sha256(million, sizeof million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    CHECK(kvm_hash_crc32(0, "123456789", 9) == 0xcbf43926u);
    CHECK(kvm_hash_crc32(kvm_hash_crc32(0, "1234", 4), "56789", 5) == 0xcbf43926u);
}

/* ---- sealed files -------------------------------------------------------------------------------------------- */

static char folder[] = "/tmp/kvmix-state-XXXXXX", path[64];

enum { N_FIRST = 1000, N_SECOND = 70000, N_FILE = N_FIRST + N_SECOND + 2 * KVM_SEALED_END_BYTES + KVM_SEALED_BYTES };
static uint8_t content[N_FIRST + N_SECOND];

static kvmix_status write_file(uint8_t first) {
    kvm_sealed f;
    KVM_TRY(kvm_sealed_create(&f, path));
    content[0] = first;
    kvmix_status status = kvm_sealed_write(&f, content, N_FIRST);
    if (status == KVMIX_OK) status = kvm_sealed_end(&f);
    if (status == KVMIX_OK) status = kvm_sealed_write(&f, content + N_FIRST, N_SECOND);
    if (status == KVMIX_OK) status = kvm_sealed_end(&f);
    if (status == KVMIX_OK) status = kvm_sealed_rename(&f);
    kvm_sealed_close(&f);
    return status;
}

static kvmix_status read_file(uint8_t *out) {
    kvm_sealed f;
    KVM_TRY(kvm_sealed_open(&f, path));
    kvmix_status status = kvm_sealed_read(&f, out, N_FIRST, "first");
    if (status == KVMIX_OK) status = kvm_sealed_check(&f, "first");
    if (status == KVMIX_OK) status = kvm_sealed_read(&f, out + N_FIRST, N_SECOND, "second");
    if (status == KVMIX_OK) status = kvm_sealed_check(&f, "second");
    if (status == KVMIX_OK) status = kvm_sealed_check_all(&f);
    kvm_sealed_close(&f);
    return status;
}

static bool is_as_written(uint8_t first) {
    static uint8_t out[sizeof content];
    content[0] = first;
    return CHECK_STATUS(KVMIX_OK, read_file(out)) && CHECK(memcmp(out, content, sizeof out) == 0);
}

/* A disk that fills at any byte: the old file stays, and nothing beside it (rmdir at the end would fail). */
static void test_full_disks(void) {
    const rlim_t sizes[] = {0, 1, N_FIRST - 1, N_FIRST, N_FIRST + 1, N_FIRST + 4, 40000, N_FILE - 33, N_FILE - 32, N_FILE - 1};
    struct rlimit limit, old;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        limit = (struct rlimit){.rlim_cur = sizes[i], .rlim_max = old.rlim_max};
        setrlimit(RLIMIT_FSIZE, &limit);
        kvmix_status status = write_file(2);
        setrlimit(RLIMIT_FSIZE, &old);
        CHECK_STATUS(KVMIX_IO, status);
        CHECK_SAYS("cannot be written: File too large");
        is_as_written(1);
    }
}

static void test_sealed(void) {
    struct stat info;
    CHECK_STATUS(KVMIX_OK, write_file(1));
    is_as_written(1);
    CHECK(stat(path, &info) == 0 && info.st_size == N_FILE && (info.st_mode & 0777) == 0600);
    test_full_disks();
    CHECK_STATUS(KVMIX_OK, write_file(3));
    is_as_written(3);
    CHECK(unlink(path) == 0);
    CHECK(mkdir(path, 0700) == 0);
    CHECK_STATUS(KVMIX_IO, write_file(1));
    CHECK_SAYS("is there already and no file");
    CHECK_STATUS(KVMIX_IO, read_file(content));
    CHECK_SAYS("is no file");
    CHECK(rmdir(path) == 0);
}

/* ---- images -------------------------------------------------------------------------------------------------- */

enum { N_GROUP = 3, MAX_CHECKPOINT = 3 };

typedef struct {
    kvm_layer layers[N_GROUP];
    kvm_recipe recipe;
    kvm_cache_sizes sizes;
    kvm_cache *cache;
} world;

static void open_world(world *w) {
    static const int32_t windows[] = {0, 1, 128, 200, 5000}, spans[] = {1, 127, 128, 300, 700}, batches[] = {1, 32, 512};
    *w = (world){.sizes = {.n_ctx = 1 + below(2000), .n_batch = batches[below(3)], .n_seq = 1 + below(3),
                           .n_checkpoint = below(MAX_CHECKPOINT + 1)},
                 .recipe = {.n_layer = N_GROUP, .window = windows[below(5)], .sink = 16}};
    for (int32_t g = 0; g < N_GROUP; g++) { /* all and packed, sliding and packed, sliding in f16 */
        w->layers[g] = (kvm_layer){.n_head = 1, .n_head_kv = 1, .d_k = 16, .d_v = 16, .group = g,
                                   .span = g > 0 ? spans[below(5)] : 0};
        w->recipe.k[g] = w->recipe.v[g] = g < 2 ? KVM_KVTYPE_Q4 : KVM_KVTYPE_F16;
    }
    kvm_net net = {.n_layer = N_GROUP, .layers = w->layers};
    CHECK_STATUS(KVMIX_OK, kvm_cache_open(&w->cache, &net, &w->recipe, &w->sizes));
}

/* Appends until the sequence is n_tokens long; false when the pools are full. */
static bool grow(world *w, int32_t seq, int32_t n_tokens) {
    static kvmix_row rows[512];
    while (kvm_cache_length(w->cache, seq) < n_tokens) {
        int32_t length = kvm_cache_length(w->cache, seq), n = kvm_min(w->sizes.n_batch, n_tokens - length);
        for (int32_t i = 0; i < n; i++) rows[i] = (kvmix_row){.token = length + i, .seq = seq, .pos = length + i};
        const kvm_plan *plans;
        if (kvm_cache_begin(w->cache, rows, n, &plans) != KVMIX_OK) return false;
        kvm_cache_commit(w->cache);
    }
    return true;
}

static void truncate_to(world *w, int32_t seq, int32_t n_tokens) {
    kvm_copy_job store;
    int32_t n_held;
    kvm_cache_truncate(w->cache, seq, n_tokens, &n_held, &store);
}

/* A sequence with checkpoints and rewinds, perhaps sharing pages with a fork. */
static void live(world *w, int32_t seq) {
    kvm_copy_job store;
    for (int32_t step = below(12); step > 0; step--) {
        int32_t length = kvm_cache_length(w->cache, seq), choice = below(10);
        if (choice < 6) grow(w, seq, kvm_min(length + 1 + below(below(2) ? 20 : 500), w->sizes.n_ctx));
        else if (choice < 8) truncate_to(w, seq, kvm_max(0, length - below(200)));
        else kvm_cache_checkpoint(w->cache, seq, &store);
    }
    if (w->sizes.n_seq > 1 && below(2)) kvm_cache_fork(w->cache, seq, (seq + 1) % w->sizes.n_seq, &store);
}

static bool same_numbers(const kvm_image *a, const kvm_image *b) {
    size_t n = (size_t)a->n_marks;
    if (a->n_marks != b->n_marks || memcmp(a->marks, b->marks, n * sizeof *a->marks) != 0) return false;
    if (memcmp(a->lists, b->lists, n * N_GROUP * sizeof *a->lists) != 0) return false;
    for (int32_t g = 0; g < N_GROUP; g++) {
        if (a->n_pages[g] != b->n_pages[g]) return false;
        for (int32_t i = 0; i < a->n_pages[g]; i++) {
            kvm_image_page p = a->pages[g][i], q = b->pages[g][i];
            if (p.page != q.page || p.owner != q.owner || p.n_valid != q.n_valid) return false;
            if ((p.slots.f16 < 0) != (q.slots.f16 < 0) || (p.slots.packed < 0) != (q.slots.packed < 0)) return false;
        }
    }
    return true;
}

/* Nothing is held when all sequences are gone, and then one of them fills the context. */
static void check_pools(world *w) {
    for (int32_t seq = 0; seq < w->sizes.n_seq; seq++) truncate_to(w, seq, 0);
    CHECK(kvm_cache_get_usage(w->cache).held_bytes == 0);
    CHECK(grow(w, 0, w->sizes.n_ctx));
}

/* The image of a sequence is possible in its cache, and adopted it is the same image again. */
static void test_images_of_sequences(void) {
    int32_t tokens[2048] = {0}, n_adopted = 0, n_with_checkpoints = 0;
    for (int32_t round = 0; round < 1500 && check_failed == 0; round++) {
        world w;
        open_world(&w);
        live(&w, 0);
        if (w.sizes.n_seq > 1) live(&w, 1);
        kvm_image *saved, *loaded, *again;
        CHECK_STATUS(KVMIX_OK, kvm_image_of(&saved, w.cache, 0));
        CHECK_STATUS(KVMIX_OK, kvm_image_open(&loaded, w.cache, saved->n_marks));
        memcpy(loaded->marks, saved->marks, (size_t)saved->n_marks * sizeof *saved->marks);
        memcpy(loaded->lists, saved->lists, (size_t)saved->n_marks * N_GROUP * sizeof *saved->lists);
        int32_t cut = (saved->marks[0].length - w.recipe.window) / KVM_PAGE, seq = below(w.sizes.n_seq);
        if (cut > 1) { /* more in f16 than a sequence keeps would be more to pack than a batch has room for */
            loaded->lists[0].f16_from = cut - 2;
            CHECK_STATUS(KVMIX_FORMAT, kvm_image_check(loaded, w.cache, "an image"));
            loaded->lists[0].f16_from = saved->lists[0].f16_from;
        }
        CHECK_STATUS(KVMIX_OK, kvm_image_check(loaded, w.cache, "an image"));
        if (kvm_image_adopt(loaded, w.cache, seq, tokens) == KVMIX_OK) {
            CHECK_STATUS(KVMIX_OK, kvm_image_of(&again, w.cache, seq));
            CHECK(same_numbers(saved, loaded) && same_numbers(loaded, again));
            for (int32_t m = 0; m < again->n_marks; m++) CHECK(again->stores[m] == loaded->stores[m]);
            kvm_image_close(again);
            n_adopted++;
            n_with_checkpoints += saved->n_marks > 1;
        } else {
            CHECK_SAYS("the page pools lack");
            CHECK(w.sizes.n_seq > 1);
        }
        live(&w, seq);
        check_pools(&w);
        kvm_image_close(saved);
        kvm_image_close(loaded);
        kvm_cache_close(w.cache);
    }
    CHECK(n_adopted > 1000 && n_with_checkpoints > 200);
}

/* Any numbers are refused, or are a sequence that the cache can go on with. */
static void test_images_of_anything(void) {
    int32_t tokens[2048] = {0}, n_adopted = 0, n_refused = 0;
    for (int32_t round = 0; round < 6000 && check_failed == 0; round++) {
        world w;
        open_world(&w);
        live(&w, 0);
        kvm_image *image, *saved;
        CHECK_STATUS(KVMIX_OK, kvm_image_of(&saved, w.cache, 0));
        CHECK_STATUS(KVMIX_OK, kvm_image_open(&image, w.cache, saved->n_marks));
        memcpy(image->marks, saved->marks, (size_t)saved->n_marks * sizeof *saved->marks);
        memcpy(image->lists, saved->lists, (size_t)saved->n_marks * N_GROUP * sizeof *saved->lists);
        static const int32_t wild[] = {INT32_MIN, -1, 0, 1, 2, 127, 128, 2000, 1 << 24, INT32_MAX};
        for (int32_t n = 1 + below(3); n > 0; n--) {
            int32_t at = below(saved->n_marks), list = at * N_GROUP + below(N_GROUP), value = wild[below(10)], what = below(4);
            int32_t *fields[] = {&image->marks[at].length, &image->marks[at].frozen, &image->lists[list].first_page,
                                 &image->lists[list].f16_from};
            *fields[what] = below(2) || *fields[what] < 0 || *fields[what] > 2000 ? value : *fields[what] + below(3) - 1;
        }
        if (kvm_image_check(image, w.cache, "an image") != KVMIX_OK) {
            n_refused++;
        } else if (kvm_image_adopt(image, w.cache, 0, tokens) == KVMIX_OK) {
            n_adopted++;
            grow(&w, 0, kvm_min(kvm_cache_length(w.cache, 0) + 600, w.sizes.n_ctx));
            live(&w, 0);
        }
        check_pools(&w);
        kvm_image_close(saved);
        kvm_image_close(image);
        kvm_cache_close(w.cache);
    }
    CHECK(n_refused > 3000 && n_adopted > 500);
}

int main(void) {
    test_checksums();
    if (!CHECK(mkdtemp(folder) != NULL)) return check_report();
    snprintf(path, sizeof path, "%s/file", folder);
    for (size_t i = 0; i < sizeof content; i++) content[i] = (uint8_t)below(256);
    test_sealed();
    CHECK(rmdir(folder) == 0);
    test_images_of_sequences();
    test_images_of_anything();
    return check_report();
}
