/* attend.c - the stage `attend`: one softmax over sinks, packed pages and f16 pages.
 *
 * Keys are cut into *runs* at fixed positions: the packed pages of each 8 (1,024 positions), then the sinks, then the
 * f16 pages of each 8. A run gives a *partial* - for each query the maximum m, the sum l of exp(score - m) and the
 * sum acc of exp(score - m) * v - with an online softmax over its pages; partials merge in the order of the runs. So
 * a row's bits depend on its sequence and position alone: not on the threads, not on which rows share its batch.
 *
 * Rows of one sequence with one cut form a block; a block's queries of one KV head (rows x n_head / n_head_kv) go
 * through every page together, so each page is decoded once for all of them. With many rows a thread takes a block
 * and a head; with few (decoding) it takes a block, a head and a run, and a second pass merges.
 *
 * Packed pages live in another frame (kvtype.h 2): they meet q' = H(balance * q) and the logit q.mean, and their acc
 * is rotated back once, before the sinks and the f16 pages join.
 *
 * Packed codes are small integers: q' is quantized to 8 bits for each group of channels, and the weights of the values
 * for each block of positions, so that both products are integer dot products over codes that are decoded once. With
 * act_f32 packed pages are decoded to floats and multiplied as such. A page of type f16 is multiplied in floats either
 * way.
 *
 * Bytes moved for a token: every byte of its packed pages and its f16 window, once for each KV head; the bound is
 * reading them, so each page is asked for while the one before it is worked on.
 */
#include "cpu.h"

enum { RUN_PAGES = 8 };

typedef struct {
    kvm_backend *b;
    const kvm_layer *layer;
    const kvm_layer_layout *layout;
    int32_t layer_index, n_blocks, group; /* group: query heads of a KV head */
    const kvm_plan *plan;
    bool floats; /* packed pages in f32, not in 8-bit integers */
    bool split;
} attend_context;

/* one block and one KV head in one thread's hands */
typedef struct {
    const attend_context *c;
    const kvm_attend_block *block;
    const kvm_plan_row *rows; /* the block's */
    const kvm_view *view;
    int32_t head, m; /* m queries: index row * group + g */
    kvm_cpu_scratch *s;
    const uint8_t *store;
} unit;

typedef struct {
    float *m, *l; /* [queries] */
    float *acc;   /* [queries][d_v] */
} partial;

int32_t kvm_cpu_max_runs(int32_t n_ctx) { return kvm_ceil_div(kvm_ceil_div(n_ctx, KVM_PAGE), RUN_PAGES) + 3; }
size_t kvm_cpu_partial_floats(int32_t m, int32_t d_v) { return (size_t)m * (size_t)(d_v + 2); }

static partial partial_at(float *floats, int32_t m) { return (partial){floats, floats + m, floats + 2 * m}; }

static const uint16_t *halves(const uint8_t *bytes) { return (const uint16_t *)(const void *)bytes; }

static void clear(partial p, int32_t m, int32_t d_v) {
    for (int32_t i = 0; i < m; i++) {
        p.m[i] = -INFINITY;
        p.l[i] = 0;
    }
    memset(p.acc, 0, (size_t)m * (size_t)d_v * sizeof *p.acc);
}

static void scale_row(float *row, int32_t n, float factor) {
    for (int32_t i = 0; i < n; i++) row[i] *= factor;
}

static void merge(partial total, partial run, int32_t m, int32_t d_v) {
    for (int32_t i = 0; i < m; i++) {
        if (run.m[i] == -INFINITY) continue; /* this row saw nothing of the run */
        float top = total.m[i] > run.m[i] ? total.m[i] : run.m[i];
        float keep = expf(total.m[i] - top), join = expf(run.m[i] - top);
        float *to = total.acc + (size_t)i * (size_t)d_v, *from = run.acc + (size_t)i * (size_t)d_v;
        for (int32_t j = 0; j < d_v; j++) to[j] = to[j] * keep + from[j] * join;
        total.l[i] = total.l[i] * keep + run.l[i] * join;
        total.m[i] = top;
    }
}

/* ---- one run ------------------------------------------------------------------------------------------------- */

/* positions [low, high) of the page at `base` that the row sees */
static void visible(const kvm_plan_row *row, int32_t base, int32_t n, int32_t *low, int32_t *high) {
    *low = kvm_max(row->first - base, 0);
    *high = kvm_min(row->pos + 1 - base, n);
}

