/* test_kernels.c - every entry of every kernel table this CPU can run, against double precision and the scalar table.
 *
 * Three kinds of checks: values; bits that may not depend on how a call is cut up (rows, columns, ranges); and memory:
 * inputs and outputs end where an unmapped page begins, and what lies between rows of a result is left alone.
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

/* a finite f16 of either sign, 2^-9 <= |h| < 2^-5 */
static uint16_t random_half(void) { return (uint16_t)((random_u32() & 0x8fffu) + 0x1800u); }

enum { N_GUARDED = 320 };
static struct {
    void *base;
    size_t n_bytes;
} guarded_maps[N_GUARDED];
static int32_t n_guarded;

/* n_bytes of memory, the byte behind them unreadable; given back by release_guarded */
static void *guarded(size_t n_bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (n_bytes + page - 1) / page * page;
    uint8_t *base = mmap(NULL, inside + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || n_guarded == N_GUARDED || mprotect(base + inside, page, PROT_NONE) != 0) {
        perror("guarded memory");
        _exit(2);
    }
    guarded_maps[n_guarded].base = base;
    guarded_maps[n_guarded++].n_bytes = inside + page;
    return base + inside - n_bytes;
}

static float *guarded_floats(int32_t n) { return guarded((size_t)n * sizeof(float)); }

static void release_guarded(void) {
    while (n_guarded > 0) {
        n_guarded--;
        munmap(guarded_maps[n_guarded].base, guarded_maps[n_guarded].n_bytes);
    }
}

static bool same_bits(const void *a, const void *b, int32_t n_floats) {
    return memcmp(a, b, (size_t)n_floats * sizeof(float)) == 0;
}

/* ---- gemm_f32 ----------------------------------------------------------------------------------------------- */

static const float untouched = 12345.0f;

static void check_gemm(const kvm_cpu_kernels *kernels, int32_t m, int32_t n, int32_t k) {
    int32_t lda = k + 3, ldb = n + 1, ldc = n + 5;
    float *a = guarded_floats((m - 1) * lda + k), *b = guarded_floats((k - 1) * ldb + n);
    float *c = guarded_floats((m - 1) * ldc + n), *pieces = guarded_floats(n), *start = guarded_floats(m * n);
    for (int32_t i = 0; i < (m - 1) * lda + k; i++) a[i] = random_unit();
    for (int32_t i = 0; i < (k - 1) * ldb + n; i++) b[i] = random_unit();
    for (int32_t i = 0; i < (m - 1) * ldc + n; i++) c[i] = untouched;
    for (int32_t i = 0; i < m * n; i++) c[i / n * ldc + i % n] = start[i] = random_unit();
    kernels->gemm_f32(m, n, k, a, lda, b, ldb, c, ldc);
    bool close = true, alone = true, kept = true;
    for (int32_t i = 0; i < m; i++) {
        for (int32_t j = 0; j < n; j++) {
            double want = start[i * n + j], size = fabs(want);
            for (int32_t l = 0; l < k; l++) {
                double product = (double)a[i * lda + l] * (double)b[l * ldb + j];
                want += product;
                size += fabs(product);
            }
            /* k products and k sums, each rounded once, is the most that any order can lose */
            close = close && fabs(c[i * ldc + j] - want) <= (k + 1) * 0x1p-24 * size;
        }
        for (int32_t j = n; i + 1 < m && j < ldc; j++) kept = kept && c[i * ldc + j] == untouched;
        memcpy(pieces, start + i * n, (size_t)n * sizeof(float));
        int32_t cut = (i * 5 + 1) % n;
        if (cut > 0) kernels->gemm_f32(1, cut, k, a + i * lda, lda, b, ldb, pieces, n);
        kernels->gemm_f32(1, n - cut, k, a + i * lda, lda, b + cut, ldb, pieces + cut, n);
        alone = alone && same_bits(pieces, c + i * ldc, n);
    }
    if (!CHECK(close) || !CHECK(alone) || !CHECK(kept)) {
        fprintf(stderr, "    gemm_f32 of %s, m %d n %d k %d\n", kernels->name, m, n, k);
    }
    release_guarded();
}

