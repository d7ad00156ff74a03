/* backend.h - THE seam: what a model is made of, what a cache looks like, and the stages that compute with them.
 *
 * A stage is what one or a few barriers on a CPU, or one or two fused kernels on a GPU, can do. engine.c calls the
 * stages in order and knows no kernel; a backend implements them and knows neither files nor sequences:
 *
 *   embed | per layer: attn_in  pack  attend  attn_out  ffn | head
 *
 * A stage takes a batch of rows (a token at a position of a sequence), so decoding is prefilling with one row a
 * sequence. What a row computes depends on its sequence and position alone, never on the batch or on the threads.
 * No stage allocates, prints or falls back: what a backend cannot do, can_weight and can_attend refuse when a
 * session opens. The plan below is made by kvcache.c, which owns lists and references; backends write the bytes.
 */
#ifndef KVM_BACKEND_H
#define KVM_BACKEND_H

#include "dtype.h"
#include "kvtype.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- the model, as stages need it --------------------------------------------------------------------------- */

typedef struct {
    kvm_dtype type;
    int32_t n_in, n_out;
    const void *data; /* n_out rows of n_in values */
} kvm_matrix;

typedef struct {
    int32_t n_head, n_head_kv; /* query heads; KV heads, each read by n_head / n_head_kv query heads */
    int32_t d_k, d_v;          /* head sizes */
    int32_t n_rot;             /* the first n_rot channels of q and k turn with the position */
    bool rope_halves;          /* pairs (i, i + n_rot/2), else (2i, 2i + 1) */
    float rope_base;
    const float *rope_factors; /* [n_rot / 2]: each pair's frequency is divided by it; or NULL */
    float scale; /* of the attention logits */
    int32_t span;  /* positions that a row sees, itself included; 0 = all */
    int32_t group; /* layers of one span share page lists: index into the plans */
    const float *attn_norm, *ffn_norm;         /* [n_embd] */
    const float *attn_post_norm, *ffn_post_norm; /* [n_embd], of what is added to the hidden state; or NULL */
    const float *q_norm, *k_norm;              /* [d_k], of each head before rope; or NULL */
    const float *q_bias, *k_bias, *v_bias;     /* [n_head * d_k], [n_head_kv * d_k], [n_head_kv * d_v], or NULL */
    kvm_matrix q, k, v, o;                     /* n_embd -> heads; heads -> n_embd */
    kvm_matrix gate, up, down;                 /* n_embd -> n_ff twice; n_ff -> n_embd */
} kvm_layer;

typedef struct {
    int32_t n_layer, n_embd, n_ff, n_vocab;
    float norm_eps;
    float embd_scale;      /* of the embeddings */
    bool gelu;             /* the gate's activation: tanh-approximated GELU, else SiLU */
    kvm_matrix embd;       /* n_vocab rows of n_embd */
    const float *out_norm; /* [n_embd] */
    kvm_matrix head;       /* n_embd -> n_vocab; the same data as embd when tied */
    const kvm_layer *layers;
} kvm_net;

/* ---- the cache, as stages need it --------------------------------------------------------------------------- */

/* The bytes behind one layer: n_head_kv heads next to each other in each of three kinds of slot. Offsets are bytes
 * from the head's start, -1 where a part is absent; all parts are f16 but the packed sides.
 *   f16 page     K [d_k][128], V [128][d_v], with balance_page the query rms rows [d_k][128]
 *   packed page  the K side, then the V side (kvtype.h section 4)
 *   store        one a sequence: sinks K [d_k][sink], sinks V [sink][d_v], the frozen balance [d_k], and until page 0
 *                is packed its query rms rows [d_k][128]; the last two only where the balance is frozen */
typedef struct {
    kvm_kvtype k_type, v_type;
    kvm_page_layout k, v; /* of the packed sides */
    struct {
        int32_t v, q_rms, head_bytes;
    } f16; /* K comes first */
    struct {
        int32_t v, head_bytes;
    } packed;
    struct {
        int32_t sink_v, balance, q_rms, head_bytes;
    } store;
    uint64_t f16_bytes, packed_bytes, store_bytes; /* of a slot: n_head_kv heads */
} kvm_layer_layout;

typedef struct {
    int32_t window, sink;
    bool balance_page;
    int32_t n_layer, n_group;
    const kvm_layer_layout *layers;         /* [n_layer] */
    const int32_t *n_f16, *n_packed;        /* pages in the pools of each group [n_group] */
    int32_t n_store;                        /* sequences and checkpoints */
} kvm_cache_layout;

/* in the backend's memory: a page of a pool, or a sequence's store */
typedef enum { KVM_SLOT_F16, KVM_SLOT_PACKED, KVM_SLOT_STORE } kvm_slot_kind;

/* ---- the plan of one batch ---------------------------------------------------------------------------------- */

typedef struct {
    int32_t f16, packed; /* slots in the group's pools, -1 where the page has no such form */
} kvm_page_slots;

