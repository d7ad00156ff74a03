/* test_attention.c - pack and attend of the CPU backend against attention in double precision over the same cache.
 *
 * The test plays engine: it asks the cache for plans, writes K and V (and the query rms rows) where attn_in would, and
 * lets the backend pack and attend. Packed pages are then decoded with the plain decoder and taken back into the frame
 * of the model, in double: k = balance * H(k') + mean, v = H(v'). So the oracle knows nothing of turned queries,
 * offsets, runs, blocks or partials. Means and balances are compared with their definition, keys and values with what
 * was packed. Every position that nobody wrote is NaN: whatever reads one cannot be right.
 */
#include <stdlib.h>

#include "check.h"
#include "cpu/cpu.h"
#include "kvcache.h"

enum { N_HEAD_KV = 2, MAX_GROUP = 7, MAX_HEAD = N_HEAD_KV * MAX_GROUP, D = KVM_HEAD_DIM_MAX };
enum { N_CTX = 1024, N_BATCH = 128, N_SEQ = 2, OTHER_ROWS = 2, SHIFT = 37 };

static const int32_t lengths[] = {1, 15, 16, 17, 127, 128, 129, 1000}, batches[] = {1, 3, 32};
enum { N_LENGTHS = sizeof lengths / sizeof *lengths, N_BATCHES = sizeof batches / sizeof *batches };

typedef struct {
    kvm_kvtype k, v;
    int32_t d_k, d_v, group, window, sink, span;
    bool balance_page, strict, two; /* two: another sequence shares the batches */
    bool act_f32;                   /* packed pages in floats, not in 8-bit integers */
    int32_t batch;                  /* this one only, 0 = all */
} shape;

typedef struct {
    shape s;
    int32_t kernels;
    kvm_layer layer;
    kvm_net net;
    kvm_recipe recipe;
    kvm_cache *cache;
    const kvm_cache_layout *layout;
    kvm_backend *b;
} bench;

/* What the model would give; position p of sequence s is [p + s * SHIFT]. K and V are f16 numbers. */
static float k_data[N_HEAD_KV][N_CTX][D], v_data[N_HEAD_KV][N_CTX][D], q_data[MAX_HEAD][N_CTX][D];
static double channel_size[D]; /* standard deviation of q * k */
/* what packed pages hold, in the frame of the model */
static double k_packed[N_HEAD_KV][N_CTX][D], v_packed[N_HEAD_KV][N_CTX][D];

/* ---- data ---------------------------------------------------------------------------------------------------- */

static uint64_t random_state = 88172645463325252u;

static double uniform(void) { /* [0, 1) */
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (double)(random_state >> 11) * 0x1p-53;
}

static double normal(void) {
    double sum = -6;
    for (int32_t i = 0; i < 12; i++) sum += uniform();
    return sum;
}

/* Channels of very different sizes, keys with large means that drift from page to page: what preconditioning is for. */
static void make_data(void) {
    for (int32_t c = 0; c < D; c++) {
        double k_size = exp2(6 * uniform() - 3), q_size = exp2(6 * uniform() - 3);
        channel_size[c] = k_size * q_size;
        for (int32_t h = 0; h < N_HEAD_KV; h++) {
            double k_mean = 4 * k_size * normal(), v_mean = normal(), drift = 0;
            for (int32_t p = 0; p < N_CTX; p++) {
                if (p % 50 == 0) drift = k_size * normal();
                k_data[h][p][c] = kvm_f16_to_f32(kvm_f32_to_f16((float)(k_mean + drift + k_size * normal())));
                v_data[h][p][c] = kvm_f16_to_f32(kvm_f32_to_f16((float)(v_mean + normal())));
            }
        }
        for (int32_t h = 0; h < MAX_HEAD; h++) {
            double q_mean = 0.3 * q_size * normal();
            for (int32_t p = 0; p < N_CTX; p++) q_data[h][p][c] = (float)(q_mean + q_size * normal());
        }
    }
}

static int32_t at(int32_t seq, int32_t pos) { return (pos + seq * SHIFT) % N_CTX; }