static void test_gemm(const kvm_cpu_kernels *kernels) {
    static const int32_t n_values[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 72, 100, 128, 159};
    static const int32_t k_values[] = {1, 2, 3, 64, 80, 128};
    for (int32_t m = 1; m <= 14; m++) {
        for (size_t n = 0; n < sizeof n_values / sizeof *n_values; n++) {
            for (size_t k = 0; k < sizeof k_values / sizeof *k_values; k++) {
                check_gemm(kernels, m, n_values[n], k_values[k]);
            }
        }
    }
    check_gemm(kernels, 112, 128, 256);
    check_gemm(kernels, 45, 32, 256);
}

/* ---- quantize_q8 -------------------------------------------------------------------------------------------- */

static kvm_q8_row guarded_row(int32_t n) {
    int32_t b = n / KVM_Q8_BLOCK;
    return (kvm_q8_row){guarded((size_t)n), guarded_floats(b), guarded_floats(b), guarded_floats(b)};
}

/* x: [n], nothing but finite numbers */
static void check_quantize(const kvm_cpu_kernels *kernels, const float *x, int32_t n) {
    kvm_q8_row got = guarded_row(n), want = guarded_row(n);
    kernels->quantize_q8(x, n, got);
    kvm_kernels_scalar.quantize_q8(x, n, want);
    CHECK(memcmp(got.q, want.q, (size_t)n) == 0);
    CHECK(same_bits(got.scale, want.scale, n / KVM_Q8_BLOCK));
    CHECK(same_bits(got.sum, want.sum, n / KVM_Q8_BLOCK));
    CHECK(same_bits(got.sum16, want.sum16, n / KVM_Q8_BLOCK));
    bool near = true, full = true, sums = true;
    for (int32_t b = 0; b < n / KVM_Q8_BLOCK; b++) {
        double scale = (double)got.scale[b];
        int32_t sum[2] = {0, 0}, largest = 0;
        for (int32_t i = 0; i < KVM_Q8_BLOCK; i++) {
            int32_t q = got.q[KVM_Q8_BLOCK * b + i];
            sum[i / 16] += q;
            largest = kvm_max(largest, q < 0 ? -q : q);
            near = near && fabs((double)x[KVM_Q8_BLOCK * b + i] - scale * q) <= 0.50002 * scale;
        }
        full = full && largest == (scale > 0 ? 127 : 0);
        sums = sums && got.sum[b] == got.scale[b] * (float)(sum[0] + sum[1]);
        sums = sums && got.sum16[b] == got.scale[b] * (float)sum[0];
    }
    CHECK(near);
    CHECK(full);
    CHECK(sums);
}

static void test_quantize(const kvm_cpu_kernels *kernels) {
    enum { N = 4096 };
    float *x = guarded_floats(N);
    for (int32_t i = 0; i < N; i++) x[i] = random_unit() * ldexpf(1, i / 256 - 8);
    check_quantize(kernels, x, N);
    check_quantize(kernels, x + N - 32, 32);
    for (int32_t i = 0; i < N; i++) x[i] = i % 32 == 5 ? 127.0f : (float)(i % 254 - 126) + 0.5f; /* all ties */
    check_quantize(kernels, x, N);
    for (int32_t i = 0; i < N; i++) x[i] = i < N / 2 ? 0.0f : i % 32 == 31 ? -1.0f : 0.0f;
    check_quantize(kernels, x, N);
    release_guarded();
}

/* NaN, infinities and blocks so small that 1 / scale overflows: what the scalar table makes of them. */
static void test_quantize_odd(const kvm_cpu_kernels *kernels) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0x1p-140f, -0x1p-127f};
    enum { N = 1024 };
    float *x = guarded_floats(N);
    for (int32_t i = 0; i < N; i++) x[i] = random_u32() % 16 == 0 ? odd[random_u32() % 5] : random_unit();
    for (int32_t i = 0; i < N / 2; i++) x[i] = i / 32 % 3 == 0 ? random_unit() * 0x1p-130f : x[i];
    kvm_q8_row got = guarded_row(N), want = guarded_row(N);
    kernels->quantize_q8(x, N, got);
    kvm_kernels_scalar.quantize_q8(x, N, want);
    CHECK(memcmp(got.q, want.q, N) == 0);
    CHECK(same_bits(got.scale, want.scale, N / KVM_Q8_BLOCK));
    release_guarded();
}

