/* embed.c - kvmix in a C program: continues a text greedily. Of the library it needs kvmix.h alone.
 *
 * embed MODEL.gguf TEXT [N_TOKENS]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmix.h"

enum { N_CTX = 2048 };

static void must(kvmix_status status) {
    if (status == KVMIX_OK) return;
    fprintf(stderr, "%s: %s\n", kvmix_status_name(status), kvmix_last_error());
    exit(1);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    kvmix_model *model;
    must(kvmix_model_open(&model, argv[1], 1));
    kvmix_session_options options;
    kvmix_session_defaults(&options);
    options.n_ctx = N_CTX;
    options.kv = "k4v3"; /* keys in 4 bits, values in 3 */
    kvmix_session *session;
    must(kvmix_session_open(&session, model, &options));
    kvmix_sampling greedy;
    kvmix_sampling_defaults(&greedy);
    greedy.temp = 0;
    kvmix_sampler *sampler;
    must(kvmix_sampler_open(&sampler, model, &greedy));

    int32_t tokens[N_CTX], n_tokens, n_held, n_bytes, left = argc > 3 ? atoi(argv[3]) : 32;
    must(kvmix_tokenize(model, argv[2], strlen(argv[2]), NULL, KVMIX_ADD_SPECIAL, tokens, N_CTX, &n_tokens));
    for (; left > 0 && n_tokens < N_CTX; left--, n_tokens++) {
        do must(kvmix_sync(session, 0, tokens, n_tokens, &n_held)); /* evaluates what is new, a batch a call */
        while (n_held < n_tokens);
        const float *logits;
        must(kvmix_logits(&logits, session, 0));
        must(kvmix_sample(sampler, logits, &tokens[n_tokens]));
        if (kvmix_token_attr(model, tokens[n_tokens]) & KVMIX_TOKEN_END) break;
        char piece[256];
        must(kvmix_token_bytes(model, tokens[n_tokens], piece, sizeof piece, &n_bytes));
        fwrite(piece, 1, (size_t)n_bytes, stdout);
    }
    printf("\n");
    kvmix_sampler_close(sampler);
    kvmix_session_close(session);
    kvmix_model_close(model);
    return 0;
}