/* ---- a backend and its cache --------------------------------------------------------------------------------- */

/* false where this machine has no such kernels */
static bool open_bench(bench *w, const shape *s, int32_t kernels) {
    *w = (bench){.s = *s, .kernels = kernels};
    double size = 0;
    for (int32_t c = 0; c < s->d_k; c++) size += channel_size[c] * channel_size[c];
    w->layer = (kvm_layer){.n_head = N_HEAD_KV * s->group, .n_head_kv = N_HEAD_KV, .d_k = s->d_k, .d_v = s->d_v,
                           .scale = (float)(2 / sqrt(size)), .span = s->span};
    w->net = (kvm_net){.n_layer = 1, .n_embd = 32, .n_ff = 32, .n_vocab = 32, .layers = &w->layer};
    w->recipe = (kvm_recipe){.n_layer = 1, .k = {(uint8_t)s->k}, .v = {(uint8_t)s->v}, .window = s->window,
                             .sink = s->sink, .balance_page = s->balance_page};
    kvm_cache_sizes sizes = {.n_ctx = N_SEQ * N_CTX, .n_batch = N_BATCH, .n_seq = N_SEQ, .strict = s->strict};
    kvm_backend_options options = {.n_batch = N_BATCH, .n_logits = 1, .n_threads = 2, .n_ctx = N_SEQ * N_CTX,
                                   .act_f32 = s->act_f32, .kernels = kernels};
    if (!CHECK_STATUS(KVMIX_OK, kvm_cache_open(&w->cache, &w->net, &w->recipe, &sizes))) return false;
    w->layout = kvm_cache_get_layout(w->cache);
    kvmix_status status = kvm_cpu_backend.open(&w->b, &w->net, w->layout, &options);
    if (status != KVMIX_UNSUPPORTED) CHECK_STATUS(KVMIX_OK, status);
    return status == KVMIX_OK;
}

static void close_bench(bench *w) {
    kvm_cpu_backend.close(w->b);
    kvm_cache_close(w->cache);
}

/* Both sequences empty, every byte of f16 pages a NaN. */
static void restart(bench *w) {
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        int32_t n_held;
        kvm_copy_job store;
        kvm_cache_truncate(w->cache, seq, 0, &n_held, &store);
    }
    memset(w->b->f16[0], 0xff, (size_t)w->layout->layers[0].f16_bytes * (size_t)w->layout->n_f16[0]);
}

static double square(double x) { return x * x; }

/* root of the mean square of channel c of a KV head's queries */
static double query_rms(const bench *w, int32_t head, int32_t i, int32_t c) {
    double sum = 0;
    for (int32_t g = 0; g < w->s.group; g++) sum += square((double)q_data[head * w->s.group + g][i][c]);
    return sqrt(sum / w->s.group);
}

/* what attn_in leaves behind */
static void append(bench *w, const kvm_plan *plan) {
    const kvm_layer_layout *l = &w->layout->layers[0];
    for (int32_t r = 0; r < plan->n_rows; r++) {
        const kvm_plan_row *row = &plan->rows[r];
        const kvm_view *view = &plan->views[row->view];
        int32_t page = row->pos / KVM_PAGE, offset = row->pos % KVM_PAGE, i = at(view->store, row->pos);
        for (int32_t h = 0; h < N_HEAD_KV; h++) {
            uint8_t *bytes = kvm_cpu_f16_page(w->b, 0, view->pages[page].f16, h);
            uint16_t *k = kvm_cpu_half(bytes), *v = kvm_cpu_half(bytes + l->f16.v), *q_rms = NULL;
            if (l->f16.q_rms >= 0) q_rms = kvm_cpu_half(bytes + l->f16.q_rms);
            if (l->store.q_rms >= 0 && page == 0) {
                q_rms = kvm_cpu_half(kvm_cpu_store(w->b, 0, view->store, h) + l->store.q_rms);
            }
            for (int32_t c = 0; c < w->s.d_k; c++) {
                k[c * KVM_PAGE + offset] = kvm_f32_to_f16(k_data[h][i][c]);
                if (q_rms != NULL) q_rms[c * KVM_PAGE + offset] = kvm_f32_to_f16((float)query_rms(w, h, i, c));
            }
            for (int32_t c = 0; c < w->s.d_v; c++) v[offset * w->s.d_v + c] = kvm_f32_to_f16(v_data[h][i][c]);
        }
        for (int32_t h = 0; h < w->layer.n_head; h++) {
            float *q = w->b->q + (size_t)r * (size_t)w->b->q_width + (size_t)(h * w->s.d_k);
            memcpy(q, q_data[h][i], (size_t)w->s.d_k * sizeof *q);
        }
    }
}