/* ---- matmul_q8 ---------------------------------------------------------------------------------------------- */

/* where the f16 fields of a block lie, -1 for none; and what keeps integer scales small: every step-th of n bytes from
 * `at` on becomes (byte & keep) | set */
static const struct {
    kvm_dtype type;
    int32_t half[2];
    struct {
        int32_t at, n, step;
        uint8_t keep, set;
    } small[2];
} formats[] = {
    {KVM_DTYPE_Q4_0, {0, -1}, {{0}}},
    {KVM_DTYPE_Q4_1, {0, 2}, {{0}}},
    {KVM_DTYPE_Q5_0, {0, -1}, {{0}}},
    {KVM_DTYPE_Q5_1, {0, 2}, {{0}}},
    {KVM_DTYPE_Q8_0, {0, -1}, {{0}}},
    {KVM_DTYPE_Q2_K, {80, 82}, {{0}}},
    {KVM_DTYPE_Q3_K, {108, -1}, {{0}}},
    {KVM_DTYPE_Q4_K, {0, 2}, {{4, 12, 1, 15, 0}}},
    {KVM_DTYPE_Q5_K, {0, 2}, {{4, 12, 1, 15, 0}}},
    {KVM_DTYPE_Q6_K, {208, -1}, {{192, 16, 1, 7, 0}}},
    {KVM_DTYPE_IQ2_XXS, {0, -1}, {{9, 8, 8, 0x3f, 0}}},
    {KVM_DTYPE_IQ2_XS, {0, -1}, {{66, 8, 1, 0x33, 0}}},
    {KVM_DTYPE_IQ3_XXS, {0, -1}, {{69, 8, 4, 0x3f, 0}}},
    {KVM_DTYPE_IQ1_S, {0, -1}, {{0}}},
    {KVM_DTYPE_IQ4_NL, {0, -1}, {{0}}},
    {KVM_DTYPE_IQ3_S, {0, -1}, {{106, 4, 1, 0x77, 0}}},
    {KVM_DTYPE_IQ2_S, {0, -1}, {{74, 8, 1, 0x33, 0}}},
    {KVM_DTYPE_IQ4_XS, {0, -1}, {{2, 2, 1, 0, 0xaa}, {4, 4, 1, 0x33, 0}}},
    {KVM_DTYPE_IQ1_M, {-1, -1}, {{0}}},
    {KVM_DTYPE_MXFP4, {-1, -1}, {{0}}},
};
enum { N_FORMATS = sizeof formats / sizeof *formats };
_Static_assert(N_FORMATS == KVM_DTYPE_COUNT - 3, "all types but F32, F16 and BF16");

static void put_scales(int32_t format, bool integer, uint8_t *block) {
    for (int32_t i = 0; i < 2; i++) {
        uint16_t half = integer ? kvm_f32_to_f16(1) : random_half();
        if (formats[format].half[i] >= 0) memcpy(block + formats[format].half[i], &half, sizeof half);
        for (int32_t j = 0; formats[format].type == KVM_DTYPE_IQ1_M && j < 4; j++) { /* in high nibbles */
            uint8_t *high = block + 49 + 2 * j;
            *high = (uint8_t)((*high & 15) | (half >> (4 * j) & 15) << 4);
        }
        for (int32_t j = 0; integer && j < formats[format].small[i].n; j++) {
            uint8_t *byte = block + formats[format].small[i].at + formats[format].small[i].step * j;
            *byte = (uint8_t)((*byte & formats[format].small[i].keep) | formats[format].small[i].set);
        }
    }
    if (formats[format].type == KVM_DTYPE_MXFP4) *block = (uint8_t)(integer ? 128 : 119 + random_u32() % 4);
}

/* n_out rows of n_in weights: random codes (or all bytes `fill`, when it is not negative). With `integer`, every scale
 * is 1 and integer scales are small, so that all weights are multiples of 1/8 and all sums of 256 products exact. */
