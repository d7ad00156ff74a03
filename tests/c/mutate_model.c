/* mutate_model.c - damages a model file in many seeded ways and uses each result as far as it goes.
 *
 * mutate_model MODEL.gguf WORK_FILE N_MUTANTS
 *
 * Every mutant is opened, tokenized with, put into a session and decoded. Each step may fail with a status and a
 * sentence or succeed; anything else ends this program with a sanitizer's report. The last line counts how far they
 * got, for a mutant that never gets past the reader tests little.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmix.h"

static uint64_t state;

static uint64_t next(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du;
}

/* Headers decide, so most changes fall into the first 16 KiB: a bit, a byte, a number, or a piece copied elsewhere. */
static void mutate(unsigned char *bytes, size_t n) {
    static const uint64_t numbers[] = {0, 1, 2, 7, 127, 255, 65535, 1u << 31, UINT32_MAX, UINT64_MAX, 1ull << 63};
    for (uint64_t change = next() % 4; change < 4; change++) {
        size_t at = next() % (next() % 4 ? (n < 16384 ? n : 16384) : n), size = 1 + next() % 16, from = next() % n;
        uint64_t number = numbers[next() % (sizeof numbers / sizeof *numbers)];
        switch (next() % 4) {
        case 0: bytes[at] ^= (unsigned char)(1u << next() % 8); break;
        case 1: bytes[at] = (unsigned char)next(); break;
        case 2: memcpy(bytes + (at < n - 8 ? at : n - 8), &number, next() % 2 ? 4 : 8); break;
        case 3: memmove(bytes + (at < n - size ? at : n - size), bytes + (from < n - size ? from : n - size), size); break;
        }
    }
}

static int sentences_missing;

static int failed(kvmix_status status) {
    if (status != KVMIX_OK && kvmix_last_error()[0] == 0) sentences_missing++;
    return status != KVMIX_OK;
}

/* 0: refused by the model; 1: by the session; 2: by decode; 3: ran */
static int use(const char *path, int mmap) {
    kvmix_model *model;
    if (failed(kvmix_model_open(&model, path, mmap))) return 0;
    int32_t tokens[64], n_tokens = 0, n_bytes, reached = 1;
    char piece[256];
    failed(kvmix_tokenize(model, "hello <|im_end|> \xff w0rld", 23, NULL, KVMIX_ADD_SPECIAL | KVMIX_PARSE_SPECIAL, tokens,
                          64, &n_tokens));
    for (int32_t i = 0; i < n_tokens; i++) failed(kvmix_token_bytes(model, tokens[i], piece, sizeof piece, &n_bytes));
    kvmix_session_options options;
    kvmix_session_defaults(&options);
    options.n_ctx = 64;
    options.n_batch = 32;
    options.n_threads = 1;
    options.memory_limit = 64 << 20;
    kvmix_session *session;
    if (!failed(kvmix_session_open(&session, model, &options))) {
        kvmix_row rows[2] = {{.token = 1, .pos = 0}, {.token = 2, .pos = 1, .want_logits = 1}};
        reached = failed(kvmix_decode(session, rows, 2)) ? 2 : 3;
        kvmix_session_close(session);
    }
    kvmix_model_close(model);
    return reached;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    FILE *file = fopen(argv[1], "rb");
    if (file == NULL) return 2;
    fseek(file, 0, SEEK_END);
    size_t n = (size_t)ftell(file);
    rewind(file);
    unsigned char *original = malloc(n), *bytes = malloc(n);
    if (original == NULL || bytes == NULL || fread(original, 1, n, file) != n) return 2;
    fclose(file);
    int reached[4] = {0};
    for (int i = 0; i < atoi(argv[3]); i++) {
        state = 0x9e3779b97f4a7c15u + (uint64_t)i;
        memcpy(bytes, original, n);
        size_t kept = next() % 8 ? n : next() % n;
        mutate(bytes, n);
        file = fopen(argv[2], "wb");
        if (file == NULL || fwrite(bytes, 1, kept, file) != kept || fclose(file) != 0) return 2;
        reached[use(argv[2], i % 2)]++;
    }
    free(original);
    free(bytes);
    printf("model %d, session %d, decode %d, ran %d; sentences missing %d\n", reached[0], reached[1], reached[2],
           reached[3], sentences_missing);
    return sentences_missing != 0;
}
