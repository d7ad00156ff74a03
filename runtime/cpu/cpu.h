/* cpu.h - the state of the CPU backend, shared by the files that implement its stages: cpu.c (all but attention),
 * pack.c and attend.c. */
#ifndef KVM_CPU_H
#define KVM_CPU_H

#include "../threads.h"
#include "kernels.h"

/* What one thread needs to itself. m_max queries of one KV head are attended together. */
typedef struct {
    float *weights;         /* [256][32], a tile of decoded weights, transposed */
    float *k, *v;           /* [d][128], [128][d]: a page of one head; pack.c: page matrices */
    uint8_t *codes;         /* [d][128] */
    float *q_rms;           /* [d_k][128], for a page hook; else NULL */
    float *q, *q_packed;    /* [m_max][d_k]: scaled queries, as they are and as packed pages want them */
    kvm_q8_queries q8;      /* q_packed in 8 bits */
    int32_t owner;          /* attend.c, while it splits runs: block * n_head_kv + head whose queries these are */
    float *score;           /* [m_max][128] */
    kvm_u8_weights u8;      /* of packed values, from score */
    float *offset;          /* [m_max]: q . mean of a page */
    float *mean;            /* [d_k] */
    float *run, *total;     /* partials of m_max queries: see attend.c */
} kvm_cpu_scratch;

typedef struct {
    int32_t row, n_rows;       /* rows of one sequence with one cut */
    int32_t n_packed, n_runs;  /* attend.c: runs over packed pages, and all its runs */
    size_t partials;           /* where its partials start when runs are split over threads */
} kvm_attend_block;

/* cos and sin of every row and pair, for the layers of one group */
typedef struct {
    float *pairs;           /* [n_batch][n_rot]: cos, sin of each pair */
    const kvm_layer *layer; /* whose base and factors they have; NULL = stale */
} kvm_rope_table;

struct kvm_backend {
    const kvm_net *net;
    const kvm_cache_layout *cache;
    kvm_backend_options options;
    const kvm_cpu_kernels *kernels;
    kvm_pool *pool;

    /* the cache: one mapping, for each layer the pools and the stores */
    uint8_t *cache_memory;
    uint64_t cache_bytes;
    uint8_t **f16, **packed, **store; /* [n_layer] */

    /* the workspace: one mapping */
    uint8_t *workspace;
    uint64_t workspace_bytes;
    int32_t q_width, o_width;         /* widest n_head * d_k, n_head * d_v */
    int32_t m_max;
    float *hidden, *normed, *result;  /* [n_batch][n_embd] */
    float *q, *k, *v, *attention;     /* [n_batch][q_width, q_width, o_width, o_width] */
    float *gate, *up;                 /* [n_batch][n_ff] */
    float *logits;                    /* [n_logits][n_vocab] */
    kvm_q8_row *q8;                   /* [n_batch], rows of the widest matrix input */
    kvm_rope_table *rope;             /* [n_group] */
    kvm_attend_block *blocks;         /* [n_batch] */
    float *partials;                  /* decoding: a partial for each run, see attend.c */
    kvm_cpu_scratch *scratch;         /* [n_threads] */
};

enum { KVM_FEW_ROWS = 8 }; /* up to here attention is split over runs of pages, too */

static inline uint8_t *kvm_cpu_f16_page(const kvm_backend *b, int32_t layer, int32_t slot, int32_t head) {
    const kvm_layer_layout *l = &b->cache->layers[layer];
    return b->f16[layer] + l->f16_bytes * (uint64_t)slot + (uint64_t)l->f16.head_bytes * (uint64_t)head;
}
static inline uint8_t *kvm_cpu_packed_page(const kvm_backend *b, int32_t layer, int32_t slot, int32_t head) {
    const kvm_layer_layout *l = &b->cache->layers[layer];
    return b->packed[layer] + l->packed_bytes * (uint64_t)slot + (uint64_t)l->packed.head_bytes * (uint64_t)head;
}
static inline uint8_t *kvm_cpu_store(const kvm_backend *b, int32_t layer, int32_t slot, int32_t head) {
    const kvm_layer_layout *l = &b->cache->layers[layer];
    return b->store[layer] + l->store_bytes * (uint64_t)slot + (uint64_t)l->store.head_bytes * (uint64_t)head;
}
static inline uint16_t *kvm_cpu_half(uint8_t *bytes) { return (uint16_t *)(void *)bytes; }

kvmix_status kvm_cpu_pack(kvm_backend *b, int32_t layer, const kvm_plan *plan);
kvmix_status kvm_cpu_attend(kvm_backend *b, int32_t layer, const kvm_plan *plan);
/* runs that a sequence of n_ctx tokens can have, and floats of a partial of m queries: for the workspace */
int32_t kvm_cpu_max_runs(int32_t n_ctx);
size_t kvm_cpu_partial_floats(int32_t m, int32_t d_v);

#endif
