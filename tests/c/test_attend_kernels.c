/* test_attend_kernels.c - the attention entries of every kernel table this CPU can run, against the scalar table.
 *
 * Integers are compared exactly: weights in 8 bits byte by byte, and integer dot products through scales that make
 * every float exact. Then rounding, the independence of a row from the rows beside it, the largest products that a
 * multiply-add of bytes must hold, and memory: pages and results end where an unmapped page begins.
 */
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "cpu/kernels.h"

/* ---- numbers and memory ------------------------------------------------------------------------------------- */

static uint64_t random_state = 88172645463325252u;

static uint32_t random_u32(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

static float random_unit(void) { return (float)(random_u32() >> 8) * 0x1p-23f - 1.0f; } /* [-1, 1) */

enum { N_GUARDED = 64 };
static struct {
    void *base;
    size_t n_bytes;
} guarded_maps[N_GUARDED];
static int32_t n_guarded;

/* n_bytes of memory, the byte behind them unreadable; given back by release_guarded */
static void *guarded(int32_t n, size_t size) {
    size_t n_bytes = (size_t)n * size, page = (size_t)sysconf(_SC_PAGESIZE), inside = (n_bytes + page - 1) / page * page;
    uint8_t *base = mmap(NULL, inside + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || n_guarded == N_GUARDED || mprotect(base + inside, page, PROT_NONE) != 0) {
        perror("guarded memory");
        _exit(2);
    }
    guarded_maps[n_guarded].base = base;
    guarded_maps[n_guarded++].n_bytes = inside + page;
    return base + inside - n_bytes;
}

static void release_guarded(void) {
    while (n_guarded > 0) {
        n_guarded--;
        munmap(guarded_maps[n_guarded].base, guarded_maps[n_guarded].n_bytes);
    }
}

static bool same_bits(const void *a, const void *b, int32_t n_floats) {
    return memcmp(a, b, (size_t)n_floats * sizeof(float)) == 0;
}

/* scales: [n] f16: one and the same power of two, or anything in [2^-9, 2^-5) */
static void fill_scales(uint16_t *scales, int32_t n, bool exact) {
    for (int32_t i = 0; i < n; i++) scales[i] = exact ? kvm_f32_to_f16(0x1p-8f) : (uint16_t)((random_u32() & 0xfffu) + 0x1800u);
}

typedef enum { RANDOM, LARGEST, SMALLEST } fill; /* codes: any; those of the largest level; of the smallest */

/* codes of one side, in memory that ends with them */
static uint8_t *make_codes(kvm_kvtype type, kvm_side side, int32_t d, fill f) {
    kvm_page_layout layout = kvm_page_layout_of(type, side, d, false);
    uint8_t *codes = guarded(layout.scales, 1);
    for (int32_t i = 0; i < layout.scales; i++) codes[i] = (uint8_t)(f == RANDOM ? random_u32() : f == LARGEST ? 0xff : 0);
    /* code 0 of q8 is no level that kvm_encode gives: -128 */
    for (int32_t i = 0; type == KVM_KVTYPE_Q8 && i < layout.scales; i++) codes[i] = codes[i] == 0 ? 1 : codes[i];
    return codes;
}

/* a and b differ by rounding only: a few ulp of the largest of n values */
static bool near(const float *a, const float *b, int32_t n) {
    float largest = 0, error = 0;
    for (int32_t i = 0; i < n; i++) {
        largest = fmaxf(largest, fabsf(b[i]));
        error = fmaxf(error, fabsf(a[i] - b[i]));
    }
    return error <= 8 * 0x1p-24f * largest;
}

typedef struct {
    kvm_kvtype type;
    int32_t d, m;
    fill f;
    bool exact; /* scales are powers of two: all sums are exact */
} shape;

static void complain(const char *what, const kvm_cpu_kernels *kernels, const shape *s) {
    fprintf(stderr, "    %s of %s, %s d %d m %d fill %d%s\n", what, kernels->name, kvm_kvtypes[s->type].name, s->d, s->m,
            (int)s->f, s->exact ? " exact" : "");
}

/* ---- score_packed -------------------------------------------------------------------------------------------- */

static kvm_q8_queries make_queries(const shape *s) {
    int32_t group = kvm_group_of(s->d), n = s->m * (s->d / group);
    kvm_q8_queries q = {guarded(s->m * s->d, 1), guarded(n, sizeof(float)), guarded(n, sizeof(int32_t))};
    for (int32_t i = 0; i < n; i++) {
        q.scale[i] = s->exact ? 0x1p-5f : fabsf(random_unit());
        q.sum[i] = 0;
        for (int32_t c = 0; c < group; c++) { /* rows of groups lie one after the other */
            int32_t value = s->f == RANDOM ? (int32_t)(random_u32() % 255) - 127 : i % 2 == 0 ? 127 : -127;
            q.q[i * group + c] = (int8_t)value;
            q.sum[i] += value;
        }
    }
    return q;
}

static void check_score(const kvm_cpu_kernels *kernels, const shape *s) {
    int32_t n_groups = s->d / kvm_group_of(s->d), n = s->m * KVM_PAGE, last = s->m - 1;
    const uint8_t *codes = make_codes(s->type, KVM_SIDE_K, s->d, s->f);
    uint16_t *scales = guarded(n_groups * KVM_PAGE, 2);
    kvm_q8_queries q = make_queries(s);
    float *got = guarded(n, sizeof(float)), *want = guarded(n, sizeof(float)), *alone = guarded(KVM_PAGE, sizeof(float));
    float *start = guarded(s->m, sizeof(float));
    for (int32_t i = 0; i < s->m; i++) start[i] = s->exact ? (float)i : random_unit();
    fill_scales(scales, n_groups * KVM_PAGE, s->exact);
    kernels->score_packed(s->type, codes, scales, s->d, s->m, q, start, got, 4096);
    kvm_kernels_scalar.score_packed(s->type, codes, scales, s->d, s->m, q, start, want, 0);
    q = (kvm_q8_queries){q.q + last * s->d, q.scale + last * n_groups, q.sum + last * n_groups};
    kernels->score_packed(s->type, codes, scales, s->d, 1, q, start + last, alone, 0);
    if (!CHECK(s->exact ? same_bits(got, want, n) : near(got, want, n)) ||
        !CHECK(same_bits(alone, got + last * KVM_PAGE, KVM_PAGE))) {
        complain("score_packed", kernels, s);
    }
    release_guarded();
}

/* ---- quantize_weights ---------------------------------------------------------------------------------------- */

typedef struct {
    int32_t n_w, n_scales;
    kvm_u8_weights w;
} weights;

static weights room_for_weights(const shape *s) {
    weights w = {.n_w = s->m * (s->d / kvm_group_of(s->d)) * KVM_PAGE};
    w.n_scales = w.n_w / KVM_WEIGHT_BLOCK;
    w.w = (kvm_u8_weights){guarded(w.n_w, 1), guarded(w.n_scales, sizeof(float))};
    return w;
}

/* Weights of a softmax over `spread` nats, some 0; whole blocks of nothing, and of numbers next to the smallest. */
static void check_quantize(const kvm_cpu_kernels *kernels, const shape *s, float spread) {
    int32_t n_groups = s->d / kvm_group_of(s->d);
    weights got = room_for_weights(s), want = room_for_weights(s);
    float *p = guarded(s->m * KVM_PAGE, sizeof(float));
    uint16_t *scales = guarded(n_groups * KVM_PAGE, 2);
    fill_scales(scales, n_groups * KVM_PAGE, false);
    for (int32_t i = 0; i < s->m * KVM_PAGE; i++) {
        uint32_t block = (uint32_t)i / KVM_WEIGHT_BLOCK % 11;
        p[i] = random_u32() % 8 == 0 || block == 3 ? 0 : expf(-spread * fabsf(random_unit())) * (block == 5 ? 0x1p-135f : 1);
    }
    kernels->quantize_weights(p, scales, n_groups, s->m, got.w);
    kvm_kernels_scalar.quantize_weights(p, scales, n_groups, s->m, want.w);
    bool right = memcmp(got.w.w, want.w.w, (size_t)got.n_w) == 0 && same_bits(got.w.scale, want.w.scale, got.n_scales);
    bool close = true;
    for (int32_t i = 0; i < got.n_w; i++) {
        int32_t row = i / KVM_PAGE / n_groups, g = i / KVM_PAGE % n_groups, at = i % KVM_PAGE;
        double weight = (double)p[row * KVM_PAGE + at] * (double)kvm_f16_to_f32(scales[g * KVM_PAGE + at]);
        double scale = (double)got.w.scale[i / KVM_WEIGHT_BLOCK];
        close = close && fabs(weight - scale * got.w.w[i]) <= 0.5001 * scale + 0x1p-140;
    }
    if (!CHECK(right) || !CHECK(close)) complain("quantize_weights", kernels, s);
    release_guarded();
}

/* ---- mix_packed ---------------------------------------------------------------------------------------------- */

static void check_mix(const kvm_cpu_kernels *kernels, const shape *s) {
    int32_t n_groups = s->d / kvm_group_of(s->d), n = s->m * s->d, last = s->m - 1;
    const uint8_t *codes = make_codes(s->type, KVM_SIDE_V, s->d, s->f);
    weights w = room_for_weights(s);
    float *got = guarded(n, sizeof(float)), *want = guarded(n, sizeof(float)), *alone = guarded(s->d, sizeof(float));
    for (int32_t i = 0; i < w.n_w; i++) w.w.w[i] = s->f == RANDOM ? (uint8_t)random_u32() : 255;
    for (int32_t i = 0; i < w.n_scales; i++) w.w.scale[i] = s->exact ? 0x1p-9f : fabsf(random_unit());
    for (int32_t i = 0; i < n; i++) got[i] = want[i] = s->exact ? (float)(random_u32() % 1024) : random_unit();
    memcpy(alone, got + last * s->d, (size_t)s->d * sizeof *alone);
    kernels->mix_packed(s->type, codes, s->d, s->m, w.w, got, 4096);
    kvm_kernels_scalar.mix_packed(s->type, codes, s->d, s->m, w.w, want, 0);
    int32_t at = last * n_groups * KVM_PAGE;
    kvm_u8_weights row = {w.w.w + at, w.w.scale + at / KVM_WEIGHT_BLOCK};
    kernels->mix_packed(s->type, codes, s->d, 1, row, alone, 0);
    if (!CHECK(s->exact ? same_bits(got, want, n) : near(got, want, n)) ||
        !CHECK(same_bits(alone, got + last * s->d, s->d))) {
        complain("mix_packed", kernels, s);
    }
    release_guarded();
}

/* ---- gemm_f16 ------------------------------------------------------------------------------------------------ */

static void check_gemm_f16(const kvm_cpu_kernels *kernels, int32_t m, int32_t n, int32_t k) {
    int32_t lda = k + 3, ldb = n + 16, ldc = n + 5, n_b = (k - 1) * ldb + n;
    float *a = guarded((m - 1) * lda + k, sizeof(float)), *decoded = guarded(n_b, sizeof(float));
    float *got = guarded((m - 1) * ldc + n, sizeof(float)), *want = guarded((m - 1) * ldc + n, sizeof(float));
    uint16_t *b = guarded(n_b, 2);
    for (int32_t i = 0; i < (m - 1) * lda + k; i++) a[i] = random_unit();
    for (int32_t i = 0; i < n_b; i++) b[i] = kvm_f32_to_f16(random_unit());
    for (int32_t i = 0; i < (m - 1) * ldc + n; i++) got[i] = want[i] = random_unit();
    kernels->gemm_f16(m, n, k, a, lda, b, ldb, got, ldc, 4096);
    kernels->load_f16(b, n_b, decoded);
    kernels->gemm_f32(m, n, k, a, lda, decoded, ldb, want, ldc);
    if (!CHECK(same_bits(got, want, (m - 1) * ldc + n))) {
        fprintf(stderr, "    gemm_f16 of %s, m %d n %d k %d\n", kernels->name, m, n, k);
    }
    release_guarded();
}

int main(void) {
    static const kvm_cpu_kernels *const tables[] = {
        &kvm_kernels_scalar,
#if defined(__x86_64__)
        &kvm_kernels_avx2,
        &kvm_kernels_avx512,
#endif
    };
    static const int32_t d_values[] = {16, 48, 64, 80, 96, 128, 192, 256}, m_values[] = {1, 2, 3, 4, 5, 6, 7, 13, 64};
    for (size_t t = 0; t < sizeof tables / sizeof *tables; t++) {
        if (!tables[t]->supported()) continue;
        for (int32_t i = 0; i < 8 * 9 * KVM_KVTYPE_COUNT; i++) {
            shape s = {(kvm_kvtype)(i / 72), d_values[i / 9 % 8], m_values[i % 9], .exact = i % 2 == 0};
            if (s.type == KVM_KVTYPE_F16) {
                check_gemm_f16(tables[t], s.m, KVM_PAGE, s.d);
                check_gemm_f16(tables[t], s.m, s.d, KVM_PAGE - i % 3);
                check_quantize(tables[t], &s, (float)(i % 20));
                continue;
            }
            check_score(tables[t], &s);
            check_mix(tables[t], &s);
            for (s.f = LARGEST, s.exact = true; s.m <= 2 && s.f <= SMALLEST; s.f++) {
                check_score(tables[t], &s);
                check_mix(tables[t], &s);
            }
        }
    }
    return check_report();
}