static void score_f32(const unit *u, const float *q, int32_t n, const float *k, int32_t ldk) {
    memset(u->s->score, 0, (size_t)u->m * KVM_PAGE * sizeof *u->s->score);
    u->c->b->kernels->gemm_f32(u->m, n, u->c->layer->d_k, q, u->c->layer->d_k, k, ldk, u->s->score, KVM_PAGE);
}

static void score_f16(const unit *u, const uint16_t *k, ptrdiff_t ahead) {
    int32_t d = u->c->layer->d_k;
    memset(u->s->score, 0, (size_t)u->m * KVM_PAGE * sizeof *u->s->score);
    u->c->b->kernels->gemm_f16(u->m, KVM_PAGE, d, u->s->q, d, k, KVM_PAGE, u->s->score, KVM_PAGE, ahead);
}

static void mix_f32(const unit *u, int32_t n, const float *v, partial out) {
    int32_t d = u->c->layer->d_v;
    u->c->b->kernels->gemm_f32(u->m, d, n, u->s->score, KVM_PAGE, v, d, out.acc, d);
}

static void mix_f16(const unit *u, int32_t n, const uint16_t *v, ptrdiff_t ahead, partial out) {
    int32_t d = u->c->layer->d_v;
    u->c->b->kernels->gemm_f16(u->m, d, n, u->s->score, KVM_PAGE, v, d, out.acc, d, ahead);
}

/* The scores of n positions from `base` on become weights, those that a row does not see 0; `skip` are masked.
 * Returns the end of what any row sees. */
static int32_t weigh(const unit *u, int32_t base, int32_t n, int32_t skip, partial out) {
    int32_t d_v = u->c->layer->d_v, end = 0;
    float *score = u->s->score;
    for (int32_t i = 0; i < u->m; i++, score += KVM_PAGE) {
        int32_t low, high;
        visible(&u->rows[i / u->c->group], base, n, &low, &high);
        low = kvm_max(low, skip);
        if (low >= high) {
            memset(score, 0, KVM_PAGE * sizeof *score);
            continue;
        }
        for (int32_t p = 0; p < low; p++) score[p] = -INFINITY;
        for (int32_t p = high; p < KVM_PAGE; p++) score[p] = -INFINITY;
        float factor = u->c->b->kernels->softmax_step(score, &out.m[i], &out.l[i]);
        if (factor != 1.0f) scale_row(out.acc + (size_t)i * (size_t)d_v, d_v, factor);
        end = kvm_max(end, high);
    }
    return end;
}

/* sum over n of a * b, in 16 interleaved lanes, folded; 16 divides n */
static float dot(const float *a, const float *b, int32_t n) {
    float lane[16] = {0};
    for (int32_t i = 0; i < n; i += 16) {
        for (int32_t j = 0; j < 16; j++) lane[j] += a[i + j] * b[i + j];
    }
    for (int32_t half = 8; half > 0; half /= 2) {
        for (int32_t j = 0; j < half; j++) lane[j] += lane[j + half];
    }
    return lane[0];
}

/* x: [d] -> a query of the packed keys in 8 bits. What is not finite may get lost here: q . mean has it, too. */
static void quantize_query(const float *x, int32_t d, int32_t query, kvm_q8_queries out) {
    int32_t group = kvm_group_of(d), n_groups = d / group;
    int8_t *q = out.q + query * d;
    for (int32_t g = 0; g < n_groups; g++, x += group, q += group) {
        float lane[16] = {0}, amax = 0;
        int32_t sum = 0;
        for (int32_t j = 0; j < group; j += 16) {
            for (int32_t i = 0; i < 16; i++) lane[i] = fabsf(x[j + i]) > lane[i] ? fabsf(x[j + i]) : lane[i];
        }
        for (int32_t j = 0; j < 16; j++) amax = lane[j] > amax ? lane[j] : amax;
        float inv = amax > 0 ? 127.0f / amax : 0;
        for (int32_t j = 0; j < group; j++) {
            float rounded = (x[j] * inv + 12582912.0f) - 12582912.0f; /* 1.5 x 2^23: to nearest even */
            q[j] = (int8_t)(fabsf(rounded) < 128.0f ? rounded : 0);
            sum += q[j];
        }
        out.scale[query * n_groups + g] = amax / 127.0f;
        out.sum[query * n_groups + g] = sum;
    }
}

