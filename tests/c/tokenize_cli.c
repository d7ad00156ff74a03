/* tokenize_cli.c - the tokenizer of a GGUF file, with or without weights, as a filter; for test_tokenizer.py.
 *
 * tokenize_cli PATH FLAGS < records    FLAGS: a sum of KVMIX_ADD_SPECIAL and KVMIX_PARSE_SPECIAL
 *
 * Each record is a text: its length as a little-endian u32, then its bytes. Each gives one line: the ids, a tab, and
 * the bytes that the ids stand for, in hex. Exit 1 and "STATUS: sentence" on a failure.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tokenizer.h"

static int fail(kvmix_status status) {
    printf("%s: %s\n", kvmix_status_name(status), kvmix_last_error());
    return 1;
}

static kvmix_status print_tokens(const kvm_tokenizer *tokenizer, const int32_t *tokens, int32_t n_tokens) {
    static char bytes[1 << 16];
    for (int32_t i = 0; i < n_tokens; i++) printf(i ? " %d" : "%d", tokens[i]);
    putchar('\t');
    for (int32_t i = 0; i < n_tokens; i++) {
        int32_t n_bytes;
        KVM_TRY(kvm_tokenizer_bytes(tokenizer, tokens[i], bytes, sizeof bytes, &n_bytes));
        for (int32_t j = 0; j < n_bytes; j++) printf("%02x", (uint8_t)bytes[j]);
    }
    putchar('\n');
    return KVMIX_OK;
}

static kvmix_status tokenize_record(const kvm_tokenizer *tokenizer, int32_t flags, uint32_t n_bytes) {
    char *text = malloc(n_bytes ? n_bytes : 1); /* no longer than the text: a sanitizer sees a read past it */
    size_t n_room = 4 * (size_t)n_bytes + 8;
    int32_t *tokens = malloc(n_room * sizeof *tokens), n_tokens = 0;
    kvmix_status status = KVMIX_NOMEM;
    if (text && tokens && fread(text, 1, n_bytes, stdin) == n_bytes)
        status = kvm_tokenizer_encode(tokenizer, text, n_bytes, NULL, flags, tokens, (int32_t)n_room, &n_tokens);
    if (status == KVMIX_OK) status = print_tokens(tokenizer, tokens, n_tokens);
    free(text);
    free(tokens);
    return status;
}

int main(int argc, char **argv) {
    kvm_gguf *file = NULL;
    kvm_tokenizer *tokenizer = NULL;
    if (argc != 3) return fail(kvm_fail(KVMIX_ARG, "usage: tokenize_cli PATH FLAGS < records"));
    kvmix_status status = kvm_gguf_open(&file, argv[1], true);
    if (status == KVMIX_OK) status = kvm_tokenizer_open(&tokenizer, file);
    for (uint32_t n_bytes; status == KVMIX_OK && fread(&n_bytes, sizeof n_bytes, 1, stdin) == 1;)
        status = tokenize_record(tokenizer, atoi(argv[2]), n_bytes);
    kvm_tokenizer_close(tokenizer);
    kvm_gguf_close(file);
    return status == KVMIX_OK ? 0 : fail(status);
}
