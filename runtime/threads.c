/* threads.c - the thread pool.
 *
 * A run is published by raising `generation`; each worker takes items from `next` until none is left, then lowers
 * `pending`; the caller works too and leaves when `pending` is 0. Nothing of a run is read before its generation
 * was seen (acquire) or after `pending` was lowered (release).
 *
 * Waiting costs nothing twice: a waiter spins for some microseconds (stages follow each other at that pace), yields
 * for a while (a busy neighbour gets the core), and parks on a condition variable between tokens of a slow caller.
 * `generation` and `pending` lie on cache lines of their own, so that waiters do not slow the counter of items.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "threads.h"

enum { MAX_THREADS = 512, SPINS = 4000, YIELDS = 200 };

typedef struct {
    kvm_pool *pool;
    int32_t index;
    pthread_t thread;
} worker;

struct kvm_pool {
    _Alignas(64) atomic_uint generation;
    _Alignas(64) atomic_int next;
    _Alignas(64) atomic_int pending;
    _Alignas(64) kvm_pool_fn fn;
    void *context;
    int32_t n_items;
    bool closing;
    int32_t n_workers; /* beside the caller */
    atomic_int n_parked;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    worker *workers; /* [n_workers] */
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_items(kvm_pool *pool, int32_t thread) {
    for (;;) {
        int32_t item = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= pool->n_items) return;
        pool->fn(pool->context, item, thread);
    }
}

static unsigned await_generation(kvm_pool *pool, unsigned seen) {
    for (int32_t i = 0; i < SPINS + YIELDS; i++) {
        unsigned now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        if (i < SPINS) relax();
        else sched_yield();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_parked, 1); /* before the last look: publish() looks the other way round */
    unsigned now;
    while ((now = atomic_load(&pool->generation)) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_parked, 1);
    pthread_mutex_unlock(&pool->mutex);
    return now;
}

static void publish(kvm_pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->n_parked) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *argument) {
    const worker *self = argument;
    kvm_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_generation(pool, seen);
        if (pool->closing) return NULL;
        take_items(pool, self->index);
        atomic_fetch_sub_explicit(&pool->pending, 1, memory_order_release);
    }
}

void kvm_pool_run(kvm_pool *pool, int32_t n_items, kvm_pool_fn fn, void *context) {
    if (pool->n_workers == 0 || n_items <= 1) {
        for (int32_t item = 0; item < n_items; item++) fn(context, item, 0);
        return;
    }
    pool->fn = fn;
    pool->context = context;
    pool->n_items = n_items;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->pending, pool->n_workers, memory_order_relaxed);
    publish(pool);
    take_items(pool, 0);
    for (int32_t i = 0; atomic_load_explicit(&pool->pending, memory_order_acquire) != 0; i++) {
        if (i < SPINS) relax();
        else sched_yield();
    }
}

/* true when `cpu` is not the first of its SMT siblings that `allowed` holds */
static bool is_later_sibling(int32_t cpu, const cpu_set_t *allowed) {
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *file = fopen(path, "r");
    if (file == NULL) return false;
    bool later = false;
    int first;
    while (!later && fscanf(file, "%d", &first) == 1) { /* "0,64" or "0-1" */
        int last = first;
        int mark = fgetc(file);
        if (mark == '-' && fscanf(file, "%d", &last) == 1) mark = fgetc(file);
        for (int other = first; other <= last && other < cpu; other++) later |= CPU_ISSET((size_t)other, allowed) != 0;
        if (mark != ',') break;
    }
    fclose(file);
    return later;
}

/* whole cores of a container's CPU quota (control groups, version 2), MAX_THREADS without one */
static int32_t quota_cores(void) {
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r"); /* "200000 100000": microseconds in a period; or "max 100000" */
    if (file == NULL) return MAX_THREADS;
    long quota, period;
    bool limited = fscanf(file, "%ld %ld", &quota, &period) == 2 && quota > 0 && period > 0;
    fclose(file);
    if (!limited || quota / period >= MAX_THREADS) return MAX_THREADS;
    return (int32_t)((quota + period - 1) / period);
}

int32_t kvm_pool_default_size(void) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    int32_t n = 0;
    for (int32_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET((size_t)cpu, &allowed) && !is_later_sibling(cpu, &allowed)) n++;
    }
    return kvm_min(kvm_max(n, 1), quota_cores());
}

kvmix_status kvm_pool_open(kvm_pool **out, int32_t n_threads) {
    *out = NULL;
    if (n_threads < 0 || n_threads > MAX_THREADS) {
        return kvm_fail(KVMIX_ARG, "%d threads asked for, 1 to %d are possible (0 = one for each core)", n_threads,
                        MAX_THREADS);
    }
    if (n_threads == 0) n_threads = kvm_pool_default_size();
    kvm_pool *pool = kvm_alloc_zero(1, sizeof *pool);
    worker *workers = kvm_alloc_zero((uint64_t)n_threads, sizeof *workers);
    if (pool == NULL || workers == NULL) {
        free(pool);
        free(workers);
        return kvm_fail(KVMIX_NOMEM, "no memory for a pool of %d threads", n_threads);
    }
    pool->workers = workers;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int32_t i = 0; i < n_threads - 1; i++) {
        workers[i] = (worker){.pool = pool, .index = i + 1};
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) {
            kvm_pool_close(pool);
            return kvm_fail(KVMIX_NOMEM, "the system refused thread %d of %d; use fewer with -t", i + 2, n_threads);
        }
        pool->n_workers++;
    }
    *out = pool;
    return KVMIX_OK;
}

void kvm_pool_close(kvm_pool *pool) {
    if (pool == NULL) return;
    pool->closing = true;
    publish(pool);
    for (int32_t i = 0; i < pool->n_workers; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

int32_t kvm_pool_size(const kvm_pool *pool) { return pool->n_workers + 1; }