/* q' of every query for packed keys under this balance */
static void turn_queries(const unit *u, const uint16_t *balance) {
    int32_t d = u->c->layer->d_k, block = kvm_hadamard_block(d, KVM_SIDE_K);
    float factor[KVM_HEAD_DIM_MAX];
    u->c->b->kernels->load_f16(balance, d, factor);
    for (int32_t i = 0; i < u->m; i++) {
        const float *q = u->s->q + i * d;
        float *turned = u->s->q_packed + i * d;
        for (int32_t j = 0; j < d; j++) turned[j] = factor[j] * q[j];
        u->c->b->kernels->hadamard(turned, d, 1, block);
        if (!u->c->floats) quantize_query(turned, d, i, u->s->q8);
    }
}

/* the scores of a packed page */
static void score_page(const unit *u, const uint8_t *k, ptrdiff_t ahead) {
    const kvm_layer_layout *l = u->c->layout;
    const kvm_cpu_kernels *kernels = u->c->b->kernels;
    int32_t d = u->c->layer->d_k;
    float *score = u->s->score, *offset = u->s->offset;
    if (l->k_type == KVM_KVTYPE_F16) {
        score_f16(u, halves(k), ahead);
        return;
    }
    if (l->k.balance >= 0) turn_queries(u, halves(k + l->k.balance));
    kernels->load_f16(halves(k + l->k.mean), d, u->s->mean);
    for (int32_t i = 0; i < u->m; i++) offset[i] = dot(u->s->q + i * d, u->s->mean, d);
    if (u->c->floats) {
        kernels->load_packed(l->k_type, KVM_SIDE_K, k, d, u->s->k);
        score_f32(u, u->s->q_packed, KVM_PAGE, u->s->k, KVM_PAGE);
        for (int32_t i = 0; i < u->m * KVM_PAGE; i++) score[i] += offset[i / KVM_PAGE];
    } else {
        kernels->score_packed(l->k_type, k, halves(k + l->k.scales), d, u->m, u->s->q8, offset, score, ahead);
    }
}

/* acc += weights . values of a packed page, of which n positions are seen */
static void mix_page(const unit *u, int32_t n, const uint8_t *v, ptrdiff_t ahead, partial out) {
    const kvm_layer_layout *l = u->c->layout;
    const kvm_cpu_kernels *kernels = u->c->b->kernels;
    int32_t d = u->c->layer->d_v;
    if (l->v_type == KVM_KVTYPE_F16) {
        mix_f16(u, n, halves(v), ahead, out);
    } else if (u->c->floats) {
        kernels->load_packed(l->v_type, KVM_SIDE_V, v, d, u->s->v);
        mix_f32(u, n, u->s->v, out);
    } else {
        kernels->quantize_weights(u->s->score, halves(v + l->v.scales), d / kvm_group_of(d), u->m, u->s->u8);
        kernels->mix_packed(l->v_type, v, d, u->m, u->s->u8, out.acc, ahead);
    }
}

static void attend_packed_page(const unit *u, int32_t page, bool last, partial out) {
    const attend_context *c = u->c;
    const kvm_layer_layout *l = c->layout;
    const kvm_page_slots *slots = u->view->pages + page;
    int32_t sink = page == 0 ? c->b->cache->sink : 0;
    const uint8_t *k = kvm_cpu_packed_page(c->b, c->layer_index, slots->packed, u->head);
    ptrdiff_t ahead = last ? 0 : (slots[1].packed - slots[0].packed) * (ptrdiff_t)l->packed_bytes;
    score_page(u, k, ahead);
    int32_t end = weigh(u, page * KVM_PAGE, KVM_PAGE, sink, out);
    mix_page(u, end, k + l->packed.v, ahead, out);
}

static void attend_f16_page(const unit *u, int32_t page, bool last, partial out) {
    const attend_context *c = u->c;
    const kvm_page_slots *slots = u->view->pages + page;
    const uint8_t *k = kvm_cpu_f16_page(c->b, c->layer_index, slots->f16, u->head);
    ptrdiff_t ahead = last ? 0 : (slots[1].f16 - slots[0].f16) * (ptrdiff_t)c->layout->f16_bytes;
    int32_t base = page * KVM_PAGE, n = kvm_min(KVM_PAGE, u->rows[u->block->n_rows - 1].pos + 1 - base);
    score_f16(u, halves(k), ahead);
    int32_t end = weigh(u, base, n, 0, out);
    mix_f16(u, end, halves(k + c->layout->f16.v), ahead, out);
}

