/* cpu.c - the CPU backend: its memory, and every stage but attention (pack.c, attend.c). */
#include <stdlib.h>
#include <sys/mman.h>

#include "cpu.h"

/* ---- matrices ------------------------------------------------------------------------------------------------ */

/* Up to three matrices that read the same rows, multiplied in one run of the pool, in tiles of 32 outputs. */
typedef struct {
    kvm_backend *b;
    const float *x; /* [n_rows][ldx] */
    int32_t ldx, n_rows, n_matrices;
    int32_t n_tiles, tiles_per_item;
    struct {
        const kvm_matrix *w;
        float *y; /* [n_rows][ldy] */
        int32_t ldy;
    } job[3];
} product;

static bool is_float(const kvm_backend *b, const kvm_matrix *w) {
    return b->options.act_f32 || kvm_dtypes[w->type].block_values == 1;
}

static void add_matrix(product *p, const kvm_matrix *w, float *y, int32_t ldy) {
    p->job[p->n_matrices].w = w;
    p->job[p->n_matrices].y = y;
    p->job[p->n_matrices++].ldy = ldy;
}

/* y[r][o] for one tile of 32 outputs, activations in f32: weights decoded and transposed tile by tile. One path for any
 * number of rows, so that with act=f32 a prompt's bits do not depend on how it was cut into batches. */
static void multiply_float(const product *p, const kvm_matrix *w, float *y, int32_t ldy, int32_t first, int32_t last,
                           kvm_cpu_scratch *s) {
    for (int32_t r = 0; r < p->n_rows; r++) {
        memset(y + (size_t)r * (size_t)ldy + first, 0, (size_t)(last - first) * sizeof *y);
    }
    for (int32_t i = 0; i < w->n_in; i += KVM_TILE_IN) {
        int32_t n = kvm_min(KVM_TILE_IN, w->n_in - i);
        p->b->kernels->load_weights(w, first, last, i, s->weights);
        p->b->kernels->gemm_f32(p->n_rows, last - first, n, p->x + i, p->ldx, s->weights, KVM_TILE_OUT, y + first, ldy);
    }
}

static void multiply_tile(const product *p, int32_t tile, int32_t thread) {
    int32_t m = 0, n_tiles;
    while (tile >= (n_tiles = kvm_ceil_div(p->job[m].w->n_out, KVM_TILE_OUT))) {
        tile -= n_tiles;
        m++;
    }
    const kvm_matrix *w = p->job[m].w;
    int32_t first = tile * KVM_TILE_OUT, last = kvm_min(first + KVM_TILE_OUT, w->n_out);
    if (is_float(p->b, w)) {
        multiply_float(p, w, p->job[m].y, p->job[m].ldy, first, last, &p->b->scratch[thread]);
    } else {
        p->b->kernels->matmul_q8(w, first, last, p->b->q8, p->n_rows, p->job[m].y, p->job[m].ldy);
    }
}

static void multiply_tiles(void *context, int32_t item, int32_t thread) {
    const product *p = context;
    int32_t first = item * p->tiles_per_item, last = kvm_min(first + p->tiles_per_item, p->n_tiles);
    for (int32_t tile = first; tile < last; tile++) multiply_tile(p, tile, thread);
}

static void quantize_row(void *context, int32_t row, int32_t thread) {
    (void)thread;
    const product *p = context;
    p->b->kernels->quantize_q8(p->x + (size_t)row * (size_t)p->ldx, p->job[0].w->n_in, p->b->q8[row]);
}

/* Runs fn over the rows of a batch: a single row is not worth a barrier. */
static void for_rows(kvm_backend *b, int32_t n_rows, kvm_pool_fn fn, void *context) {
    if (n_rows > KVM_FEW_ROWS) {
        kvm_pool_run(b->pool, n_rows, fn, context);
    } else {
        for (int32_t row = 0; row < n_rows; row++) fn(context, row, 0);
    }
}

