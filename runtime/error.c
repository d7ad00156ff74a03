/* error.c - the error sentence of each thread, the names of the status codes, and aligned allocation. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "base.h"

static _Thread_local char last_error[1024];

kvmix_status kvm_fail(kvmix_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    for (char *c = last_error; *c != 0; c++) { /* names out of a file must not steer the terminal that shows them */
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    }
    return status;
}

const char *kvmix_last_error(void) { return last_error; }

/* No default in the inner switch: a status without a name does not compile (-Wswitch -Werror). */
const char *kvmix_status_name(int32_t status) {
    if (status > KVMIX_OK || status < KVMIX_CANCELLED) return "?";
    switch ((kvmix_status)status) {
    case KVMIX_OK: return "OK";
    case KVMIX_ARG: return "ARG";
    case KVMIX_NOMEM: return "NOMEM";
    case KVMIX_IO: return "IO";
    case KVMIX_FORMAT: return "FORMAT";
    case KVMIX_UNSUPPORTED: return "UNSUPPORTED";
    case KVMIX_FULL: return "FULL";
    case KVMIX_DEVICE: return "DEVICE";
    case KVMIX_STATE: return "STATE";
    case KVMIX_CANCELLED: return "CANCELLED";
    }
    return "?";
}

enum { ALIGNMENT = 64 };

void *kvm_alloc(uint64_t count, uint64_t size) {
    uint64_t n_bytes;
    if (!kvm_mul(count, size, &n_bytes) || !kvm_round_up(n_bytes ? n_bytes : 1, ALIGNMENT, &n_bytes)) return NULL;
    if (n_bytes > SIZE_MAX / 2) return NULL;
    return aligned_alloc(ALIGNMENT, (size_t)n_bytes);
}

void *kvm_alloc_zero(uint64_t count, uint64_t size) {
    void *memory = kvm_alloc(count, size);
    if (memory != NULL) memset(memory, 0, (size_t)(count * size));
    return memory;
}
