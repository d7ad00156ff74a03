/* kvmix.h - the public API of libkvmix: run GGUF models with low-bit, separately typed K and V caches.
 *
 * Two opaque objects. A *model* is an opened GGUF file: weights (mapped, read-only), hyper-parameters and tokenizer;
 * it may be shared by sessions in several threads. A *session* owns a KV cache, a workspace and a thread pool, and
 * holds up to n_seq_max *sequences* (token streams). A session is used by one thread at a time, except for
 * kvmix_cancel(), which any thread may call.
 *
 * Every fallible call returns kvmix_status; the sentence that explains a failure is kvmix_last_error() of the same
 * thread. Objects and pointers come through the first argument, which is NULL after a failure; counts come through the
 * last. Close functions accept NULL.
 * A session must be closed before its model. Structures with a `size` field are filled by their *_defaults()
 * function first, so that fields added later keep old callers working.
 *
 * The block between the two cdef marks is plain C without preprocessor lines: the Python binding is cut from it.
 */
#ifndef KVMIX_H
#define KVMIX_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define KVMIX_API __attribute__((visibility("default")))
#else
#define KVMIX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- status ------------------------------------------------------------------------------------------------ */

typedef enum {
    KVMIX_OK = 0,
    KVMIX_ARG = -1,         /* an argument is out of range or malformed */
    KVMIX_NOMEM = -2,       /* memory would not or did not suffice */
    KVMIX_IO = -3,          /* the operating system refused a file operation */
    KVMIX_FORMAT = -4,      /* the file is damaged or not what it claims to be */
    KVMIX_UNSUPPORTED = -5, /* valid, but not something this build can run */
    KVMIX_FULL = -6,        /* the context, the page pool or the caller's buffer is full */
    KVMIX_DEVICE = -7,      /* a device failed; the session is dead */
    KVMIX_STATE = -8,       /* the call does not fit the object's state (non-finite logits, no logits yet) */
    KVMIX_CANCELLED = -9    /* kvmix_cancel() stopped the call; the session stays usable */
} kvmix_status;

typedef struct kvmix_model kvmix_model;
typedef struct kvmix_session kvmix_session;
typedef struct kvmix_sampler kvmix_sampler;

KVMIX_API int32_t kvmix_abi_version(void);           /* changes whenever a declaration in this file changes meaning */
KVMIX_API const char *kvmix_version(void);           /* "0.1.0" */
KVMIX_API const char *kvmix_status_name(int32_t status); /* "FORMAT"; "?" for a number that is no status */
KVMIX_API const char *kvmix_last_error(void);        /* last failure in this thread, one sentence; "" when none */
KVMIX_API const char *kvmix_cpu_kernels(void);       /* this machine's: "avx512", "avx2" or "scalar" */

/* ---- model ------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *arch;           /* "llama", "qwen2"; lives as long as the model */
    const char *name;           /* general.name, or "" */
    const char *weights;        /* how the weights are stored, by bytes: "Q4_1 87%, Q8_0 13%" */
    uint64_t file_bytes;
    uint64_t weight_bytes;      /* bytes of all tensors */
    uint64_t n_params;
    int32_t n_layer, n_embd, n_ff, n_vocab;
    int32_t n_head, n_head_kv, head_dim;
    int32_t n_ctx_train;
    int32_t bos, eos, eot, eom; /* token ids, -1 where the file names none */
    int32_t add_bos, add_eos;   /* 1 when KVMIX_ADD_SPECIAL would put one */
} kvmix_model_info;

/* Opens a GGUF file. use_mmap 0 reads it into private memory instead of mapping it.
 * IO, FORMAT (with the byte offset), UNSUPPORTED (family, tensor type or tokenizer, by name), NOMEM. */
KVMIX_API kvmix_status kvmix_model_open(kvmix_model **out, const char *path, int32_t use_mmap);
KVMIX_API void kvmix_model_close(kvmix_model *model);
KVMIX_API kvmix_status kvmix_model_get_info(const kvmix_model *model, kvmix_model_info *out);

/* A string of the file's metadata, not NUL-terminated, living as long as the model. *text = NULL, *n_bytes = 0 and
 * OK when the key is absent; FORMAT when it is there and no string. Keys that begin with "kvmix." come from the
 * sidecar MODEL.kvmix.gguf where the recipe does. */
KVMIX_API kvmix_status kvmix_model_get_string(const kvmix_model *model, const char *key, const char **text,
                                              size_t *n_bytes);
