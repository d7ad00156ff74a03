/* sampler.c - see sampler.h. Ties go to the lower id; the generator is splitmix64. */
#include <stdlib.h>

#include "sampler.h"

typedef struct {
    float logit;
    int32_t id;
} candidate;

struct kvmix_sampler {
    kvmix_sampling params;
    int32_t n_vocab;
    uint64_t random;
    candidate *candidates; /* [n_vocab] */
    float *weights;        /* [n_vocab] */
    int32_t *counts;       /* [n_vocab], all 0 between calls */
    int32_t *history;      /* [n_history] of room for capacity */
    int32_t n_history, capacity;
};

static kvmix_status check(const kvmix_sampling *p) {
    if (!isfinite(p->temp) || !(p->top_p > 0) || p->top_p > 1 || !(p->min_p >= 0) || p->min_p > 1) {
        return kvm_fail(KVMIX_ARG, "temp %g, top-p %g, min-p %g: temp must be finite, top-p in (0, 1], min-p in [0, 1]",
                        (double)p->temp, (double)p->top_p, (double)p->min_p);
    }
    if (!(p->repeat_penalty > 0) || !isfinite(p->repeat_penalty) || !isfinite(p->presence_penalty) ||
        !isfinite(p->frequency_penalty) || p->repeat_last_n < -1) {
        return kvm_fail(KVMIX_ARG, "repeat-penalty %g must be above 0, the other penalties finite, repeat-last-n %d at "
                        "least -1", (double)p->repeat_penalty, p->repeat_last_n);
    }
    return KVMIX_OK;
}

kvmix_status kvm_sampler_open(kvmix_sampler **out, int32_t n_vocab, const kvmix_sampling *params) {
    *out = NULL;
    KVM_TRY(check(params));
    kvmix_sampler *s = kvm_alloc_zero(1, sizeof *s);
    if (s == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a sampler");
    s->params = *params;
    s->n_vocab = n_vocab;
    s->random = params->seed;
    s->candidates = kvm_alloc((uint64_t)n_vocab, sizeof *s->candidates);
    s->weights = kvm_alloc((uint64_t)n_vocab, sizeof *s->weights);
    s->counts = kvm_alloc_zero((uint64_t)n_vocab, sizeof *s->counts);
    if (s->candidates == NULL || s->weights == NULL || s->counts == NULL) {
        kvm_sampler_close(s);
        return kvm_fail(KVMIX_NOMEM, "no memory for a sampler over %d tokens", n_vocab);
    }
    *out = s;
    return KVMIX_OK;
}

void kvm_sampler_close(kvmix_sampler *s) {
    if (s == NULL) return;
    free(s->candidates);
    free(s->weights);
    free(s->counts);
    free(s->history);
    free(s);
}

kvmix_status kvm_sampler_accept(kvmix_sampler *s, int32_t token) {
    if (token < 0 || token >= s->n_vocab) {
        return kvm_fail(KVMIX_ARG, "token %d is not in the vocabulary of %d", token, s->n_vocab);
    }
    if (s->n_history == s->capacity) {
        int32_t capacity = s->capacity > 0 ? 2 * s->capacity : 1024;
        int32_t *history = realloc(s->history, (size_t)capacity * sizeof *history);
        if (history == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a history of %d tokens", capacity);
        s->history = history;
        s->capacity = capacity;
    }
    s->history[s->n_history++] = token;
    return KVMIX_OK;
}

static void penalize(kvmix_sampler *s) {
    const kvmix_sampling *p = &s->params;
    int32_t n = p->repeat_last_n < 0 ? s->n_history : kvm_min(p->repeat_last_n, s->n_history);
    const int32_t *recent = s->history + s->n_history - n;
    if (n == 0 || (p->repeat_penalty == 1 && p->presence_penalty == 0 && p->frequency_penalty == 0)) return;
    for (int32_t i = 0; i < n; i++) s->counts[recent[i]]++;
    for (int32_t i = 0; i < n; i++) {
        int32_t id = recent[i];
        if (s->counts[id] == 0) continue; /* done */
        float *logit = &s->candidates[id].logit; /* candidates are still in the order of ids */
        *logit = *logit > 0 ? *logit / p->repeat_penalty : *logit * p->repeat_penalty;
        *logit -= p->presence_penalty + p->frequency_penalty * (float)s->counts[id];
        s->counts[id] = 0;
    }
}

static bool is_before(const candidate *a, const candidate *b) {
    return a->logit != b->logit ? a->logit > b->logit : a->id < b->id;
}

static int compare(const void *a, const void *b) { return is_before(a, b) ? -1 : is_before(b, a) ? 1 : 0; }

/* heap of the k best seen so far, the worst of them on top */
static void sift_down(candidate *heap, int32_t k, int32_t at) {
    for (int32_t child; (child = 2 * at + 1) < k; at = child) {
        if (child + 1 < k && is_before(&heap[child], &heap[child + 1])) child++;
        if (!is_before(&heap[at], &heap[child])) return;
        candidate swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
    }
}

/* moves the k best candidates to the front, sorted */
static void select_best(candidate *c, int32_t n, int32_t k) {
    for (int32_t i = k / 2 - 1; i >= 0; i--) sift_down(c, k, i);
    for (int32_t i = k; i < n; i++) {
        if (!is_before(&c[i], &c[0])) continue;
        c[0] = c[i];
        sift_down(c, k, 0);
    }
    qsort(c, (size_t)k, sizeof *c, compare);
}

/* weights[i] = exp((logit i - logit 0) * scale) of the first n; returns their sum */
static double weigh(kvmix_sampler *s, int32_t n, float scale) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
        s->weights[i] = expf((s->candidates[i].logit - s->candidates[0].logit) * scale);
        sum += (double)s->weights[i];
    }
    return sum;
}

/* how many of the n sorted candidates top-p and min-p leave, at least one */
static int32_t cut_tail(kvmix_sampler *s, int32_t n) {
    double sum = weigh(s, n, 1.0f), reached = 0;
    int32_t kept = n;
    if (s->params.top_p < 1) {
        for (kept = 0; kept < n && reached < (double)s->params.top_p * sum;) reached += (double)s->weights[kept++];
    }
    while (kept > 1 && s->weights[kept - 1] < s->params.min_p) kept--;
    return kvm_max(kept, 1);
}

static double next_uniform(kvmix_sampler *s) {
    uint64_t z = s->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

kvmix_status kvm_sampler_sample(kvmix_sampler *s, const float *logits, int32_t *token) {
    for (int32_t i = 0; i < s->n_vocab; i++) {
        if (!isfinite(logits[i])) return kvm_fail(KVMIX_STATE, "the logit of token %d is not finite", i);
        s->candidates[i] = (candidate){.logit = logits[i], .id = i};
    }
    penalize(s);
    if (s->params.temp <= 0) {
        int32_t best = 0;
        for (int32_t i = 1; i < s->n_vocab; i++) {
            if (is_before(&s->candidates[i], &s->candidates[best])) best = i;
        }
        *token = best;
        return KVMIX_OK;
    }
    int32_t n = s->params.top_k > 0 ? kvm_min(s->params.top_k, s->n_vocab) : s->n_vocab;
    select_best(s->candidates, s->n_vocab, n);
    n = cut_tail(s, n);
    double left = next_uniform(s) * weigh(s, n, 1.0f / s->params.temp);
    int32_t chosen = 0;
    while (chosen < n - 1 && (left -= (double)s->weights[chosen]) >= 0) chosen++;
    *token = s->candidates[chosen].id;
    return KVMIX_OK;
}
