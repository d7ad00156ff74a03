/* kvtrellis.h - the encoder of the trellis code (kvtype.h 5), as static functions; a part of kvencode.h, compiled with
 * it for each instruction set.
 *
 * Channels go through the trellis side by side, one in each 16-bit lane. Costs fit: |y - level| <= 127, so two states
 * are never further apart than three steps of 127^2, 48387, and the least cost is subtracted after each step. The
 * square of a step is computed once for each possible level, 105 of them, not for each of the 256 windows.
 *
 * Work: about 1,300 vector instructions for a step of all lanes, a lap and a half: 15 ns a value (AVX-512; AVX2 20)
 * where scalar q2 takes 2 to 3. Of a step only the cheapest way into each state is kept, 2 bits; all in all that is
 * 90 KiB of stack with 32 lanes.
 */
#ifndef KVM_KVTRELLIS_H
#define KVM_KVTRELLIS_H

#include "kvtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVM_INLINE static inline __attribute__((always_inline))

/* channels side by side */
#if defined(__AVX512BW__)
enum { KVM_TRELLIS_WIDE = 32 };
#elif defined(__AVX2__)
enum { KVM_TRELLIS_WIDE = 16 };
#else
enum { KVM_TRELLIS_WIDE = 8 };
#endif

enum {
    KVM_TRELLIS_STATES = 64,   /* the last three symbols, the latest in the high bits */
    KVM_TRELLIS_KEPT = 8,      /* words that a step's choices take, 8 states in each */
    KVM_TRELLIS_TOP = 52,      /* the largest level */
    KVM_TRELLIS_Y_MAX = 75,    /* makes the largest distance 127 */
    KVM_TRELLIS_WARM = 32,     /* steps of the first lap before the ring's end, and after it */
    KVM_TRELLIS_RIVAL = 49000, /* more than three steps can cost */
};

typedef uint16_t kvm_costs __attribute__((vector_size(2 * KVM_TRELLIS_WIDE)));
typedef int16_t kvm_steps __attribute__((vector_size(2 * KVM_TRELLIS_WIDE)));

/* 3 - (the oldest symbol of the cheapest way into each state), 2 bits each: state w + 8 b is in word w at bit 2 b */
typedef kvm_costs kvm_choices[KVM_TRELLIS_KEPT];

KVM_INLINE kvm_costs least(kvm_costs a, kvm_costs b) {
#if defined(__AVX512BW__)
    return (kvm_costs)_mm512_min_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (kvm_costs)_mm256_min_epu16((__m256i)a, (__m256i)b);
#else
    kvm_costs smaller = (kvm_costs)(b < a);
    return (b & smaller) | (a & ~smaller);
#endif
}

/* the scale of V, of sections 3 and 5; `scale` where there is none */
KVM_INLINE uint16_t unbiased_scale(float xx, float num, uint16_t scale) {
    float ratio = xx / num;
    return num > 0 && ratio > 0 ? kvm_f16_sat(ratio) : scale;
}

/* One step of every state: cost -> next [64], less the least of all. place[W]: level(W) + TOP. */
KVM_INLINE void trellis_step(const uint8_t place[256], kvm_steps y, const kvm_costs *cost, kvm_costs *next,
                             kvm_costs *choices) {
    kvm_costs square[2 * KVM_TRELLIS_TOP + 1], lowest = ~(kvm_costs){0};
    kvm_steps distance = y + KVM_TRELLIS_TOP;
    for (int32_t i = 0; i <= 2 * KVM_TRELLIS_TOP; i++, distance -= 1) square[i] = (kvm_costs)(distance * distance);
    for (int32_t word = 0; word < KVM_TRELLIS_KEPT; word++) {
        kvm_costs kept = {0};
#pragma GCC unroll 8
        for (int32_t b = 7; b >= 0; b--) {
            int32_t state = word + 8 * b;
            const kvm_costs *from = cost + 4 * state % KVM_TRELLIS_STATES;
            const uint8_t *at = place + 4 * state;
            kvm_costs way[4];
            for (int32_t k = 0; k < 4; k++) way[k] = from[k] + square[at[k]];
            kvm_costs low = least(way[0], way[1]), best = least(low, least(way[2], way[3]));
            kvm_costs is_low = (kvm_costs)(low == best), is_even = (kvm_costs)(way[0] == best);
            is_even |= (kvm_costs)(way[2] == best) & ~is_low;
            kept = (kept << 2) - (is_low + is_low + is_even); /* a mask is -1 */
            next[state] = best;
            lowest = least(lowest, best);
        }
        choices[word] = kept;
    }
    for (int32_t s = 0; s < KVM_TRELLIS_STATES; s++) next[s] -= lowest;
}

/* n steps from costs [64] on, step first + i is y[(first + i) % 128]; leaves the last costs */
static void trellis_lap(const uint8_t place[256], const kvm_steps *y, int32_t first, int32_t n, kvm_costs *cost,
                        kvm_choices *choices) {
    const kvm_costs rival = (kvm_costs){0} + KVM_TRELLIS_RIVAL;
    kvm_costs other[KVM_TRELLIS_STATES], *from = cost, *to = other;
    for (int32_t i = 0; i < n; i++) {
        trellis_step(place, y[(first + i) % KVM_PAGE], from, to, choices[i]);
        /* states that the start of a lap does not reach yet: keeps the next sum in 16 bits */
        for (int32_t s = 0; i < 2 && s < KVM_TRELLIS_STATES; s++) to[s] = least(to[s], rival);
        kvm_costs *swap = from;
        from = to;
        to = swap;
    }
    memcpy(cost, from, sizeof other);
}

