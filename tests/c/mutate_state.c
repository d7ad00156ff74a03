/* mutate_state.c - feeds damaged saved sessions to the library, sanitizers watching; for test_state.py.
 *
 * mutate_state MODEL.gguf STATE N     saves a session at STATE, N mutants of it are loaded from there in turn
 *
 * Prints how many were refused and how many ran. A mutant has some numbers of its head, layers, marks, tokens or note
 * replaced and then all its checksums set right, so that nothing but the checks of each field stands between it and the
 * cache. One that loads must take a batch and a rewind; a session that refused must still be as it was.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"
#include "kvimage.h"
#include "state.h"

enum { N_TOKENS = 700, MAX_STATE = 1 << 23, N_SECTIONS = 6 };

static uint8_t state[MAX_STATE], mutant[MAX_STATE];
static size_t n_state, section_ends[N_SECTIONS]; /* behind the bytes of head, recipe, layers, marks, tokens, note */
static uint64_t chance = 88172645463325252u;

static uint32_t below(uint32_t n) { /* xorshift64* */
    chance ^= chance >> 12;
    chance ^= chance << 25;
    chance ^= chance >> 27;
    return (uint32_t)((chance * 0x2545f4914f6cdd1du >> 33) % n);
}

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, kvmix_last_error());
    exit(1);
}

static void need(kvmix_status status, const char *what) {
    if (status != KVMIX_OK) fail(what);
}

static void read_state(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail("reopening the state");
    n_state = fread(state, 1, sizeof state, file);
    fclose(file);
    kvm_state_head head;
    memcpy(&head, state, sizeof head);
    size_t n_marks = (size_t)head.n_marks, n_group = (size_t)head.n_group;
    const size_t sizes[N_SECTIONS] = {sizeof head, (size_t)head.n_recipe, (size_t)head.n_layer * sizeof(kvm_state_layer),
                                      n_marks * (sizeof(kvm_image_mark) + n_group * sizeof(kvm_image_list)),
                                      N_TOKENS * sizeof(int32_t), (size_t)head.n_note};
    size_t at = 0;
    for (int32_t i = 0; i < N_SECTIONS; i++) {
        section_ends[i] = at + sizes[i];
        at = section_ends[i] + sizeof(uint32_t);
    }
}

static void mutate(void) {
    static const int32_t wild[] = {INT32_MIN, -1, 0, 1, 2, 16, 127, 128, 500, 1 << 16, 1 << 24, INT32_MAX};
    memcpy(mutant, state, n_state);
    for (uint32_t n = 1 + below(3); n > 0; n--) {
        uint32_t section = below(4) == 0 ? below(N_SECTIONS) : 3; /* mostly marks, which mean the most */
        size_t start = section == 0 ? 0 : section_ends[section - 1] + sizeof(uint32_t);
        size_t n_numbers = (section_ends[section] - start) / sizeof(int32_t), at = start + 4 * below((uint32_t)n_numbers);
        int32_t value;
        memcpy(&value, mutant + at, sizeof value);
        value = below(3) == 0 ? wild[below(12)] : (int32_t)((uint32_t)value + below(3) - 1);
        memcpy(mutant + at, &value, sizeof value);
    }
    for (int32_t i = 0; i < N_SECTIONS; i++) {
        size_t start = i == 0 ? 0 : section_ends[i - 1] + sizeof(uint32_t);
        uint32_t crc = kvm_hash_crc32(0, mutant + start, section_ends[i] - start);
        memcpy(mutant + section_ends[i], &crc, sizeof crc);
    }
    kvm_sha256 sha;
    kvm_hash_sha256_init(&sha);
    kvm_hash_sha256_add(&sha, mutant, n_state - KVM_SHA256_BYTES);
    kvm_hash_sha256_finish(&sha, mutant + n_state - KVM_SHA256_BYTES);
}

/* A batch and a rewind; logits that are not finite are an answer, too: the cache may have any numbers in it. */
static void use(kvmix_session *session) {
    static kvmix_row rows[150];
    int32_t length = kvmix_length(session, 0), n = 150, n_held;
    for (int32_t i = 0; i < n; i++) rows[i] = (kvmix_row){.token = i, .pos = length + i, .want_logits = i + 1 == n};
    kvmix_status status = kvmix_decode(session, rows, n);
    if (status != KVMIX_OK && status != KVMIX_STATE) fail("a batch on a mutant");
    need(kvmix_truncate(session, 0, length / 2, &n_held), "a rewind of a mutant");
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    static int32_t tokens[N_TOKENS];
    for (int32_t i = 0; i < N_TOKENS; i++) tokens[i] = i % 200;
    kvmix_model *model;
    kvmix_session *session;
    kvmix_session_options options;
    kvmix_session_defaults(&options);
    options.n_ctx = 1024;
    options.n_threads = 1;
    options.kv = "k4v2";
    need(kvmix_model_open(&model, argv[1], 1), "the model");
    need(kvmix_session_open(&session, model, &options), "the session");
    int32_t n_held = 0, n_refused = 0, n_run = 0;
    const int32_t stops[] = {150, 420, N_TOKENS};
    for (int32_t i = 0; i < 3; i++) {
        do need(kvmix_sync(session, 0, tokens, stops[i], &n_held), "the prompt");
        while (n_held < stops[i]);
        if (i < 2) need(kvmix_checkpoint(session, 0), "a checkpoint");
    }
    need(kvmix_truncate(session, 0, 650, &n_held), "a rewind");
    need(kvmix_sync(session, 0, tokens, N_TOKENS, &n_held), "the prompt's end");
    need(kvmix_save(session, 0, argv[2], "a note", 6), "saving");
    read_state(argv[2]);
    for (int32_t i = atoi(argv[3]); i > 0; i--) {
        mutate();
        FILE *file = fopen(argv[2], "wb");
        if (file == NULL || fwrite(mutant, 1, n_state, file) != n_state || fclose(file) != 0) fail("writing a mutant");
        const void *note;
        size_t n_bytes;
        int32_t length = kvmix_length(session, 0);
        if (kvmix_load(&note, session, 0, argv[2], &n_bytes) == KVMIX_OK) {
            n_run++;
            use(session);
        } else {
            n_refused++;
            if (kvmix_length(session, 0) != length || *kvmix_last_error() == 0) fail("a refusal");
        }
    }
    printf("%d refused, %d run\n", n_refused, n_run);
    kvmix_session_close(session);
    kvmix_model_close(model);
    return 0;
}