/* With few rows the bound is reading the weights, and a thread prefetches what lies behind those it uses: it should be
 * the one that needs them, so tiles are handed out in spans. */
static void multiply(product *p) {
    bool quantized = false;
    for (int32_t i = 0; i < p->n_matrices; i++) {
        p->n_tiles += kvm_ceil_div(p->job[i].w->n_out, KVM_TILE_OUT);
        quantized |= !is_float(p->b, p->job[i].w);
    }
    if (quantized) for_rows(p->b, p->n_rows, quantize_row, p);
    p->tiles_per_item = p->n_rows > KVM_FEW_ROWS ? 1 : kvm_ceil_div(p->n_tiles, 8 * kvm_pool_size(p->b->pool));
    kvm_pool_run(p->b->pool, kvm_ceil_div(p->n_tiles, p->tiles_per_item), multiply_tiles, p);
}

/* ---- stages -------------------------------------------------------------------------------------------------- */

typedef struct {
    kvm_backend *b;
    int32_t layer;
    const kvm_plan *plan;
    const float *weight, *from; /* norm: [n_embd]; [n_rows][n_embd] */
    float *to;
} stage;

/* RMS norm of n values, in place too; the sum in 16 interleaved lanes */
static void rms_norm(const float *x, const float *weight, int32_t n, float eps, float *y) {
    float lane[16] = {0}, sum = 0;
    int32_t i;
    for (i = 0; i + 16 <= n; i += 16) {
        for (int32_t j = 0; j < 16; j++) lane[j] += x[i + j] * x[i + j];
    }
    for (; i < n; i++) lane[0] += x[i] * x[i];
    for (int32_t j = 0; j < 16; j++) sum += lane[j];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void norm_row(void *context, int32_t row, int32_t thread) {
    (void)thread;
    const stage *s = context;
    size_t at = (size_t)row * (size_t)s->b->net->n_embd;
    rms_norm(s->from + at, s->weight, s->b->net->n_embd, s->b->net->norm_eps, s->to + at);
}

/* hidden += result, behind the post-norm where the layer has one */
static void add_to_hidden_row(void *context, int32_t row, int32_t thread) {
    (void)thread;
    const stage *s = context;
    int32_t n = s->b->net->n_embd;
    float *hidden = s->b->hidden + (size_t)row * (size_t)n, *result = s->b->result + (size_t)row * (size_t)n;
    if (s->weight != NULL) rms_norm(result, s->weight, n, s->b->net->norm_eps, result);
    for (int32_t i = 0; i < n; i++) hidden[i] += result[i];
}

static kvmix_status embed(kvm_backend *b, const kvm_plan *plan) {
    const kvm_matrix *w = &b->net->embd;
    size_t row_bytes = kvm_dtype_row_bytes(w->type, w->n_in), n = (size_t)b->net->n_embd;
    for (int32_t r = 0; r < plan->n_rows; r++) {
        const uint8_t *row = (const uint8_t *)w->data + (size_t)plan->rows[r].token * row_bytes;
        float *hidden = b->hidden + (size_t)r * n;
        kvm_dtypes[w->type].decode(row, hidden, w->n_in);
        for (size_t i = 0; i < n && b->net->embd_scale != 1.0f; i++) hidden[i] *= b->net->embd_scale;
    }
    for (int32_t g = 0; g < b->cache->n_group; g++) b->rope[g].layer = NULL;
    return KVMIX_OK;
}

/* [n_rows][n_rot]; angles in double, so that position 100,000 is exact */
static void fill_rope(kvm_backend *b, const kvm_layer *layer, const kvm_plan *plan) {
    kvm_rope_table *table = &b->rope[layer->group];
    const kvm_layer *last = table->layer;
    table->layer = layer;
    if (last != NULL && last->rope_base == layer->rope_base && last->n_rot == layer->n_rot &&
        last->rope_factors == layer->rope_factors) {
        return;
    }
    for (int32_t i = 0; i < layer->n_rot / 2; i++) {
        double frequency = pow((double)layer->rope_base, -2.0 * i / layer->n_rot);
        if (layer->rope_factors != NULL) frequency /= (double)layer->rope_factors[i];
        for (int32_t r = 0; r < plan->n_rows; r++) {
            double angle = plan->rows[r].pos * frequency;
            float *pair = table->pairs + (size_t)r * (size_t)layer->n_rot + (size_t)(2 * i);
            pair[0] = (float)cos(angle);
            pair[1] = (float)sin(angle);
        }
    }
}

/* x: [n_heads][d]; bias: the same shape or NULL; norm: [d] or NULL */
static void finish_heads(const kvm_backend *b, float *x, int32_t n_heads, int32_t d, const float *bias, const float *norm) {
    for (int32_t i = 0; bias != NULL && i < n_heads * d; i++) x[i] += bias[i];
    for (int32_t h = 0; norm != NULL && h < n_heads; h++) rms_norm(x + h * d, norm, d, b->net->norm_eps, x + h * d);
}

/* rope: cos and sin of the row's n_rot / 2 pairs */
static void turn(const kvm_layer *layer, float *x, int32_t n_heads, const float *rope) {
    int32_t apart = layer->rope_halves ? layer->n_rot / 2 : 1, step = layer->rope_halves ? 1 : 2;
    for (int32_t h = 0; h < n_heads; h++, x += layer->d_k) {
        for (int32_t i = 0; i < layer->n_rot / 2; i++) {
            float *a = x + i * step, *b = a + apart, c = rope[2 * i], s = rope[2 * i + 1];
            float turned = *a * c - *b * s;
            *b = *a * s + *b * c;
            *a = turned;
        }
    }
}

/* Writes the row's K and V into its f16 page, and the rms of its queries where a balance will want them. */
static void append_row(const stage *s, int32_t row, const float *q, const float *k, const float *v) {
    kvm_backend *b = s->b;
    const kvm_layer *layer = &b->net->layers[s->layer];
    const kvm_layer_layout *l = &b->cache->layers[s->layer];
    const kvm_plan_row *at = &s->plan->rows[row];
    const kvm_view *view = &s->plan->views[at->view];
    int32_t page = at->pos / KVM_PAGE, offset = at->pos % KVM_PAGE, group = layer->n_head / layer->n_head_kv;
    for (int32_t h = 0; h < layer->n_head_kv; h++, k += layer->d_k, v += layer->d_v) {
        uint8_t *bytes = kvm_cpu_f16_page(b, s->layer, view->pages[page].f16, h);
        uint16_t *k_page = kvm_cpu_half(bytes), *v_page = kvm_cpu_half(bytes + l->f16.v), *q_rms[2] = {NULL, NULL};
        for (int32_t i = 0; i < layer->d_k; i++) k_page[i * KVM_PAGE + offset] = kvm_f16_sat(k[i]);
        for (int32_t i = 0; i < layer->d_v; i++) v_page[offset * layer->d_v + i] = kvm_f16_sat(v[i]);
        if (l->f16.q_rms >= 0) q_rms[0] = kvm_cpu_half(bytes + l->f16.q_rms);
        if (l->store.q_rms >= 0 && page == 0) {
            q_rms[1] = kvm_cpu_half(kvm_cpu_store(b, s->layer, view->store, h) + l->store.q_rms);
        }
        for (int32_t i = 0; (q_rms[0] != NULL || q_rms[1] != NULL) && i < layer->d_k; i++) {
            float sum = 0;
            for (int32_t g = 0; g < group; g++) {
                float x = q[(h * group + g) * layer->d_k + i];
                sum += x * x;
            }
            uint16_t rms = kvm_f16_sat(sqrtf(sum / (float)group));
            for (int32_t kept = 0; kept < 2; kept++) {
                if (q_rms[kept] != NULL) q_rms[kept][i * KVM_PAGE + offset] = rms;
            }
        }
    }
}

static void finish_qkv_row(void *context, int32_t row, int32_t thread) {
    (void)thread;
    const stage *s = context;
    kvm_backend *b = s->b;
    const kvm_layer *layer = &b->net->layers[s->layer];
    const float *rope = b->rope[layer->group].pairs + (size_t)row * (size_t)layer->n_rot;
    float *q = b->q + (size_t)row * (size_t)b->q_width, *k = b->k + (size_t)row * (size_t)b->q_width;
    float *v = b->v + (size_t)row * (size_t)b->o_width;
    finish_heads(b, q, layer->n_head, layer->d_k, layer->q_bias, layer->q_norm);
    finish_heads(b, k, layer->n_head_kv, layer->d_k, layer->k_bias, layer->k_norm);
    finish_heads(b, v, layer->n_head_kv, layer->d_v, layer->v_bias, NULL);
    turn(layer, q, layer->n_head, rope);
    turn(layer, k, layer->n_head_kv, rope);
    append_row(s, row, q, k, v);
}

static kvmix_status attn_in(kvm_backend *b, int32_t layer_index, const kvm_plan *plan) {
    const kvm_layer *layer = &b->net->layers[layer_index];
    for (int32_t i = 0; i < plan->n_copies; i++) {
        memcpy(kvm_cpu_f16_page(b, layer_index, plan->copies[i].to, 0),
               kvm_cpu_f16_page(b, layer_index, plan->copies[i].from, 0), b->cache->layers[layer_index].f16_bytes);
    }
    stage s = {.b = b, .layer = layer_index, .plan = plan, .weight = layer->attn_norm, .from = b->hidden, .to = b->normed};
    for_rows(b, plan->n_rows, norm_row, &s);
    product p = {.b = b, .x = b->normed, .ldx = b->net->n_embd, .n_rows = plan->n_rows};
    add_matrix(&p, &layer->q, b->q, b->q_width);
    add_matrix(&p, &layer->k, b->k, b->q_width);
    add_matrix(&p, &layer->v, b->v, b->o_width);
    multiply(&p);
    fill_rope(b, layer, plan);
    for_rows(b, plan->n_rows, finish_qkv_row, &s);
    return KVMIX_OK;
}

static kvmix_status attn_out(kvm_backend *b, int32_t layer, const kvm_plan *plan) {
    product p = {.b = b, .x = b->attention, .ldx = b->o_width, .n_rows = plan->n_rows};
    add_matrix(&p, &b->net->layers[layer].o, b->result, b->net->n_embd);
    multiply(&p);
    stage s = {.b = b, .weight = b->net->layers[layer].attn_post_norm};
    for_rows(b, plan->n_rows, add_to_hidden_row, &s);
    return KVMIX_OK;
}

static void activate_row(void *context, int32_t row, int32_t thread) {
    (void)thread;
    kvm_backend *b = ((const stage *)context)->b;
    size_t at = (size_t)row * (size_t)b->net->n_ff;
    (b->net->gelu ? b->kernels->gelu_mul : b->kernels->silu_mul)(b->gate + at, b->up + at, b->net->n_ff);
}

static kvmix_status ffn(kvm_backend *b, int32_t layer_index, const kvm_plan *plan) {
    const kvm_layer *layer = &b->net->layers[layer_index];
    int32_t n_embd = b->net->n_embd, n_ff = b->net->n_ff;
    stage s = {.b = b, .plan = plan, .weight = layer->ffn_norm, .from = b->hidden, .to = b->normed};
    for_rows(b, plan->n_rows, norm_row, &s);
    product in = {.b = b, .x = b->normed, .ldx = n_embd, .n_rows = plan->n_rows};
    add_matrix(&in, &layer->gate, b->gate, n_ff);
    add_matrix(&in, &layer->up, b->up, n_ff);
    multiply(&in);
    for_rows(b, plan->n_rows, activate_row, &s);
    product out = {.b = b, .x = b->gate, .ldx = n_ff, .n_rows = plan->n_rows};
    add_matrix(&out, &layer->down, b->result, n_embd);
    multiply(&out);
    s.weight = layer->ffn_post_norm;
    for_rows(b, plan->n_rows, add_to_hidden_row, &s);
    return KVMIX_OK;
}

static kvmix_status head(kvm_backend *b, const kvm_plan *plan) {
    size_t n = (size_t)b->net->n_embd;
    int32_t n_wanted = 0;
    for (int32_t r = 0; r < plan->n_rows; r++) {
        int32_t index = plan->rows[r].logits;
        if (index < 0) continue;
        memcpy(b->result + (size_t)index * n, b->hidden + (size_t)r * n, n * sizeof(float));
        n_wanted++;
    }
    if (n_wanted == 0) return KVMIX_OK;
    stage s = {.b = b, .weight = b->net->out_norm, .from = b->result, .to = b->normed};
    for_rows(b, n_wanted, norm_row, &s);
    product p = {.b = b, .x = b->normed, .ldx = b->net->n_embd, .n_rows = n_wanted};
    add_matrix(&p, &b->net->head, b->logits, b->net->n_vocab);
    multiply(&p);
    return KVMIX_OK;
}

static kvmix_status logits(kvm_backend *b, const float **out) {
    *out = b->logits;
    return KVMIX_OK;
}

static kvmix_status copy_store(kvm_backend *b, int32_t from, int32_t to) {
    for (int32_t i = 0; i < b->net->n_layer; i++) {
        memcpy(kvm_cpu_store(b, i, to, 0), kvm_cpu_store(b, i, from, 0), b->cache->layers[i].store_bytes);
    }
    return KVMIX_OK;
}

/* a slot, all heads, and its size */
static uint8_t *slot_bytes(kvm_backend *b, int32_t layer, kvm_slot_kind kind, int32_t slot, size_t *n_bytes) {
    const kvm_layer_layout *l = &b->cache->layers[layer];
    *n_bytes = (size_t)(kind == KVM_SLOT_F16 ? l->f16_bytes : kind == KVM_SLOT_PACKED ? l->packed_bytes : l->store_bytes);
    uint8_t *pool = (kind == KVM_SLOT_F16 ? b->f16 : kind == KVM_SLOT_PACKED ? b->packed : b->store)[layer];
    return pool + *n_bytes * (size_t)slot;
}

static kvmix_status export_slot(kvm_backend *b, int32_t layer, kvm_slot_kind kind, int32_t slot, uint8_t *out) {
    size_t n_bytes;
    const uint8_t *bytes = slot_bytes(b, layer, kind, slot, &n_bytes);
    memcpy(out, bytes, n_bytes);
    return KVMIX_OK;
}

static kvmix_status import_slot(kvm_backend *b, int32_t layer, kvm_slot_kind kind, int32_t slot, const uint8_t *in) {
    size_t n_bytes;
    uint8_t *bytes = slot_bytes(b, layer, kind, slot, &n_bytes);
    memcpy(bytes, in, n_bytes);
    return KVMIX_OK;
}

/* ---- memory -------------------------------------------------------------------------------------------------- */

/* Hands out 64-byte aligned parts of a mapping; with base NULL it only counts. */
typedef struct {
    uint8_t *base;
    uint64_t used;
} arena;

static void *carve(arena *a, int32_t count, int32_t per, size_t size) {
    void *part = a->base != NULL ? a->base + a->used : NULL;
    a->used += ((uint64_t)count * (uint64_t)per * size + 63) & ~(uint64_t)63;
    return part;
}

typedef struct {
    int32_t q_width, o_width, n_in, d_k, d_v, n_rot, n_group, m_max;
    size_t partials; /* floats */
} widths;

static widths measure(const kvm_net *net, const kvm_backend_options *options) {
    widths w = {.n_in = kvm_max(net->n_embd, net->n_ff)};
    for (int32_t i = 0; i < net->n_layer; i++) {
        const kvm_layer *l = &net->layers[i];
        int32_t group = l->n_head / l->n_head_kv;
        w.q_width = kvm_max(w.q_width, l->n_head * l->d_k);
        w.o_width = kvm_max(w.o_width, l->n_head * l->d_v);
        w.d_k = kvm_max(w.d_k, l->d_k);
        w.d_v = kvm_max(w.d_v, l->d_v);
        w.n_rot = kvm_max(w.n_rot, l->n_rot);
        w.n_group = kvm_max(w.n_group, l->group + 1);
        w.m_max = kvm_max(w.m_max, kvm_max(group, 16 * kvm_min(group, 4)));
        size_t partials = kvm_cpu_partial_floats(KVM_FEW_ROWS * l->n_head, l->d_v) * (size_t)kvm_cpu_max_runs(options->n_ctx);
        w.partials = partials > w.partials ? partials : w.partials;
    }
    w.n_in = kvm_max(w.n_in, w.o_width);
    return w;
}

static void carve_scratch(arena *a, const widths *w, bool studied, kvm_cpu_scratch *s) {
    int32_t d = kvm_max(w->d_k, w->d_v), k_groups = kvm_ceil_div(w->d_k, KVM_GROUP);
    int32_t v_groups = kvm_ceil_div(w->d_v, KVM_GROUP);
    s->weights = carve(a, KVM_TILE_IN, KVM_TILE_OUT, sizeof(float));
    s->k = carve(a, d, KVM_PAGE, sizeof(float));
    s->v = carve(a, d, KVM_PAGE, sizeof(float));
    s->codes = carve(a, d, KVM_PAGE, 1);
    s->q_rms = studied ? carve(a, w->d_k, KVM_PAGE, sizeof(float)) : NULL;
    s->q = carve(a, w->m_max, w->d_k, sizeof(float));
    s->q_packed = carve(a, w->m_max, w->d_k, sizeof(float));
    s->q8 = (kvm_q8_queries){.q = carve(a, w->m_max, w->d_k, 1), .scale = carve(a, w->m_max, k_groups, sizeof(float)),
                             .sum = carve(a, w->m_max, k_groups, sizeof(int32_t))};
    s->score = carve(a, w->m_max, KVM_PAGE, sizeof(float));
    s->u8 = (kvm_u8_weights){.w = carve(a, w->m_max, v_groups * KVM_PAGE, 1),
                             .scale = carve(a, w->m_max, v_groups * KVM_PAGE / KVM_WEIGHT_BLOCK, sizeof(float))};
    s->offset = carve(a, w->m_max, 1, sizeof(float));
    s->mean = carve(a, w->d_k, 1, sizeof(float));
    s->run = carve(a, 1, 1, kvm_cpu_partial_floats(w->m_max, w->d_v) * sizeof(float));
    s->total = carve(a, 1, 1, kvm_cpu_partial_floats(w->m_max, w->d_v) * sizeof(float));
}

/* Lays out the workspace; b has net, options and, when it has a mapping, a. */
static void carve_workspace(arena *a, kvm_backend *b, int32_t n_threads) {
    const kvm_net *net = b->net;
    int32_t n_batch = b->options.n_batch;
    widths w = measure(net, &b->options);
    b->q_width = w.q_width;
    b->o_width = w.o_width;
    b->m_max = w.m_max;
    b->hidden = carve(a, n_batch, net->n_embd, sizeof(float));
    b->normed = carve(a, n_batch, net->n_embd, sizeof(float));
    b->result = carve(a, n_batch, net->n_embd, sizeof(float));
    b->q = carve(a, n_batch, w.q_width, sizeof(float));
    b->k = carve(a, n_batch, w.q_width, sizeof(float));
    b->v = carve(a, n_batch, w.o_width, sizeof(float));
    b->attention = carve(a, n_batch, w.o_width, sizeof(float));
    b->gate = carve(a, n_batch, net->n_ff, sizeof(float));
    b->up = carve(a, n_batch, net->n_ff, sizeof(float));
    b->logits = carve(a, b->options.n_logits, net->n_vocab, sizeof(float));
    b->rope = carve(a, w.n_group, 1, sizeof *b->rope);
    for (int32_t g = 0; g < w.n_group; g++) {
        float *pairs = carve(a, n_batch, w.n_rot, sizeof(float));
        if (a->base != NULL) b->rope[g].pairs = pairs;
    }
    b->blocks = carve(a, n_batch, 1, sizeof *b->blocks);
    b->partials = carve(a, 1, 1, w.partials * sizeof(float));
    b->q8 = carve(a, n_batch, 1, sizeof *b->q8);
    for (int32_t r = 0; r < n_batch; r++) {
        int32_t n_blocks = w.n_in / KVM_Q8_BLOCK + 1;
        kvm_q8_row row = {.q = carve(a, w.n_in, 1, 1), .scale = carve(a, n_blocks, 1, sizeof(float)),
                          .sum = carve(a, n_blocks, 1, sizeof(float)), .sum16 = carve(a, n_blocks, 1, sizeof(float))};
        if (a->base != NULL) b->q8[r] = row;
    }
    b->scratch = carve(a, n_threads, 1, sizeof *b->scratch);
    for (int32_t t = 0; t < n_threads; t++) {
        kvm_cpu_scratch scratch;
        carve_scratch(a, &w, b->options.page_hook != NULL, &scratch);
        if (a->base != NULL) b->scratch[t] = scratch;
    }
}

static uint64_t workspace_bytes(const kvm_net *net, const kvm_backend_options *options) {
    kvm_backend b = {.net = net, .options = *options};
    arena counting = {0};
    carve_workspace(&counting, &b, options->n_threads > 0 ? options->n_threads : kvm_pool_default_size());
    return counting.used;
}

/* the pools and stores of every layer */
static void carve_cache(arena *a, kvm_backend *b) {
    for (int32_t i = 0; i < b->net->n_layer; i++) {
        const kvm_layer_layout *l = &b->cache->layers[i];
        int32_t group = b->net->layers[i].group;
        uint8_t *f16 = carve(a, b->cache->n_f16[group], 1, l->f16_bytes);
        uint8_t *packed = carve(a, b->cache->n_packed[group], 1, l->packed_bytes);
        uint8_t *store = carve(a, b->cache->n_store, 1, l->store_bytes);
        if (a->base == NULL) continue;
        b->f16[i] = f16;
        b->packed[i] = packed;
        b->store[i] = store;
    }
}

/* zero pages that cost nothing until they are touched; huge ones where the system has them: attention over a cold cache
 * is 8-20% faster for it */
static uint8_t *map(uint64_t n_bytes) {
    if (n_bytes > SIZE_MAX / 2) return NULL;
    void *memory = mmap(NULL, (size_t)n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(memory, (size_t)n_bytes, MADV_HUGEPAGE); /* a wish */
#endif
    return memory;
}

/* plainest first */
static const kvm_cpu_kernels *const kernel_tables[] = {
    &kvm_kernels_scalar,
#if defined(__x86_64__)
    &kvm_kernels_avx2,
    &kvm_kernels_avx512,
#endif
};
enum { N_KERNEL_TABLES = sizeof kernel_tables / sizeof *kernel_tables };

static const kvm_cpu_kernels *best_kernels(void) {
    int32_t i = N_KERNEL_TABLES - 1;
    while (!kernel_tables[i]->supported()) i--;
    return kernel_tables[i];
}

static const char *kernels_name(void) { return best_kernels()->name; }

static kvmix_status choose_kernels(kvm_backend *b) {
    int32_t wanted = b->options.kernels;
    if (wanted < 0 || wanted > N_KERNEL_TABLES) {
        return kvm_fail(KVMIX_ARG, "there are no kernels number %d; this build has 1 to %d", wanted, N_KERNEL_TABLES);
    }
    b->kernels = wanted == 0 ? best_kernels() : kernel_tables[wanted - 1];
    if (b->kernels->supported()) return KVMIX_OK;
    return kvm_fail(KVMIX_UNSUPPORTED, "this CPU cannot run the %s kernels", b->kernels->name);
}

static void close(kvm_backend *b) {
    if (b == NULL) return;
    kvm_pool_close(b->pool);
    if (b->cache_memory != NULL) munmap(b->cache_memory, (size_t)b->cache_bytes);
    if (b->workspace != NULL) munmap(b->workspace, (size_t)b->workspace_bytes);
    free(b->f16);
    free(b->packed);
    free(b->store);
    free(b);
}

static kvmix_status open_memory(kvm_backend *b) {
    uint64_t n_layer = (uint64_t)b->net->n_layer;
    arena a = {0};
    carve_cache(&a, b);
    b->cache_bytes = a.used;
    b->workspace_bytes = workspace_bytes(b->net, &b->options);
    b->f16 = kvm_alloc(n_layer, sizeof *b->f16);
    b->packed = kvm_alloc(n_layer, sizeof *b->packed);
    b->store = kvm_alloc(n_layer, sizeof *b->store);
    b->cache_memory = map(b->cache_bytes);
    b->workspace = map(b->workspace_bytes);
    if (!b->f16 || !b->packed || !b->store || !b->cache_memory || !b->workspace) {
        return kvm_fail(KVMIX_NOMEM, "no memory for %llu bytes of cache and %llu of workspace; use a smaller context (-c)",
                        (unsigned long long)b->cache_bytes, (unsigned long long)b->workspace_bytes);
    }
    a = (arena){.base = b->cache_memory};
    carve_cache(&a, b);
    a = (arena){.base = b->workspace};
    carve_workspace(&a, b, kvm_pool_size(b->pool));
    return KVMIX_OK;
}

static kvmix_status open(kvm_backend **out, const kvm_net *net, const kvm_cache_layout *layout,
                         const kvm_backend_options *options) {
    *out = NULL;
    kvm_backend *b = kvm_alloc_zero(1, sizeof *b);
    if (b == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for the CPU backend");
    b->net = net;
    b->cache = layout;
    b->options = *options;
    kvmix_status status = choose_kernels(b);
    if (status == KVMIX_OK) status = kvm_pool_open(&b->pool, options->n_threads);
    if (status == KVMIX_OK) status = open_memory(b);
    if (status != KVMIX_OK) {
        close(b);
        return status;
    }
    *out = b;
    return KVMIX_OK;
}

static bool can_weight(kvm_dtype type) { return type < KVM_DTYPE_COUNT; }

static bool can_attend(kvm_kvtype k_type, kvm_kvtype v_type, int32_t d_k, int32_t d_v) {
    return k_type < KVM_KVTYPE_COUNT && v_type < KVM_KVTYPE_COUNT && d_k % 16 == 0 && d_k <= KVM_HEAD_DIM_MAX &&
           d_v % 16 == 0 && d_v <= KVM_HEAD_DIM_MAX;
}

static void allocated(const kvm_backend *b, uint64_t *cache_bytes, uint64_t *workspace) {
    *cache_bytes = b->cache_bytes;
    *workspace = b->workspace_bytes;
}

const kvm_backend_ops kvm_cpu_backend = {
    .name = "cpu", .kernels = kernels_name, .can_weight = can_weight, .can_attend = can_attend, .workspace_bytes = workspace_bytes, .open = open,
    .close = close, .allocated = allocated, .embed = embed, .attn_in = attn_in,
    .pack = kvm_cpu_pack, .attend = kvm_cpu_attend, .attn_out = attn_out, .ffn = ffn, .head = head, .logits = logits,
    .copy_store = copy_store, .export_slot = export_slot, .import_slot = import_slot};