static kvm_matrix make_matrix(int32_t format, int32_t n_in, int32_t n_out, bool integer, int32_t fill) {
    const kvm_dtype_info *info = &kvm_dtypes[formats[format].type];
    size_t n_bytes = (size_t)n_out * kvm_dtype_row_bytes(formats[format].type, n_in);
    uint8_t *data = guarded(n_bytes);
    for (size_t i = 0; i < n_bytes; i++) data[i] = (uint8_t)(fill < 0 ? random_u32() : (uint32_t)fill);
    for (uint8_t *block = data; block < data + n_bytes; block += info->block_bytes) put_scales(format, integer, block);
    return (kvm_matrix){formats[format].type, n_in, n_out, data};
}

/* out: [n_in], the weights of one output */
static void decode_row(const kvm_matrix *w, int32_t output, float *out) {
    size_t offset = (size_t)output * kvm_dtype_row_bytes(w->type, w->n_in);
    kvm_dtypes[w->type].decode((const uint8_t *)w->data + offset, out, w->n_in);
}

/* w: [n_in] */
static double dot_double(const float *w, kvm_q8_row x, int32_t n_in) {
    double sum = 0;
    for (int32_t i = 0; i < n_in; i++) sum += (double)w[i] * (double)x.scale[i / KVM_Q8_BLOCK] * (double)x.q[i];
    return sum;
}

/* n_rows random activations, and at y what the table makes of outputs [first, last) of them */
static void check_matmul(const kvm_cpu_kernels *kernels, int32_t format, int32_t n_in, int32_t n_out, int32_t n_rows) {
    enum { MAX_ROWS = 70, MAX_IN = 2048 };
    static float weights[MAX_IN];
    float *activations = guarded_floats(n_in), *alone = guarded_floats(n_out);
    int32_t ldy = n_out + 3, first = n_out / 3, last = n_out;
    kvm_matrix w = make_matrix(format, n_in, n_out, false, -1);
    kvm_q8_row x[MAX_ROWS];
    for (int32_t r = 0; r < n_rows; r++) {
        for (int32_t i = 0; i < n_in; i++) activations[i] = random_unit() * random_unit() * 4;
        x[r] = guarded_row(n_in);
        kvm_kernels_scalar.quantize_q8(activations, n_in, x[r]);
    }
    float *y = guarded_floats((n_rows - 1) * ldy + n_out);
    for (int32_t i = 0; i < (n_rows - 1) * ldy + n_out; i++) y[i] = untouched;
    kernels->matmul_q8(&w, first, last, x, n_rows, y, ldy);
    double error = 0, size = 0;
    bool kept = true, same = true;
    for (int32_t o = 0; o < n_out; o++) {
        decode_row(&w, o, weights);
        for (int32_t r = 0; r < n_rows; r++) {
            float got = y[r * ldy + o];
            if (o < first) {
                kept = kept && got == untouched;
                continue;
            }
            double want = dot_double(weights, x[r], n_in);
            error += (got - want) * (got - want);
            size += want * want;
            if ((r + o) % 5 == 0) {
                kernels->matmul_q8(&w, o, o + 1, &x[r], 1, alone, n_out);
                same = same && same_bits(&alone[o], &got, 1);
            }
        }
    }
    for (int32_t i = 0; i < (n_rows - 1) * ldy; i++) kept = kept && (i % ldy < n_out || y[i] == untouched);
    /* rounding in f32 costs up to 3e-13, the plain order of the scalar table most */
    if (!CHECK(error <= 6e-13 * size) || !CHECK(same) || !CHECK(kept)) {
        fprintf(stderr, "    matmul_q8 of %s, %s, n_in %d n_out %d rows %d: nmse %.2g\n", kernels->name,
                kvm_dtypes[w.type].name, n_in, n_out, n_rows, error / size);
    }
    release_guarded();
}