static void attend_sinks(const unit *u, partial out) {
    const attend_context *c = u->c;
    int32_t sink = c->b->cache->sink;
    c->b->kernels->load_f16(halves(u->store), c->layer->d_k * sink, u->s->k);
    c->b->kernels->load_f16(halves(u->store + c->layout->store.sink_v), c->layer->d_v * sink, u->s->v);
    score_f32(u, u->s->q, sink, u->s->k, sink);
    int32_t end = weigh(u, 0, sink, 0, out);
    mix_f32(u, end, u->s->v, out);
}

/* first and last page that the block's rows see, and the first that is read in f16 */
static void block_pages(const kvm_plan_row *rows, int32_t n_rows, int32_t *first, int32_t *last, int32_t *f16_from) {
    *first = rows[0].first / KVM_PAGE;
    *last = rows[n_rows - 1].pos / KVM_PAGE;
    *f16_from = kvm_max(rows[0].cut / KVM_PAGE, *first);
}

static void count_runs(const attend_context *c, kvm_attend_block *block) {
    const kvm_plan_row *rows = &c->plan->rows[block->row];
    int32_t first, last, f16_from;
    block_pages(rows, block->n_rows, &first, &last, &f16_from);
    block->n_packed = f16_from > first ? (f16_from - 1) / RUN_PAGES - first / RUN_PAGES + 1 : 0;
    block->n_runs = block->n_packed;
    if (f16_from > 0 && rows[0].first < c->b->cache->sink) block->n_runs++;
    if (last >= f16_from) block->n_runs += last / RUN_PAGES - f16_from / RUN_PAGES + 1;
}

static void attend_run(const unit *u, int32_t run, partial out) {
    int32_t first, last, f16_from, n_packed = u->block->n_packed;
    block_pages(u->rows, u->block->n_rows, &first, &last, &f16_from);
    clear(out, u->m, u->c->layer->d_v);
    if (run < n_packed) {
        int32_t from = (first / RUN_PAGES + run) * RUN_PAGES, to = kvm_min(from + RUN_PAGES, f16_from);
        for (int32_t p = kvm_max(from, first); p < to; p++) attend_packed_page(u, p, p + 1 == to, out);
        return;
    }
    run -= n_packed;
    if (f16_from > 0 && u->rows[0].first < u->c->b->cache->sink && run-- == 0) {
        attend_sinks(u, out);
        return;
    }
    int32_t from = (f16_from / RUN_PAGES + run) * RUN_PAGES, to = kvm_min(from + RUN_PAGES, last + 1);
    for (int32_t p = kvm_max(from, f16_from); p < to; p++) attend_f16_page(u, p, p + 1 == to, out);
}

/* ---- units --------------------------------------------------------------------------------------------------- */

static unit open_unit(const attend_context *c, int32_t block_index, int32_t head, int32_t thread) {
    const kvm_attend_block *block = &c->b->blocks[block_index];
    const kvm_plan_row *rows = &c->plan->rows[block->row];
    unit u = {.c = c, .block = block, .rows = rows, .view = &c->plan->views[rows->view], .head = head,
              .m = block->n_rows * c->group, .s = &c->b->scratch[thread]};
    u.store = kvm_cpu_store(c->b, c->layer_index, u.view->store, head);
    return u;
}

/* the unit's queries, scaled; and their packed form where the balance is one for all pages */
static void load_queries(const unit *u) {
    const attend_context *c = u->c;
    int32_t d = c->layer->d_k;
    for (int32_t i = 0; i < u->m; i++) {
        int32_t row = u->block->row + i / c->group, head = u->head * c->group + i % c->group;
        const float *q = c->b->q + (size_t)row * (size_t)c->b->q_width + (size_t)(head * d);
        for (int32_t j = 0; j < d; j++) u->s->q[i * d + j] = q[j] * c->layer->scale;
    }
    if (u->block->n_packed > 0 && c->layout->store.balance >= 0) {
        turn_queries(u, halves(u->store + c->layout->store.balance));
    }
}