/* An array of f32 in the same way, into out[n_max]: *n numbers, 0 when absent. FULL when n_max is too small; *n is then
 * the number needed. */
KVMIX_API kvmix_status kvmix_model_get_floats(const kvmix_model *model, const char *key, float *out, int32_t n_max,
                                              int32_t *n);
/* zlib's CRC-32 of all of the file before its tensors: with file_bytes, it tells one model's file from another's. */
KVMIX_API uint32_t kvmix_model_header_crc32(const kvmix_model *model);

typedef struct {
    const char *type;     /* "Q4_1" */
    int32_t n_in, n_rows; /* n_rows of n_in values; a vector is one row; 0 and 0 where the file has no such tensor */
} kvmix_tensor;

/* A tensor of the file by its name, "blk.0.attn_k.weight"; and its rows first .. first + n_rows - 1, decoded into
 * out [n_rows][n_in]; ARG when it does not have them. */
KVMIX_API kvmix_status kvmix_model_get_tensor(const kvmix_model *model, const char *name, kvmix_tensor *out);
KVMIX_API kvmix_status kvmix_model_read_tensor(const kvmix_model *model, const char *name, int32_t first, int32_t n_rows,
                                               float *out);

/* ---- tokens ------------------------------------------------------------------------------------------------ */

/* flags of kvmix_tokenize */
enum { KVMIX_ADD_SPECIAL = 1,    /* add BOS and EOS where the file says so */
       KVMIX_PARSE_SPECIAL = 2   /* recognize control tokens written as text */ };

/* bits of kvmix_token_attr */
enum { KVMIX_TOKEN_CONTROL = 1, KVMIX_TOKEN_BYTE = 2, KVMIX_TOKEN_UNKNOWN = 4, KVMIX_TOKEN_USER = 8,
       KVMIX_TOKEN_UNUSED = 16, KVMIX_TOKEN_END = 32 /* ends a turn: eos, eot, eom and the known end tokens by text */ };

/* text[n_bytes] (any bytes; invalid UTF-8 is tokenized byte by byte) -> tokens[0..*n_tokens).
 * trusted: NULL, or n_bytes flags; with KVMIX_PARSE_SPECIAL a control token is recognized only where every byte of
 * it is trusted, so that a user's text inside a chat template never becomes one.
 * FULL when n_max is too small; *n_tokens is then the number needed. n_bytes < 256 MiB. */
KVMIX_API kvmix_status kvmix_tokenize(const kvmix_model *model, const char *text, size_t n_bytes,
                                      const uint8_t *trusted, int32_t flags, int32_t *tokens, int32_t n_max,
                                      int32_t *n_tokens);
/* The bytes that a token stands for, into buf[n_max]; a control token gives its text ("<|im_end|>"). FULL as above. */
KVMIX_API kvmix_status kvmix_token_bytes(const kvmix_model *model, int32_t token, char *buf, int32_t n_max,
                                         int32_t *n_bytes);
KVMIX_API int32_t kvmix_token_attr(const kvmix_model *model, int32_t token); /* KVMIX_TOKEN_* bits; 0 for a plain one */

/* ---- session ----------------------------------------------------------------------------------------------- */

/* One KV head of a page that is about to be packed, as it is in f16, for the study of codecs. Positions [first,
 * n_valid) are there; those before are sinks, whose f16 form is read in any case. */
typedef struct {
    int32_t layer, head, page;
    int32_t first, n_valid;
    int32_t d_k, d_v;
    float *k;           /* [d_k][128], after RoPE */
    float *v;           /* [128][d_v] */
    const float *q_rms; /* [d_k][128], root mean square of the head's queries (kvtype.h section 2) */
} kvmix_page;
/* Sees the page; what it writes into a side of type f16 is what attention reads in its place. Not 0 stops the batch. */
typedef int32_t (*kvmix_page_hook)(void *user, const kvmix_page *page);
/* What a type makes of a side of a page, written in its place: packed with this page's own mean and balance, and read
 * back; 0 outside [first, n_valid). NULL and "f16" leave a side as it is. d_k and d_v at most 256, multiples of 8. */
KVMIX_API kvmix_status kvmix_page_roundtrip(const kvmix_page *page, const char *k_type, const char *v_type);

