/* test_threads.c - the pool: every item once, by a thread that exists, and all of it seen by the caller afterwards. */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "check.h"
#include "threads.h"

enum { MAX_ITEMS = 3000, MAX_THREADS = 8 };

typedef struct {
    int32_t n_threads, run;
    int32_t last_run[MAX_ITEMS]; /* of each item; plain memory: what a worker wrote must be visible after the run */
    int64_t sum[MAX_THREADS];
    int32_t last_item[MAX_THREADS];
    int32_t n_wrong;             /* items seen twice, or out of order in one thread */
    pthread_t caller;
} job;

static void take_item(void *context, int32_t item, int32_t thread) {
    job *j = context;
    bool is_caller = pthread_equal(pthread_self(), j->caller) != 0;
    bool right = item >= 0 && thread >= 0 && thread < j->n_threads && (thread == 0) == is_caller;
    if (!right || j->last_run[item] == j->run || j->last_item[thread] >= item) {
        __atomic_fetch_add(&j->n_wrong, 1, __ATOMIC_RELAXED);
        return;
    }
    j->last_run[item] = j->run;
    j->last_item[thread] = item;
    j->sum[thread] += item + 1;
}

static bool run_once(kvm_pool *pool, job *j, int32_t n_items) {
    j->run++;
    memset(j->sum, 0, sizeof j->sum);
    for (int32_t t = 0; t < MAX_THREADS; t++) j->last_item[t] = -1;
    kvm_pool_run(pool, n_items, take_item, j);
    int64_t sum = 0;
    for (int32_t t = 0; t < j->n_threads; t++) sum += j->sum[t];
    bool all = sum == (int64_t)n_items * (n_items + 1) / 2 && j->n_wrong == 0;
    for (int32_t i = 0; i < n_items; i++) all = all && j->last_run[i] == j->run;
    return all;
}

static void rest(int32_t milliseconds) {
    nanosleep(&(struct timespec){.tv_nsec = milliseconds * 1000000L}, NULL);
}

/* many sizes, back to back, and after pauses long enough for workers to park */
static void test_pool(int32_t n_threads) {
    static const int32_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 64, 1000, MAX_ITEMS};
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    static job j;
    j = (job){.n_threads = n_threads, .caller = pthread_self()};
    kvm_pool *pool;
    if (!CHECK_STATUS(KVMIX_OK, kvm_pool_open(&pool, n_threads))) return;
    CHECK(kvm_pool_size(pool) == n_threads);
    bool all = true;
    for (int32_t i = 0; i < 1000; i++) all = run_once(pool, &j, sizes[i % (N_SIZES - 2)]) && all;
    for (int32_t i = 0; i < 40; i++) {
        if (i % 4 == 0) rest(20);
        all = run_once(pool, &j, sizes[i % N_SIZES]) && all;
    }
    CHECK(all);
    kvm_pool_close(pool);
}

/* what one run wrote, the next one reads in another thread */
typedef struct {
    int64_t value[2][64]; /* [run % 2][item] */
    int32_t from;
} relay;

static void pass_on(void *context, int32_t item, int32_t thread) {
    (void)thread;
    relay *r = context;
    r->value[1 - r->from][item] = r->value[r->from][(item + 1) % 64] + 1;
}

static void test_relay(void) {
    enum { N_RUNS = 3000 };
    kvm_pool *pool;
    if (!CHECK_STATUS(KVMIX_OK, kvm_pool_open(&pool, 4))) return;
    relay r = {.from = 0};
    for (int32_t i = 0; i < 64; i++) r.value[0][i] = i;
    for (int32_t run = 0; run < N_RUNS; run++, r.from = 1 - r.from) kvm_pool_run(pool, 64, pass_on, &r);
    bool all = true;
    for (int32_t i = 0; i < 64; i++) all = all && r.value[r.from][i] == (i + N_RUNS) % 64 + N_RUNS;
    CHECK(all);
    kvm_pool_close(pool);
}

static void test_open_close(void) {
    kvm_pool *pool;
    for (int32_t i = 0; i < 200; i++) { /* closed before, while and after its workers first look for work */
        if (!CHECK_STATUS(KVMIX_OK, kvm_pool_open(&pool, 1 + i % MAX_THREADS))) return;
        static job j;
        j = (job){.n_threads = 1 + i % MAX_THREADS, .caller = pthread_self()};
        if (i % 3 == 0) CHECK(run_once(pool, &j, i));
        if (i % 50 == 0) rest(20);
        kvm_pool_close(pool);
    }
    kvm_pool_close(NULL);
    CHECK_STATUS(KVMIX_OK, kvm_pool_open(&pool, 0));
    CHECK(kvm_pool_size(pool) == kvm_pool_default_size() && kvm_pool_default_size() >= 1);
    kvm_pool_close(pool);
    static const int32_t refused[] = {-1, 513, INT32_MAX};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        pool = (kvm_pool *)&pool;
        CHECK_STATUS(KVMIX_ARG, kvm_pool_open(&pool, refused[i]));
        CHECK(pool == NULL);
    }
    CHECK_SAYS("2147483647 threads");
}

int main(void) {
    for (int32_t n_threads = 1; n_threads <= MAX_THREADS; n_threads++) test_pool(n_threads); /* more than most cores */
    test_relay();
    test_open_close();
    return check_report();
}