/* Integers only, the largest included: no 16-bit sum may saturate, and the result is exact. */
static void check_matmul_exact(const kvm_cpu_kernels *kernels, int32_t format, int32_t fill, int32_t activation) {
    enum { N_IN = 256, N_OUT = 11, N_ROWS = 5 };
    static float weights[N_IN];
    kvm_matrix w = make_matrix(format, N_IN, N_OUT, true, fill);
    kvm_q8_row x[N_ROWS];
    float *y = guarded_floats(N_ROWS * N_OUT);
    for (int32_t r = 0; r < N_ROWS; r++) {
        x[r] = guarded_row(N_IN);
        for (int32_t i = 0; i < N_IN / KVM_Q8_BLOCK; i++) {
            x[r].scale[i] = 1;
            x[r].sum[i] = x[r].sum16[i] = 0;
        }
        for (int32_t i = 0; i < N_IN; i++) {
            x[r].q[i] = (int8_t)(activation != 0 ? activation : (int32_t)(random_u32() % 255) - 127);
            x[r].sum[i / KVM_Q8_BLOCK] += x[r].q[i];
            x[r].sum16[i / KVM_Q8_BLOCK] += i % KVM_Q8_BLOCK < 16 ? x[r].q[i] : 0;
        }
    }
    kernels->matmul_q8(&w, 0, N_OUT, x, N_ROWS, y, N_OUT);
    bool exact = true;
    for (int32_t o = 0; o < N_OUT; o++) {
        decode_row(&w, o, weights);
        for (int32_t r = 0; r < N_ROWS; r++) exact = exact && y[r * N_OUT + o] == dot_double(weights, x[r], N_IN);
    }
    if (!CHECK(exact)) {
        fprintf(stderr, "    matmul_q8 of %s, %s, bytes %d, activations %d\n", kernels->name, kvm_dtypes[w.type].name,
                fill, activation);
    }
    release_guarded();
}

static void test_matmul(const kvm_cpu_kernels *kernels) {
    static const int32_t row_values[] = {1, 2, 4, 7, 8, 67};
    static const int32_t fills[] = {-1, 0xff, 0x80, 0x81, 0x7f, 0x00}, activations[] = {0, 127, -127};
    for (int32_t f = 0; f < N_FORMATS; f++) {
        int32_t block = kvm_dtypes[formats[f].type].block_values;
        for (size_t r = 0; r < sizeof row_values / sizeof *row_values; r++) {
            check_matmul(kernels, f, block, 19, row_values[r]);
            check_matmul(kernels, f, 576 / block * block, 27, row_values[r]); /* 576 = 2 * 256 + 64 */
        }
        check_matmul(kernels, f, block, 1, 3);
        check_matmul(kernels, f, 2048, 8, 3);
        for (size_t i = 0; i < sizeof fills / sizeof *fills; i++) {
            for (size_t j = 0; j < 3; j++) check_matmul_exact(kernels, f, fills[i], activations[j]);
        }
    }
}

/* ---- load_weights ------------------------------------------------------------------------------------------- */

/* every tile of a matrix, and one of its last output alone */
static void check_load_weights(const kvm_cpu_kernels *kernels, const kvm_matrix *w) {
    float *decoded = guarded_floats(w->n_in);
    bool same = true;
    for (int32_t i = 0; i < w->n_in; i += KVM_TILE_IN) {
        int32_t n = kvm_min(KVM_TILE_IN, w->n_in - i);
        float *tile = guarded_floats(n * KVM_TILE_OUT), *alone = guarded_floats(n * KVM_TILE_OUT);
        kernels->load_weights(w, w->n_out - 1, w->n_out, i, alone);
        for (int32_t first = 0; first < w->n_out; first += KVM_TILE_OUT) {
            int32_t last = kvm_min(first + KVM_TILE_OUT, w->n_out);
            kernels->load_weights(w, first, last, i, tile);
            for (int32_t o = first; o < last; o++) {
                decode_row(w, o, decoded);
                for (int32_t l = 0; l < n; l++) {
                    same = same && same_bits(&tile[l * KVM_TILE_OUT + o - first], &decoded[i + l], 1);
                    if (o == w->n_out - 1) same = same && same_bits(&alone[l * KVM_TILE_OUT], &decoded[i + l], 1);
                }
            }
        }
    }
    if (!CHECK(same)) {
        fprintf(stderr, "    load_weights of %s, %s, n_in %d n_out %d\n", kernels->name, kvm_dtypes[w->type].name,
                w->n_in, w->n_out);
    }
    release_guarded();
}