/* ---- packed pages, taken back -------------------------------------------------------------------------------- */

/* x: [d], blocks of `block`; its own inverse */
static void hadamard(double *x, int32_t d, int32_t block) {
    for (int32_t s = 1; s < block; s *= 2) {
        for (int32_t i = 0; i < d; i++) {
            if (i & s) continue;
            double a = x[i], b = x[i + s];
            x[i] = a + b;
            x[i + s] = a - b;
        }
    }
    for (int32_t i = 0; i < d; i++) x[i] /= sqrt(block);
}

/* largest power of two in d, at most `most` */
static int32_t block_of(int32_t d, int32_t most) {
    int32_t block = 1;
    while (d % (2 * block) == 0 && 2 * block <= most) block *= 2;
    return block;
}

/* sqrt(rms k / rms q) of positions [first, end) of a page of sequence seq, centred and clamped: [d_k] */
static void define_balance(const bench *w, int32_t seq, int32_t head, int32_t page, int32_t first, int32_t end,
                           double *balance) {
    double log_sum = 0;
    for (int32_t c = 0; c < w->s.d_k; c++) {
        double sum = 0, k_squares = 0, q_squares = 0, n = end - first;
        for (int32_t p = first; p < end; p++) sum += (double)k_data[head][at(seq, page * KVM_PAGE + p)][c];
        for (int32_t p = first; p < end; p++) {
            int32_t i = at(seq, page * KVM_PAGE + p);
            k_squares += square((double)k_data[head][i][c] - sum / n);
            q_squares += square(query_rms(w, head, i, c));
        }
        balance[c] = pow(k_squares / q_squares, 0.25);
        log_sum += log2(balance[c]);
    }
    for (int32_t c = 0; c < w->s.d_k; c++) {
        balance[c] = fmin(fmax(balance[c] / exp2(log_sum / w->s.d_k), 0.0625), 16);
    }
}

/* NMSE of the codecs on Gaussian rows (kvtype.h; q8: uniform steps of amax / 127, amax about 2.4 sigma) */
static const double codec_error[KVM_KVTYPE_COUNT] = {
    [KVM_KVTYPE_Q8] = 3e-5, [KVM_KVTYPE_Q6] = 0.00052, [KVM_KVTYPE_Q5] = 0.0021, [KVM_KVTYPE_Q4] = 0.0071, [KVM_KVTYPE_Q3] = 0.0293, [KVM_KVTYPE_Q2] = 0.1116};

/* What was packed is what was there, but for the codec: a Hadamard has made the data nearly Gaussian. */
static void check_codec(const bench *w, kvm_kvtype type, kvm_side side, int32_t d, int32_t n, double error) {
    double least = 0.85 * codec_error[type], most = 1.15 * codec_error[type];
    if (kvm_is_trellis(type, side)) { /* 0.0826; less where positions are missing, more where channels have a mean */
        least = 0.07;
        most = 0.105;
    }
    if (n < KVM_PAGE / 2) return; /* too few for statistics */
    if (!CHECK(error <= most && error >= least)) {
        fprintf(stderr, "    %s of %d channels, kernels %d: nmse %.3g\n", kvm_kvtypes[type].name, d, w->kernels, error);
    }
}