typedef struct {
    uint32_t size;           /* sizeof(kvmix_session_options), set by kvmix_session_defaults */
    int32_t n_ctx;           /* tokens that all sequences together can hold; 0 = the trained context */
    int32_t n_batch;         /* most rows of one decode: 1..4096, default 512 */
    int32_t n_logits;        /* most rows of one decode that want logits, default 8; 4 * n_vocab bytes each */
    int32_t n_threads;       /* 0 = the cores this process may use */
    int32_t n_seq_max;       /* sequences 0..n_seq_max-1, default 1 */
    int32_t n_checkpoint;    /* prompts' ends to which a rewind is cheap, default 2 */
    const char *k_type;      /* type of every key ("q4", also llama.cpp's "q4_0"), NULL = from the recipe */
    const char *v_type;      /* type of every value, NULL = from the recipe */
    const char *kv;          /* recipe "k4v3,0-1:k8v4", NULL = the file's, else kv_default, else k4v3 */
    const char *kv_source;   /* what recipe_source says of kv, at most 31 bytes; NULL = "--kv" */
    const char *kv_default;  /* recipe for a file without one (a catalog's), NULL = none */
    int32_t window;          /* recent tokens kept in f16; -1 = the recipe's, else 128 */
    int32_t sink;            /* first tokens kept in f16, 0..64; -1 = the recipe's, else 16 */
    int32_t balance_page;    /* 1 = a key balance for every page, 0 = frozen at the first page; -1 = the recipe's */
    int32_t act_f32;         /* 1 = float activations in the matmuls and attention: the path of the numerical bounds */
    kvmix_page_hook page_hook; /* NULL = none. Called by the thread that decodes, pages ascending; in strict mode an
                                  open page comes again as it grows */
    void *page_hook_user;
    int32_t strict;          /* 1 = every page is packed before it is read, the open one too; n_batch must be a
                                multiple of 128. For comparing codecs, not for use */
    int32_t kernels;         /* 0 = best for this CPU, 1 = scalar, 2 = avx2, 3 = avx512 (for tests) */
    uint64_t memory_limit;   /* refuse to open when more bytes would be needed; 0 = no limit */
} kvmix_session_options;

typedef struct {
    int32_t n_ctx;            /* as resolved */
    int32_t n_threads;
    uint64_t kv_bytes;        /* the whole cache: both page pools, sinks, balance */
    uint64_t workspace_bytes; /* activations, scores, logits */
    double bits_full;         /* physical bits per cached value when one sequence fills the context */
} kvmix_memory;

KVMIX_API void kvmix_session_defaults(kvmix_session_options *options);
/* What kvmix_session_open would allocate, without allocating it. */
KVMIX_API kvmix_status kvmix_session_plan(const kvmix_model *model, const kvmix_session_options *options,
                                          kvmix_memory *out);
KVMIX_API kvmix_status kvmix_session_open(kvmix_session **out, const kvmix_model *model,
                                          const kvmix_session_options *options);
KVMIX_API void kvmix_session_close(kvmix_session *session);

typedef struct {
    int32_t token, seq, pos; /* pos must be the sequence's length, then one more for each further row of it */
    int32_t want_logits;
} kvmix_row;

/* Appends n_rows (1..n_batch) rows and runs the model. FULL when the context is full, CANCELLED, STATE when a logit
 * is not finite. After a failure the sequences are as they were before the call. */
KVMIX_API kvmix_status kvmix_decode(kvmix_session *session, const kvmix_row *rows, int32_t n_rows);
/* Logits [n_vocab] of the index-th row of the last decode that wanted them; valid until the next decode or
 * sync. */
KVMIX_API kvmix_status kvmix_logits(const float **out, const kvmix_session *session, int32_t index);

/* Makes sequence seq hold exactly tokens[0..n_tokens), reusing the longest common prefix, evaluating at most n_batch
 * tokens a call: call it again until *n_held == n_tokens; then kvmix_logits(,,0) is the last token's. FULL comes before
 * anything is evaluated or dropped when n_tokens exceeds n_ctx, else from the batch that finds the pages taken by other
 * sequences; *n_held is what the sequence then holds. */
KVMIX_API kvmix_status kvmix_sync(kvmix_session *session, int32_t seq, const int32_t *tokens, int32_t n_tokens,
                                  int32_t *n_held);
/* Shortens a sequence to n_tokens. Exact for the last 128 tokens before the longest it has been; further back it goes
 * to the nearest checkpoint at or below n_tokens, or to 0: *n_held says where it stands, kvmix_sync() restores the rest. */