static void test_load_weights(const kvm_cpu_kernels *kernels) {
    static const kvm_dtype numbers[] = {KVM_DTYPE_F32, KVM_DTYPE_F16, KVM_DTYPE_BF16};
    static const int32_t n_outs[] = {1, 7, 8, 9, 15, 16, 17, 32, 43}, n_ins[] = {1, 3, 4, 7, 8, 23, 64, 256, 331};
    for (size_t o = 0; o < sizeof n_outs / sizeof *n_outs; o++) {
        for (int32_t f = 0; f < N_FORMATS; f++) {
            int32_t block = kvm_dtypes[formats[f].type].block_values;
            kvm_matrix one = make_matrix(f, block, n_outs[o], false, -1);
            check_load_weights(kernels, &one);
            kvm_matrix more = make_matrix(f, 576 / block * block, n_outs[o], false, -1);
            check_load_weights(kernels, &more);
        }
        for (size_t i = 0; i < sizeof n_ins / sizeof *n_ins; i++) {
            for (size_t t = 0; t < sizeof numbers / sizeof *numbers; t++) {
                size_t n_bytes = (size_t)(n_ins[i] * n_outs[o] * kvm_dtypes[numbers[t]].block_bytes);
                kvm_matrix w = {numbers[t], n_ins[i], n_outs[o], guarded(n_bytes)};
                uint16_t *halves = (uint16_t *)(uintptr_t)w.data; /* finite: of a NaN, a decoder may change the bits */
                for (size_t h = 0; h < n_bytes / 2; h++) halves[h] = random_half();
                check_load_weights(kernels, &w);
            }
        }
    }
}

/* ---- load_packed, load_f16 ---------------------------------------------------------------------------------- */

static void test_load_packed(const kvm_cpu_kernels *kernels) {
    static const int32_t d_values[] = {16, 48, 64, 80, 96, 128, 192, 256};
    for (size_t i = 0; i < sizeof d_values / sizeof *d_values; i++) {
        for (int32_t t = 0; t < 2 * KVM_KVTYPE_COUNT; t++) {
            kvm_kvtype type = (kvm_kvtype)(t / 2);
            kvm_side side = t % 2 == 0 ? KVM_SIDE_K : KVM_SIDE_V;
            int32_t d = d_values[i];
            kvm_page_layout layout = kvm_page_layout_of(type, side, d, false);
            int32_t n_bytes = layout.scales + (type == KVM_KVTYPE_F16 ? 0 : 2 * KVM_PAGE * (d / kvm_group_of(d)));
            uint8_t *page = guarded((size_t)n_bytes); /* the vectors behind the scales are not read */
            for (int32_t n = 0; n < n_bytes; n += 2) {
                uint16_t half = n < layout.scales && type != KVM_KVTYPE_F16 ? (uint16_t)random_u32() : random_half();
                memcpy(page + n, &half, sizeof half);
            }
            float *got = guarded_floats(KVM_PAGE * d), *want = guarded_floats(KVM_PAGE * d);
            kernels->load_packed(type, side, page, d, got);
            kvm_decode_page(type, side, page, d, want);
            if (!CHECK(same_bits(got, want, KVM_PAGE * d))) {
                fprintf(stderr, "    load_packed of %s, %s %s d %d\n", kernels->name, kvm_kvtypes[type].name,
                        side == KVM_SIDE_K ? "K" : "V", d);
            }
            release_guarded();
        }
    }
}

static void test_load_f16(const kvm_cpu_kernels *kernels) {
    enum { N = 65536 };
    uint16_t *src = guarded(N * sizeof *src);
    float *dst = guarded_floats(N);
    for (int32_t i = 0; i < N; i++) src[i] = (uint16_t)i;
    kernels->load_f16(src, N, dst);
    bool exact = true;
    for (int32_t i = 0; i < N; i++) {
        int32_t exponent = i >> 10 & 31, fraction = i & 1023;
        double value = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
        double want = exponent < 31 ? value : fraction == 0 ? (double)INFINITY : (double)NAN;
        exact = exact && (isnan(want) ? isnan(dst[i]) : fabs((double)dst[i]) == want);
        exact = exact && (signbit(dst[i]) != 0) == (i >= N / 2);
    }
    CHECK(exact);
    for (int32_t n = 0; n < 20; n++) { /* the ends of both are the ends of their memory, and what is before is kept */
        float *tail = dst + N - n;
        for (int32_t i = 0; i < 32; i++) dst[N - 32 + i] = untouched;
        kernels->load_f16(src + 20000 - n, n, tail);
        bool right = tail[-1] == untouched;
        for (int32_t i = 0; i < n; i++) right = right && tail[i] == kvm_f16_to_f32((uint16_t)(20000 - n + i));
        CHECK(right);
    }
    release_guarded();
}