/* the window that ends in a state, by the choices of its step */
KVM_INLINE uint32_t trellis_window(const kvm_choices choices, uint32_t state, int32_t channel) {
    return ((uint32_t)~choices[state % 8][channel] >> 2 * (state / 8) & 3) | state << 2;
}

/* y [128], by step -> windows [128][WIDE], by step */
static void trellis_search(const uint8_t place[256], const kvm_steps *y, uint8_t *windows) {
    enum { WIDE = KVM_TRELLIS_WIDE, WARM = KVM_TRELLIS_WARM };
    kvm_costs cost[KVM_TRELLIS_STATES] = {0};
    kvm_choices choices[KVM_PAGE];
    uint32_t state[WIDE];
    trellis_lap(place, y, KVM_PAGE - WARM, 2 * WARM, cost, choices);
    for (int32_t c = 0; c < WIDE; c++) {
        for (state[c] = 0; cost[state[c]][c] != 0;) state[c]++;
    }
    for (int32_t i = 2 * WARM - 1; i >= WARM; i--) {
        for (int32_t c = 0; c < WIDE; c++) state[c] = trellis_window(choices[i], state[c], c) % KVM_TRELLIS_STATES;
    }
    for (int32_t s = 0; s < KVM_TRELLIS_STATES; s++) {
        for (int32_t c = 0; c < WIDE; c++) cost[s][c] = s == (int32_t)state[c] ? 0 : KVM_TRELLIS_RIVAL;
    }
    trellis_lap(place, y, 0, KVM_PAGE, cost, choices);
    for (int32_t t = KVM_PAGE - 1; t >= 0; t--) {
        for (int32_t c = 0; c < WIDE; c++) {
            uint32_t window = trellis_window(choices[t], state[c], c);
            windows[t * WIDE + c] = (uint8_t)window;
            state[c] = window % KVM_TRELLIS_STATES;
        }
    }
}

/* x [128] of a channel, by position -> y [128], by step, in its lane */
KVM_INLINE void trellis_fill(const float *x, const float *inv, int32_t lane, kvm_steps *y) {
    int16_t rounded[KVM_PAGE];
    for (int32_t p = 0; p < KVM_PAGE; p++) {
        float v = x[p] * inv[p];
        v = v == v ? v : 0;
        v = v < KVM_TRELLIS_Y_MAX ? v : KVM_TRELLIS_Y_MAX;
        v = v > -KVM_TRELLIS_Y_MAX ? v : -KVM_TRELLIS_Y_MAX;
        rounded[p] = (int16_t)((v + 12582912.0f) - 12582912.0f); /* 1.5 x 2^23: rounds to nearest even */
    }
    for (int32_t t = 0; t < KVM_PAGE; t++) y[t][lane] = rounded[kvm_trellis_position(t)];
}

/* one group: x [n_channels][128] -> codes [n_channels][128], scale [128] f16 */
static void trellis_encode(const float *x, int32_t n_channels, uint8_t *codes, uint16_t *scale) {
    enum { WIDE = KVM_TRELLIS_WIDE };
    uint8_t place[256], windows[KVM_PAGE * WIDE];
    kvm_steps y[KVM_PAGE] = {0};
    float xx[KVM_PAGE] = {0}, inv[KVM_PAGE], num[KVM_PAGE] = {0}, level[KVM_PAGE];
    for (int32_t w = 0; w < 256; w++) place[w] = (uint8_t)(kvm_trellis_level(w) + KVM_TRELLIS_TOP);
    for (int32_t c = 0; c < n_channels; c++) {
        for (int32_t p = 0; p < KVM_PAGE; p++) xx[p] += x[c * KVM_PAGE + p] * x[c * KVM_PAGE + p];
    }
    for (int32_t p = 0; p < KVM_PAGE; p++) inv[p] = xx[p] > 0 ? 20.0f / sqrtf(xx[p] / (float)n_channels) : 0;
    for (int32_t first = 0; first < n_channels; first += WIDE) {
        int32_t n = kvm_min(n_channels - first, WIDE); /* the other lanes are what they were */
        for (int32_t c = 0; c < n; c++) trellis_fill(x + (first + c) * KVM_PAGE, inv, c, y);
        trellis_search(place, y, windows);
        for (int32_t c = 0; c < n; c++) {
            const float *row = x + (first + c) * KVM_PAGE;
            for (int32_t t = 0; t < KVM_PAGE; t++) {
                int32_t p = kvm_trellis_position(t), window = windows[t * WIDE + c];
                codes[(first + c) * KVM_PAGE + p] = (uint8_t)(window >> 6);
                level[p] = (float)(place[window] - KVM_TRELLIS_TOP);
            }
            for (int32_t p = 0; p < KVM_PAGE; p++) num[p] += row[p] * level[p];
        }
    }
    for (int32_t p = 0; p < KVM_PAGE; p++) scale[p] = unbiased_scale(xx[p], num[p], 0);
}

#endif
