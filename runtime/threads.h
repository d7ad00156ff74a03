/* threads.h - a pool that runs one function on n threads: spin, then yield, then park.
 *
 * kvm_pool_run is the only barrier of the engine: it returns when every item is done. Items are handed out from one
 * counter in ascending order, so who runs an item differs from run to run, what an item computes must not.
 */
#ifndef KVM_THREADS_H
#define KVM_THREADS_H

#include "base.h"

typedef struct kvm_pool kvm_pool;

/* n_threads 0 = the cores this process may use; the calling thread is one of them. NOMEM, ARG. */
kvmix_status kvm_pool_open(kvm_pool **out, int32_t n_threads);
void kvm_pool_close(kvm_pool *pool);
int32_t kvm_pool_size(const kvm_pool *pool);

/* Cores in this process's affinity mask, SMT siblings counted once, within the container's CPU quota. */
int32_t kvm_pool_default_size(void);

/* Calls fn(context, item, thread) for item 0..n_items-1, thread in 0..n_threads-1; returns when all are done.
 * Called from one thread at a time, never from inside fn. */
typedef void (*kvm_pool_fn)(void *context, int32_t item, int32_t thread);
void kvm_pool_run(kvm_pool *pool, int32_t n_items, kvm_pool_fn fn, void *context);

#endif