/* ---- encode, hadamard --------------------------------------------------------------------------------------- */

/* bits of kvm_encode and kvm_hadamard, whatever a position holds: numbers of any size, ties, nothing, NaN, infinity */
static void test_encode(const kvm_cpu_kernels *kernels) {
    static const int32_t d_values[] = {16, 48, 64, 80, 128, 256};
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 0x1p-140f, -0.0f};
    for (size_t i = 0; i < sizeof d_values / sizeof *d_values; i++) {
        int32_t d = d_values[i], n = d * KVM_PAGE, n_scales = d / kvm_group_of(d) * KVM_PAGE;
        float *x = guarded_floats(n), *want_x = guarded_floats(n);
        uint8_t *codes = guarded((size_t)n), *want_codes = guarded((size_t)n);
        uint16_t *scales = guarded((size_t)n_scales * 2), *want_scales = guarded((size_t)n_scales * 2);
        for (int32_t at = 0; at < n; at++) {
            int32_t p = at % KVM_PAGE;
            bool is_odd = p >= 100 && random_u32() % 64 == 0;
            x[at] = p == 0 ? 0.0f : p == 1 ? (float)(random_u32() % 8) : random_unit() * ldexpf(1, p % 60 - 30);
            if (is_odd) x[at] = odd[random_u32() % 6];
        }
        for (int32_t t = 2 * (KVM_KVTYPE_F16 + 1); t < 2 * KVM_KVTYPE_COUNT; t++) {
            kvm_kvtype type = (kvm_kvtype)(t / 2);
            kvm_side side = t % 2 == 0 ? KVM_SIDE_K : KVM_SIDE_V;
            kernels->encode(type, side, x, d, codes, scales);
            kvm_encode(type, side, x, d, want_codes, want_scales);
            bool same = memcmp(codes, want_codes, (size_t)n) == 0;
            same = same && memcmp(scales, want_scales, (size_t)n_scales * 2) == 0;
            if (!CHECK(same)) {
                fprintf(stderr, "    encode of %s, %s %s d %d\n", kernels->name, kvm_kvtypes[type].name,
                        side == KVM_SIDE_K ? "K" : "V", d);
            }
        }
        for (int32_t at = 0; at < n; at++) x[at] = random_unit();
        memcpy(want_x, x, (size_t)n * sizeof *x);
        kernels->hadamard(x, d, KVM_PAGE, kvm_hadamard_block(d, KVM_SIDE_K));
        kvm_hadamard(want_x, d, KVM_PAGE, kvm_hadamard_block(d, KVM_SIDE_K));
        CHECK(same_bits(x, want_x, n));
        release_guarded();
    }
}

/* ---- softmax_step ------------------------------------------------------------------------------------------- */

/* score: [128] in and out; m, l: the state so far */
static void check_softmax(const kvm_cpu_kernels *kernels, float *score, float *m, float *l) {
    float before[KVM_PAGE], m_before = *m, l_before = *l, m_want = *m;
    memcpy(before, score, sizeof before);
    for (int32_t i = 0; i < KVM_PAGE; i++) m_want = before[i] > m_want ? before[i] : m_want;
    float factor = kernels->softmax_step(score, m, l);
    CHECK(*m == m_want);
    double sum = 0, factor_want = exp((double)(m_before - m_want));
    bool close = true;
    for (int32_t i = 0; i < KVM_PAGE; i++) {
        double want = exp((double)(before[i] - m_want)); /* the difference in f32: its rounding is not exp's */
        close = close && fabs(score[i] - want) <= 1.5e-7 * want + 0x1p-125; /* tiny ones may be 0 */
        close = close && (before[i] > m_want - 1000 || score[i] == 0);
        sum += (double)score[i];
    }
    CHECK(close);
    CHECK(fabs(factor - factor_want) <= 1.5e-7 * factor_want + 0x1p-125);
    double l_want = (double)l_before * factor_want + sum;
    CHECK(fabs(*l - l_want) <= 1e-6 * l_want);
}