/* The K side of a packed page of [first, end) -> k_packed; mean and balance against their definitions. */
static void take_back_k(const bench *w, int32_t seq, int32_t head, int32_t page, int32_t first, int32_t end,
                        const uint8_t *bytes) {
    static float stored[D * KVM_PAGE];
    const kvm_layer_layout *l = &w->layout->layers[0];
    kvm_decode_page(w->s.k, KVM_SIDE_K, bytes, w->s.d_k, stored);
    const uint16_t *half = (const uint16_t *)(const void *)bytes, *balance_bits = NULL;
    if (l->k.balance >= 0) balance_bits = half + l->k.balance / 2;
    if (l->store.balance >= 0) {
        balance_bits = kvm_cpu_half(kvm_cpu_store(w->b, 0, seq, head) + l->store.balance);
    }
    double mean[D] = {0}, balance[D], balance_want[D], error = 0, size = 0;
    bool means = true, balances = true;
    int32_t source = l->store.balance >= 0 ? 0 : page;
    if (balance_bits != NULL && (source > 0 || w->s.sink < KVM_PAGE)) {
        bool older = source != page; /* page 0 was full when the balance was frozen */
        define_balance(w, seq, head, source, older ? w->s.sink : first, older ? KVM_PAGE : end, balance_want);
    }
    for (int32_t c = 0; c < w->s.d_k; c++) {
        double sum = 0, largest = 0;
        for (int32_t p = first; p < end; p++) {
            double k = (double)k_data[head][at(seq, page * KVM_PAGE + p)][c];
            sum += k;
            largest = fmax(largest, fabs(k));
        }
        balance[c] = balance_bits != NULL ? (double)kvm_f16_to_f32(balance_bits[c]) : 1;
        if (balance_bits == NULL) continue;
        mean[c] = (double)kvm_f16_to_f32(half[l->k.mean / 2 + c]);
        means = means && fabs(mean[c] - sum / (end - first)) <= largest * 0x1p-10;
        balances = balances && (end - first < 8 || fabs(balance[c] - balance_want[c]) <= balance_want[c] * 0x1p-9);
    }
    for (int32_t p = first; p < end; p++) {
        double *k = k_packed[head][page * KVM_PAGE + p];
        for (int32_t c = 0; c < w->s.d_k; c++) k[c] = (double)stored[c * KVM_PAGE + p];
        if (w->s.k != KVM_KVTYPE_F16) hadamard(k, w->s.d_k, block_of(w->s.d_k, D));
        for (int32_t c = 0; c < w->s.d_k; c++) {
            double raw = (double)k_data[head][at(seq, page * KVM_PAGE + p)][c];
            k[c] = k[c] * balance[c] + mean[c];
            error += square((k[c] - raw) / balance[c]);
            size += square((raw - mean[c]) / balance[c]);
        }
    }
    check_codec(w, w->s.k, KVM_SIDE_K, w->s.d_k, end - first, error / size);
    CHECK(means);
    CHECK(balances);
}

static void take_back_v(const bench *w, int32_t seq, int32_t head, int32_t page, int32_t first, int32_t end,
                        const uint8_t *bytes) {
    static float stored[D * KVM_PAGE];
    kvm_decode_page(w->s.v, KVM_SIDE_V, bytes, w->s.d_v, stored);
    double error = 0, size = 0;
    for (int32_t p = first; p < end; p++) {
        double *v = v_packed[head][page * KVM_PAGE + p];
        for (int32_t c = 0; c < w->s.d_v; c++) v[c] = (double)stored[p * w->s.d_v + c];
        if (w->s.v != KVM_KVTYPE_F16) hadamard(v, w->s.d_v, block_of(w->s.d_v, 64));
        for (int32_t c = 0; c < w->s.d_v; c++) {
            double raw = (double)v_data[head][at(seq, page * KVM_PAGE + p)][c];
            error += square(v[c] - raw);
            size += square(raw);
        }
    }
    check_codec(w, w->s.v, KVM_SIDE_V, w->s.d_v, end - first, error / size);
}

static int32_t cut_of(const bench *w, int32_t pos) {
    if (w->s.k == KVM_KVTYPE_F16 && w->s.v == KVM_KVTYPE_F16) return 0;
    if (w->s.strict) return KVM_PAGE * (pos / KVM_PAGE + 1);
    return pos < w->s.window ? 0 : (pos - w->s.window) / KVM_PAGE * KVM_PAGE;
}

