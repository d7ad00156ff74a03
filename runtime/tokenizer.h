/* tokenizer.h - text <-> token ids from a GGUF file's tokenizer.ggml.* keys.
 *
 * Two algorithms: "gpt2", byte-level BPE with ranked merges behind a pre-tokenizer (the split rules by the name in
 * tokenizer.ggml.pre), and "llama", SentencePiece-style BPE by scores with byte fallback. Unicode classes come from
 * a generated table (unicode_tables.c, made by tests/make_unicode_tables.py). A tokenizer is immutable after open and
 * may be used from several threads. Token text points into the GGUF mapping.
 */
#ifndef KVM_TOKENIZER_H
#define KVM_TOKENIZER_H

#include "gguf.h"

typedef struct kvm_tokenizer kvm_tokenizer;

typedef struct {
    int32_t bos, eos, eot, eom, unk; /* -1 where absent */
    bool add_bos, add_eos;
} kvm_specials;

/* UNSUPPORTED names an unknown tokenizer.ggml.model or .pre; FORMAT for arrays of wrong type or length, ids out of
 * range, merges that do not parse; NOMEM. */
kvmix_status kvm_tokenizer_open(kvm_tokenizer **out, const kvm_gguf *file);
void kvm_tokenizer_close(kvm_tokenizer *tokenizer);

int32_t kvm_tokenizer_n_vocab(const kvm_tokenizer *tokenizer);
kvm_specials kvm_tokenizer_specials(const kvm_tokenizer *tokenizer);
int32_t kvm_tokenizer_attr(const kvm_tokenizer *tokenizer, int32_t token); /* KVMIX_TOKEN_* bits */

/* The contracts of kvmix_tokenize and kvmix_token_bytes. Time is linear up to a log factor in n_bytes. */
kvmix_status kvm_tokenizer_encode(const kvm_tokenizer *tokenizer, const char *text, size_t n_bytes,
                                  const uint8_t *trusted, int32_t flags, int32_t *tokens, int32_t n_max,
                                  int32_t *n_tokens);
kvmix_status kvm_tokenizer_bytes(const kvm_tokenizer *tokenizer, int32_t token, char *buf, int32_t n_max,
                                 int32_t *n_bytes);

#endif