static void test_softmax(const kvm_cpu_kernels *kernels) {
    float *score = guarded_floats(KVM_PAGE);
    for (int32_t round = 0; round < 2000; round++) {
        float m = -INFINITY, l = 0;
        for (int32_t page = 0; page < 3; page++) {
            float spread = ldexpf(1, round % 16 - 5), middle = random_unit() * spread;
            for (int32_t i = 0; i < KVM_PAGE; i++) score[i] = middle + random_unit() * spread;
            int32_t n_masked = round % 3 == 0 ? (int32_t)(random_u32() % KVM_PAGE) : 0;
            for (int32_t i = 0; i < n_masked; i++) score[(i * 37 + round) % KVM_PAGE] = -INFINITY;
            check_softmax(kernels, score, &m, &l);
        }
    }
    float m = -INFINITY, l = 0;
    for (int32_t i = 0; i < KVM_PAGE; i++) score[i] = i == 77 ? -3.0f : -1e4f - (float)i;
    check_softmax(kernels, score, &m, &l);
    CHECK(score[77] == 1.0f && l == 1.0f && m == -3.0f);
    score[5] = NAN; /* is found where logits are checked, so it must not vanish here */
    kernels->softmax_step(score, &m, &l);
    CHECK(isnan(l));
    release_guarded();
}

/* ---- silu_mul, gelu_mul ------------------------------------------------------------------------------------- */

/* z of an activation gate / (1 + exp(-z)) */
static double silu_z(double gate) { return gate; }
static double gelu_z(double gate) { return 2 * sqrt(2 / acos(-1)) * (gate + 0.044715 * gate * gate * gate); }

/* z_error: relative, of a z computed in f32 */
static void test_gate(void (*gate_mul)(float *, const float *, int32_t), double (*z_of)(double), double z_error) {
    enum { N = 4003 };
    float *gate = guarded_floats(N), *up = guarded_floats(N), *got = guarded_floats(N), *alone = guarded_floats(1);
    for (int32_t i = 0; i < N; i++) {
        gate[i] = random_unit() * ldexpf(1, i % 16 - 8);
        up[i] = random_unit();
    }
    gate[0] = -1e30f;
    gate[N - 1] = 1e30f;
    memcpy(got, gate, N * sizeof *got);
    gate_mul(got, up, N);
    bool close = true, same = true;
    for (int32_t i = 0; i < N; i++) {
        double z = z_of((double)gate[i]), want = (double)gate[i] / (1 + exp(-z)) * (double)up[i];
        /* exp 1e-7, three roundings of 6e-8, and what z's error makes of 1 + exp(-z); e^88.4 and more may be infinity */
        double allowed = 3e-7 + z_error * fabs(z) / (1 + exp(z));
        close = close && fabs(got[i] - want) <= allowed * fabs(want) + 0x1p-120;
        *alone = gate[i];
        gate_mul(alone, &up[i], 1);
        same = same && same_bits(alone, &got[i], 1);
    }
    CHECK(close);
    CHECK(same);
    for (int32_t n = 0; n < 20; n++) {
        float *tail = got + N - n;
        memcpy(tail, gate + N - n, (size_t)n * sizeof *tail);
        tail[-1] = untouched;
        gate_mul(tail, up + N - n, n);
        CHECK(tail[-1] == untouched);
    }
    release_guarded();
}

int main(void) {
    const kvm_cpu_kernels *tables[] = {
        &kvm_kernels_scalar,
#if defined(__x86_64__)
        &kvm_kernels_avx2,
        &kvm_kernels_avx512,
#endif
    };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (!tables[i]->supported()) continue;
        test_gemm(tables[i]);
        test_quantize(tables[i]);
        test_quantize_odd(tables[i]);
        test_matmul(tables[i]);
        test_load_weights(tables[i]);
        test_load_packed(tables[i]);
        test_load_f16(tables[i]);
        test_encode(tables[i]);
        test_softmax(tables[i]);
        test_gate(tables[i]->silu_mul, silu_z, 0);
        test_gate(tables[i]->gelu_mul, gelu_z, 3e-7); /* five roundings */
    }
    return check_report();
}