static int32_t first_of(const bench *w, int32_t pos) { return w->s.span == 0 ? 0 : kvm_max(0, pos + 1 - w->s.span); }

/* all packed pages that rows at first_pos .. last_pos of the view read */
static void take_back(const bench *w, const kvm_view *view, int32_t first_pos, int32_t last_pos) {
    int32_t n_packed = cut_of(w, last_pos) / KVM_PAGE;
    for (int32_t page = first_of(w, first_pos) / KVM_PAGE; page < n_packed; page++) {
        int32_t end = kvm_min(KVM_PAGE, last_pos + 1 - page * KVM_PAGE);
        int32_t first = page == 0 ? kvm_min(w->s.sink, end) : 0;
        if (first == end) continue; /* nothing but sinks */
        for (int32_t h = 0; h < N_HEAD_KV; h++) {
            const uint8_t *bytes = kvm_cpu_packed_page(w->b, 0, view->pages[page].packed, h);
            take_back_k(w, view->store, h, page, first, end, bytes);
            take_back_v(w, view->store, h, page, first, end, bytes + w->layout->layers[0].packed.v);
        }
    }
}

/* ---- the oracle ---------------------------------------------------------------------------------------------- */

/* attention of one query head at pos: out [d_v] */
static void attend(const bench *w, int32_t seq, int32_t head, int32_t pos, double *out) {
    static double weight[N_CTX];
    int32_t h = head / w->s.group, cut = cut_of(w, pos), first = first_of(w, pos);
    const float *q = q_data[head][at(seq, pos)];
    double top = -INFINITY, sum = 0;
    for (int32_t p = first; p <= pos; p++) {
        bool packed = p < cut && p >= w->s.sink;
        const float *raw = k_data[h][at(seq, p)];
        double dot = 0;
        for (int32_t c = 0; c < w->s.d_k; c++) dot += (double)q[c] * (packed ? k_packed[h][p][c] : (double)raw[c]);
        weight[p] = dot * (double)w->layer.scale;
        top = fmax(top, weight[p]);
    }
    memset(out, 0, (size_t)w->s.d_v * sizeof *out);
    for (int32_t p = first; p <= pos; p++) {
        bool packed = p < cut && p >= w->s.sink;
        const float *raw = v_data[h][at(seq, p)];
        double e = exp(weight[p] - top);
        sum += e;
        for (int32_t c = 0; c < w->s.d_v; c++) out[c] += e * (packed ? v_packed[h][p][c] : (double)raw[c]);
    }
    for (int32_t c = 0; c < w->s.d_v; c++) out[c] /= sum;
}

static double largest_error[2]; /* NMSE of a row, of all that was checked: with floats, with integers */

/* NMSE that a row may have. In f32 it is up to a few 1e-12: logits of some tens, each rounded at 2^-24, are what errs.
 * Queries in 8 bits move a logit by 0.5% of what logits differ by, weights in 8 bits are off by up to 1/510 of the
 * largest of their block: together up to 3.4e-5. */
static const double error_limit[2] = {1e-10, 6e-5};

static const float *result_of(const bench *w, int32_t row) {
    return w->b->attention + (size_t)row * (size_t)w->b->o_width;
}

static void check_row(const bench *w, const kvm_plan *plan, int32_t r) {
    const kvm_plan_row *row = &plan->rows[r];
    double want[D], error = 0, size = 0;
    for (int32_t h = 0; h < w->layer.n_head; h++) {
        attend(w, plan->views[row->view].store, h, row->pos, want);
        for (int32_t c = 0; c < w->s.d_v; c++) {
            double got = (double)result_of(w, r)[h * w->s.d_v + c];
            error += square(got - want[c]);
            size += square(want[c]);
        }
    }
    const shape *s = &w->s;
    bool integers = !s->act_f32 && (s->k != KVM_KVTYPE_F16 || s->v != KVM_KVTYPE_F16);
    if (!(error / size <= largest_error[integers])) largest_error[integers] = error / size;
    if (!CHECK(error <= error_limit[integers] * size)) {
        fprintf(stderr, "    k %s v %s d %d %d group %d window %d sink %d span %d%s%s%s\n", kvm_kvtypes[s->k].name,
                kvm_kvtypes[s->v].name, s->d_k, s->d_v, s->group, s->window, s->sink, s->span,
                s->balance_page ? " balance page" : "", s->strict ? " strict" : "", s->act_f32 ? " f32" : "");
        fprintf(stderr, "    kernels %d, position %d, row %d of %d: nmse %.2g\n", w->kernels, row->pos, r, plan->n_rows,
                error / size);
    }
}

