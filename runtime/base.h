/* base.h - what every file of the library leans on: failing with a sentence, checked sizes, f16 <-> f32.
 *
 * The status codes are the public ones; this is the only internal header that includes kvmix.h.
 * Sizes and counts that come from a file or a caller go through kvm_mul/kvm_add/kvm_round_up before use; plain * and +
 * on such numbers is a bug (a test greps gguf.c for it).
 */
#ifndef KVM_BASE_H
#define KVM_BASE_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kvmix.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Stores the sentence for kvmix_last_error() in thread-local memory and returns `status`.
 * The sentence names the thing, the value, the limit and the way out; no final full stop. */
kvmix_status kvm_fail(kvmix_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Passes a failure on to the caller. The only control-flow macro of the tree. */
#define KVM_TRY(call)                                                                                                  \
    do {                                                                                                               \
        kvmix_status kvm_try_status = (call);                                                                          \
        if (kvm_try_status != KVMIX_OK) return kvm_try_status;                                                         \
    } while (0)

static inline bool kvm_mul(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool kvm_add(uint64_t a, uint64_t b, uint64_t *out) { return !__builtin_add_overflow(a, b, out); }

/* n up to the next multiple of `step`, a power of two; false on overflow */
static inline bool kvm_round_up(uint64_t n, uint64_t step, uint64_t *out) {
    if (!kvm_add(n, step - 1, out)) return false;
    *out &= ~(step - 1);
    return true;
}

/* malloc/calloc of count x size bytes, 64-byte aligned; NULL on overflow or when memory is short. Freed by free(). */
void *kvm_alloc(uint64_t count, uint64_t size);
void *kvm_alloc_zero(uint64_t count, uint64_t size);

static inline int32_t kvm_min(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t kvm_max(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t kvm_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

/* IEEE binary16 <-> binary32. Narrowing rounds to nearest even, overflows to infinity, keeps NaN: bit for bit what
 * F16C and NumPy do. */
static inline float kvm_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 0x1fu, frac = h & 0x3ffu, bits;
    if (exp == 0x1f) {
        bits = sign | 0x7f800000u | (frac << 13);
    } else if (exp != 0) {
        bits = sign | ((exp + 112) << 23) | (frac << 13);
    } else { /* zero or subnormal: frac x 2^-24 is exact in f32 */
        float value = (float)frac * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline uint16_t kvm_f32_to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000u, mag = bits & 0x7fffffffu;
    if (mag >= 0x47800000u) { /* 65536 and up, infinity, NaN */
        if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((mag >> 13) & 0x3ffu));
        return (uint16_t)(sign | 0x7c00u);
    }
    if (mag < 0x38800000u) { /* below 2^-14: a multiple of 2^-24, rounded by the float adder */
        float value;
        memcpy(&value, &mag, 4);
        value += 0.5f; /* 0.5 has an ulp of 2^-24 */
        memcpy(&mag, &value, 4);
        return (uint16_t)(sign | (mag - 0x3f000000u));
    }
    uint32_t odd = (mag >> 13) & 1u;
    mag += 0xc8000fffu + odd; /* rebias the exponent by -112 and round to nearest even */
    return (uint16_t)(sign | (mag >> 13));
}

static inline float kvm_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

#ifdef __cplusplus
}
#endif
#endif