static partial split_partial(const unit *u, int32_t run) {
    size_t floats = kvm_cpu_partial_floats(u->m, u->c->layer->d_v);
    size_t index = (size_t)(run * u->c->layer->n_head_kv + u->head);
    return partial_at(u->c->b->partials + u->block->partials + index * floats, u->m);
}

static void turn_back(const unit *u, partial total) {
    int32_t d = u->c->layer->d_v;
    if (u->c->layout->v_type == KVM_KVTYPE_F16) return;
    for (int32_t i = 0; i < u->m; i++) {
        u->c->b->kernels->hadamard(total.acc + i * d, d, 1, kvm_hadamard_block(d, KVM_SIDE_V));
    }
}

/* merges the unit's runs, computing them here unless they were split, and writes its heads of the result */
static void attend_unit(void *context, int32_t item, int32_t thread) {
    const attend_context *c = context;
    unit u = open_unit(c, item / c->layer->n_head_kv, item % c->layer->n_head_kv, thread);
    int32_t d_v = c->layer->d_v;
    partial total = partial_at(u.s->total, u.m);
    clear(total, u.m, d_v);
    if (!c->split) load_queries(&u);
    for (int32_t run = 0; run < u.block->n_runs; run++) {
        partial part = c->split ? split_partial(&u, run) : partial_at(u.s->run, u.m);
        if (!c->split) attend_run(&u, run, part);
        merge(total, part, u.m, d_v);
        if (run == u.block->n_packed - 1) turn_back(&u, total);
    }
    for (int32_t i = 0; i < u.m; i++) {
        int32_t row = u.block->row + i / c->group, head = u.head * c->group + i % c->group;
        float *out = c->b->attention + (size_t)row * (size_t)c->b->o_width + (size_t)(head * d_v);
        for (int32_t j = 0; j < d_v; j++) out[j] = total.acc[i * d_v + j] / total.l[i];
    }
}

/* Runs of a block and head follow each other, so that a thread seldom has to load queries. */
static void attend_split_run(void *context, int32_t item, int32_t thread) {
    const attend_context *c = context;
    int32_t block = 0, n_head_kv = c->layer->n_head_kv, n_runs;
    for (; item >= (n_runs = c->b->blocks[block].n_runs) * n_head_kv; block++) item -= n_runs * n_head_kv;
    int32_t head = item / n_runs, owner = block * n_head_kv + head;
    unit u = open_unit(c, block, head, thread);
    if (u.s->owner != owner) load_queries(&u);
    u.s->owner = owner;
    attend_run(&u, item % n_runs, split_partial(&u, item % n_runs));
}

static void make_blocks(attend_context *c) {
    const kvm_plan_row *rows = c->plan->rows;
    int32_t most = kvm_max(c->b->m_max / c->group, 1);
    size_t partials = 0;
    for (int32_t row = 0, n; row < c->plan->n_rows; row += n) {
        for (n = 1; n < most && row + n < c->plan->n_rows; n++) {
            if (rows[row + n].view != rows[row].view || rows[row + n].cut != rows[row].cut) break;
        }
        kvm_attend_block *block = &c->b->blocks[c->n_blocks++];
        *block = (kvm_attend_block){.row = row, .n_rows = n, .partials = partials};
        count_runs(c, block);
        partials += (size_t)(block->n_runs * c->layer->n_head_kv) *
                    kvm_cpu_partial_floats(n * c->group, c->layer->d_v);
    }
}

kvmix_status kvm_cpu_attend(kvm_backend *b, int32_t layer, const kvm_plan *plan) {
    const kvm_layer *l = &b->net->layers[layer];
    attend_context c = {.b = b, .layer = l, .layout = &b->cache->layers[layer], .layer_index = layer, .plan = plan,
                        .group = l->n_head / l->n_head_kv, .floats = b->options.act_f32, .split = plan->n_rows <= KVM_FEW_ROWS};
    make_blocks(&c);
    if (c.split) {
        int32_t n_runs = 0;
        for (int32_t i = 0; i < kvm_pool_size(b->pool); i++) b->scratch[i].owner = -1;
        for (int32_t i = 0; i < c.n_blocks; i++) n_runs += b->blocks[i].n_runs;
        kvm_pool_run(b->pool, n_runs * l->n_head_kv, attend_split_run, &c);
    }
    kvm_pool_run(b->pool, c.n_blocks * l->n_head_kv, attend_unit, &c);
    return KVMIX_OK;
}