typedef struct {
    int32_t store;               /* slot of its sinks and balance */
    int32_t n_pages;
    const kvm_page_slots *pages; /* page p holds positions 128p .. 128p+127 */
} kvm_view;                      /* a sequence as the rows of a batch see it */

typedef struct {
    int32_t token, pos;
    int32_t view;  /* index into the plan's views */
    int32_t cut;   /* a multiple of 128: positions below are read packed, the rest in f16 */
    int32_t first; /* first visible position */
    int32_t logits; /* index of its logits, -1 = not wanted */
} kvm_plan_row;

typedef struct {
    int32_t view, page;
    int32_t first, n_valid; /* positions of the page to encode: [first, n_valid); before `first` are sinks */
    bool store_only;        /* the packed page is there, shared and read by others: fill the sequence's store alone */
} kvm_pack_job;

typedef struct {
    int32_t from, to; /* slots */
} kvm_copy_job;

typedef struct {
    int32_t n_rows, n_views, n_packs, n_copies;
    const kvm_plan_row *rows;    /* rows of one sequence are adjacent and ascend by position */
    const kvm_view *views;
    const kvm_pack_job *packs;   /* ascending pages; a sequence's page 0 sets its sinks and frozen balance */
    const kvm_copy_job *copies;  /* f16 pages to copy before anything is appended */
} kvm_plan;                      /* one a group; rows differ only in `first` */

/* ---- the stages --------------------------------------------------------------------------------------------- */

typedef struct kvm_backend kvm_backend;

typedef struct {
    int32_t n_batch, n_logits; /* most rows of a batch; most of them with logits */
    int32_t n_threads;         /* CPU: 0 = the cores this process may use */
    int32_t n_ctx;             /* longest sequence */
    bool act_f32;              /* float activations in the matmuls and in attention */
    int32_t kernels;           /* as kvmix_session_options.kernels */
    kvmix_page_hook page_hook; /* as there; pack() calls it in place of a codec */
    void *page_hook_user;
} kvm_backend_options;

typedef struct {
    const char *name;
    const char *(*kernels)(void); /* the ones this machine gets by default, "avx2" */
    bool (*can_weight)(kvm_dtype type);
    bool (*can_attend)(kvm_kvtype k_type, kvm_kvtype v_type, int32_t d_k, int32_t d_v);
    /* bytes that open() will take beside the cache itself */
    uint64_t (*workspace_bytes)(const kvm_net *net, const kvm_backend_options *options);
    kvmix_status (*open)(kvm_backend **out, const kvm_net *net, const kvm_cache_layout *layout,
                         const kvm_backend_options *options);
    void (*close)(kvm_backend *backend);
    /* what open() allocated: equal to what the layout and workspace_bytes() predict */
    void (*allocated)(const kvm_backend *backend, uint64_t *cache_bytes, uint64_t *workspace_bytes);

    /* hidden[row] = embedding of its token */
    kvmix_status (*embed)(kvm_backend *backend, const kvm_plan *plan);
    /* norm, q k v with biases, norms of heads, rope; K and V appended raw to the f16 pages, query rms rows kept where needed */
    kvmix_status (*attn_in)(kvm_backend *backend, int32_t layer, const kvm_plan *plan);
    /* f16 pages -> the recipe's types, for the plan's pack jobs */
    kvmix_status (*pack)(kvm_backend *backend, int32_t layer, const kvm_plan *plan);
    /* one softmax over sinks, packed pages and f16 pages */
    kvmix_status (*attend)(kvm_backend *backend, int32_t layer, const kvm_plan *plan);
    /* hidden += post-norm(o(attention)) */
    kvmix_status (*attn_out)(kvm_backend *backend, int32_t layer, const kvm_plan *plan);
    /* hidden += post-norm(down(act(gate(norm hidden)) * up(norm hidden))) */
    kvmix_status (*ffn)(kvm_backend *backend, int32_t layer, const kvm_plan *plan);
    /* logits of the wanted rows */
    kvmix_status (*head)(kvm_backend *backend, const kvm_plan *plan);
    /* waits for all of it; [n_logits wanted][n_vocab], valid until the next embed */
    kvmix_status (*logits)(kvm_backend *backend, const float **out);
    /* a fork's sinks and balance */
    kvmix_status (*copy_store)(kvm_backend *backend, int32_t from, int32_t to);

    /* One slot of a layer, its f16_bytes, packed_bytes or store_bytes, in the canonical layout: as kvm_layer_layout has
     * it, whatever the backend does within a page. Only a device that is dead then can fail. */
    kvmix_status (*export_slot)(kvm_backend *backend, int32_t layer, kvm_slot_kind kind, int32_t slot, uint8_t *out);
    kvmix_status (*import_slot)(kvm_backend *backend, int32_t layer, kvm_slot_kind kind, int32_t slot,
                                const uint8_t *in);
} kvm_backend_ops;

extern const kvm_backend_ops kvm_cpu_backend;

#ifdef __cplusplus
}
#endif
#endif