KVMIX_API kvmix_status kvmix_truncate(kvmix_session *session, int32_t seq, int32_t n_tokens, int32_t *n_held);
/* Makes dst a copy of src that shares its pages. */
KVMIX_API kvmix_status kvmix_fork(kvmix_session *session, int32_t src, int32_t dst);
/* Remembers where the sequence stands now; the oldest of n_checkpoint is forgotten. */
KVMIX_API kvmix_status kvmix_checkpoint(kvmix_session *session, int32_t seq);
KVMIX_API int32_t kvmix_length(const kvmix_session *session, int32_t seq); /* tokens held; 0 for a bad seq */
/* The ids held, [kvmix_length], valid until the sequence changes; NULL for a bad seq. */
KVMIX_API const int32_t *kvmix_tokens(const kvmix_session *session, int32_t seq);
/* Stops the decode or sync that is running, else the next one, which returns CANCELLED. Any thread. */
KVMIX_API void kvmix_cancel(kvmix_session *session);

typedef struct {
    const char *recipe;        /* text form, "k4v3" */
    const char *recipe_source; /* "-ctk/-ctv", kv_source, "file", "sidecar", "catalog" or "default" */
    int32_t window, sink;
    int32_t n_ctx, n_threads;
    int32_t n_tokens;          /* held by all sequences, shared pages counted once a sequence */
    int64_t n_evaluated;       /* rows run since the session was opened */
    uint64_t kv_bytes;         /* the cache as allocated */
    uint64_t kv_used_bytes;    /* pages, sinks and balances in use now, those kept for a rewind too */
    double bits_now;           /* physical bits a value of what the next token reads; 0 when empty */
    double bits_full;          /* the same with one sequence filling the context */
} kvmix_stats;
KVMIX_API kvmix_status kvmix_session_get_stats(const kvmix_session *session, kvmix_stats *out);

typedef struct {
    const char *k_type, *v_type; /* "q4" */
    int32_t n_head_kv, d_k, d_v;
    int32_t span;                /* positions that a token sees, itself included; 0 = all */
    uint64_t page_bytes;         /* 128 packed tokens of this layer */
    uint64_t kv_bytes;           /* its part of the cache as allocated; with a span it does not grow with the context */
} kvmix_layer_kv;
KVMIX_API kvmix_status kvmix_session_get_layer(const kvmix_session *session, int32_t layer, kvmix_layer_kv *out);

/* ---- saved states ------------------------------------------------------------------------------------------ */

/* Writes a sequence and its checkpoints to a file, and note[n_bytes], whatever the caller wants back, at most 64 MiB. The
 * file is written beside `path`, then renamed; only its owner may read it. UNSUPPORTED in strict mode and with a page
 * hook; IO, and then what was at `path` is still there. */
KVMIX_API kvmix_status kvmix_save(const kvmix_session *session, int32_t seq, const char *path, const void *note,
                                  size_t n_bytes);
/* Makes a sequence what was saved, as if it had been evaluated here: all that follows is the same, bit for bit. The
 * session must have the model, recipe, window, sinks and balance of the one that saved. ARG names what differs and
 * FULL what does not fit; FORMAT, a damaged file. After a failure the session is as it was. The note is NULL after
 * one, and else lives until the session loads again or closes. */
KVMIX_API kvmix_status kvmix_load(const void **note, kvmix_session *session, int32_t seq, const char *path,
                                  size_t *n_bytes);

/* ---- sampling ---------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t size;            /* set by kvmix_sampling_defaults, which gives llama.cpp's defaults */
    float temp;               /* <= 0: greedy, the lowest id of equals */
    int32_t top_k;            /* <= 0: all */
    float top_p, min_p;       /* 1 and 0 switch them off */
    float repeat_penalty;     /* 1 = off; over the last repeat_last_n tokens, as the next two */
    int32_t repeat_last_n;    /* 0 = off, -1 = all that was accepted */
    float presence_penalty, frequency_penalty;
    uint64_t seed;
} kvmix_sampling;

KVMIX_API void kvmix_sampling_defaults(kvmix_sampling *params);
KVMIX_API kvmix_status kvmix_sampler_open(kvmix_sampler **out, const kvmix_model *model, const kvmix_sampling *params);
KVMIX_API void kvmix_sampler_close(kvmix_sampler *sampler);
/* Tells the penalties about a token of the prompt or the answer. */
KVMIX_API kvmix_status kvmix_sampler_accept(kvmix_sampler *sampler, int32_t token);
/* logits [n_vocab], unchanged. STATE when one is not finite. Same seed, logits and calls: same tokens. */
KVMIX_API kvmix_status kvmix_sample(kvmix_sampler *sampler, const float *logits, int32_t *token);

/* cdef end */

#ifdef __cplusplus
}
#endif
#endif