/* The row by itself gives the bits that it gave among others, although decoding splits the work another way. */
static void check_alone(bench *w, const kvm_plan *plan, int32_t r) {
    static float among[MAX_HEAD * D];
    size_t n_bytes = (size_t)(w->layer.n_head * w->s.d_v) * sizeof *among;
    memcpy(among, result_of(w, r), n_bytes);
    kvm_plan alone = *plan;
    alone.rows += r;
    alone.n_rows = 1;
    memmove(w->b->q, w->b->q + (size_t)r * (size_t)w->b->q_width, (size_t)w->b->q_width * sizeof *w->b->q);
    CHECK_STATUS(KVMIX_OK, kvm_cpu_backend.attend(w->b, 0, &alone));
    CHECK(memcmp(among, result_of(w, 0), n_bytes) == 0);
}

/* What is not finite in a query is not finite in its result, and there alone: it must reach the logits, which are
 * checked. */
static void check_not_finite(bench *w, const kvm_plan *plan) {
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    float *q = w->b->q + (size_t)(plan->n_rows - 1) * (size_t)w->b->q_width, before = q[1];
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        q[1] = odd[i];
        CHECK_STATUS(KVMIX_OK, kvm_cpu_backend.attend(w->b, 0, plan));
        const float *result = result_of(w, plan->n_rows - 1);
        CHECK(!isfinite(result[0]) && (w->layer.n_head == 1 || isfinite(result[w->s.d_v])));
    }
    q[1] = before;
}

static void check_batch(bench *w, const kvm_plan *plan) {
    CHECK_STATUS(KVMIX_OK, kvm_cpu_backend.attend(w->b, 0, plan));
    for (int32_t r = 0, end; r < plan->n_rows; r = end) {
        const kvm_plan_row *first = &plan->rows[r];
        for (end = r + 1; end < plan->n_rows && plan->rows[end].view == first->view; end++) {}
        take_back(w, &plan->views[first->view], first->pos, plan->rows[end - 1].pos);
        for (int32_t i = r; i < end; i++) {
            if ((i - r) % 6 == 0 || i == end - 1) check_row(w, plan, i);
        }
    }
    check_not_finite(w, plan);
    CHECK_STATUS(KVMIX_OK, kvm_cpu_backend.attend(w->b, 0, plan));
    check_alone(w, plan, plan->n_rows - 1);
}

/* ---- cases --------------------------------------------------------------------------------------------------- */

/* n rows of sequence 0 and n_other of sequence 1, looked at or not */
static void feed(bench *w, int32_t n, int32_t n_other, bool look) {
    kvmix_row rows[N_BATCH];
    int32_t n_rows = 0, n_new[N_SEQ] = {n, n_other};
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int32_t i = 0; i < n_new[seq]; i++) {
            rows[n_rows++] = (kvmix_row){.seq = seq, .pos = kvm_cache_length(w->cache, seq) + i};
        }
    }
    const kvm_plan *plan;
    if (!CHECK_STATUS(KVMIX_OK, kvm_cache_begin(w->cache, rows, n_rows, &plan))) return;
    append(w, plan);
    CHECK_STATUS(KVMIX_OK, kvm_cpu_backend.pack(w->b, 0, plan));
    if (look) check_batch(w, plan);
    kvm_cache_commit(w->cache);
}

static void check_length(bench *w, int32_t length, int32_t batch) {
    restart(w);
    for (int32_t done = 0, n; done < length - batch; done += n) {
        n = kvm_min(N_BATCH, length - batch - done);
        feed(w, n, 0, false);
    }
    for (int32_t i = 0; w->s.two && i < 3; i++) feed(w, 0, N_BATCH - 10, false);
    feed(w, batch, w->s.two ? OTHER_ROWS : 0, true);
}

/* every length with every batch that fits into it */
static void check_shape(const shape *s) {
    for (int32_t kernels = 1; kernels <= 3; kernels++) {
        bench w;
        bool usable = open_bench(&w, s, kernels);
        for (int32_t i = 0; usable && i < N_LENGTHS * N_BATCHES; i++) {
            int32_t length = lengths[i / N_BATCHES], batch = batches[i % N_BATCHES];
            if (batch <= length && (s->batch == 0 || s->batch == batch)) check_length(&w, length, batch);
        }
        close_bench(&w);
    }
}

int main(void) {
    static const kvm_kvtype pairs[][2] = {{KVM_KVTYPE_Q4, KVM_KVTYPE_Q3}, {KVM_KVTYPE_Q2, KVM_KVTYPE_F16},
                                          {KVM_KVTYPE_F16, KVM_KVTYPE_Q8}};
    static const int32_t dims[] = {64, 80, 96, 128, 256}, groups[] = {1, 3, 7};
    make_data();
    for (int32_t i = 0; i < 2 * KVM_KVTYPE_COUNT * KVM_KVTYPE_COUNT; i++) {
        kvm_kvtype k = (kvm_kvtype)(i / 2 / KVM_KVTYPE_COUNT), v = (kvm_kvtype)(i / 2 % KVM_KVTYPE_COUNT);
        check_shape(&(shape){k, v, 64, 64, 3, .window = i / 2 % 2 * 128, .sink = 16, .balance_page = i / 4 % 2 == 0,
                             .act_f32 = i % 2 == 1, .batch = batches[i / 2 % N_BATCHES]});
    }
    for (int32_t i = 0; i < 15; i++) {
        check_shape(&(shape){KVM_KVTYPE_Q4, KVM_KVTYPE_Q3, dims[i / 3], dims[i / 3], groups[i % 3],
                             .window = i % 2 * 128, .sink = 16, .balance_page = i % 3 == 0});
    }
    for (int32_t i = 0; i < KVM_KVTYPE_COUNT; i++) {
        kvm_kvtype type = (kvm_kvtype)i;
        if (type == KVM_KVTYPE_Q8) continue; /* codec_error has it for 64 channels, the largest of more is larger */
        check_shape(&(shape){type, type, dims[1 + i % 4], dims[1 + (i + 1) % 4], 7, .window = 128, .sink = 16,
                             .act_f32 = true, .batch = batches[i % N_BATCHES]});
    }
    for (int32_t i = 0; i < 24; i++) { /* window, sinks and balance, for each pair */
        check_shape(&(shape){pairs[i / 8][0], pairs[i / 8][1], 64, 64, 1, .window = i % 2 * 128, .sink = i / 2 % 2 * 16,
                             .balance_page = i / 4 % 2 == 1, .batch = batches[i % N_BATCHES]});
    }
    check_shape(&(shape){KVM_KVTYPE_Q4, KVM_KVTYPE_Q2, 80, 48, 2, .sink = 64, .two = true});
    check_shape(&(shape){KVM_KVTYPE_Q3, KVM_KVTYPE_Q4, 64, 128, 3, .window = 100, .sink = 16, .span = 200,
                         .two = true});
    check_shape(&(shape){KVM_KVTYPE_Q4, KVM_KVTYPE_Q3, 64, 64, 3, .sink = 16, .span = 1});
    check_shape(&(shape){KVM_KVTYPE_Q4, KVM_KVTYPE_Q4, 64, 64, 3, .sink = 16, .strict = true, .two = true});
    check_shape(&(shape){KVM_KVTYPE_Q2, KVM_KVTYPE_Q3, 64, 64, 1, .balance_page = true, .strict = true});
    printf("largest NMSE of a row %.2g, with integers %.2g\n", largest_error[0], largest_error[1]);
    return check_report();
}
