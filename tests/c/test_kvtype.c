/* test_kvtype.c - the KV formats against kvtype.h: table, bytes of a page, preconditioning, codec, odd numbers.
 *
 * Layouts are read with an index computed from the byte diagram of section 4, values with the definitions of sections
 * 2, 3 and 5 in double. (tests/ref/codec.py is the other implementation; test_ref.py compares bits.)
 */
#include <stdlib.h>

#include "check.h"
#include "kvtype.h"

enum { D = KVM_HEAD_DIM_MAX, N = KVM_PAGE };

static const kvm_kvtype quantized[] = {KVM_KVTYPE_Q8, KVM_KVTYPE_Q6, KVM_KVTYPE_Q5,
                                       KVM_KVTYPE_Q4, KVM_KVTYPE_Q3, KVM_KVTYPE_Q2};
enum { N_QUANTIZED = sizeof quantized / sizeof *quantized };

/* ---- numbers ------------------------------------------------------------------------------------------------- */

static uint64_t random_state = 88172645463325252u;

static uint32_t random_u32(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

static double uniform(void) { return ((double)random_u32() + 0.5) * 0x1p-32; }

static float normal(void) { /* Box and Muller: the tails matter to a codec that scales by the largest value */
    return (float)(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()));
}

static double square(double x) { return x * x; }

/* ---- table --------------------------------------------------------------------------------------------------- */

static bool named(const char *name, kvm_kvtype want) {
    kvm_kvtype type;
    return kvm_kvtype_from_name(name, strlen(name), &type) && type == want;
}

static void test_table(void) {
    CHECK(named("f16", KVM_KVTYPE_F16) && named("q8", KVM_KVTYPE_Q8) && named("q2", KVM_KVTYPE_Q2));
    CHECK(named("q8_0", KVM_KVTYPE_Q8) && named("q4_0", KVM_KVTYPE_Q4) && named("q3", KVM_KVTYPE_Q3));
    CHECK(named("q6", KVM_KVTYPE_Q6) && named("q5_0", KVM_KVTYPE_Q5));
    static const char *const wrong[] = {"", "q", "q7", "q4_", "q4_1", "q44", "F16", "f32", " q4"};
    kvm_kvtype type;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK(!kvm_kvtype_from_name(wrong[i], strlen(wrong[i]), &type));
    }
    CHECK(kvm_kvtype_from_name("q4v3", 2, &type) && type == KVM_KVTYPE_Q4);
    for (int32_t i = 0; i < N_QUANTIZED; i++) {
        const kvm_kvtype_info *info = &kvm_kvtypes[quantized[i]];
        int32_t bits = 0, n_codes = 1 << info->bits, half = n_codes / 2;
        for (int32_t plane = 0; plane < info->n_planes; plane++) bits += info->plane_bits[plane];
        CHECK(bits == info->bits);
        int8_t level[256];
        kvm_kvtype_levels(quantized[i], level);
        bool ascending = true, symmetric = true, has_zero = quantized[i] == KVM_KVTYPE_Q8;
        for (int32_t c = 1; c < n_codes; c++) ascending = ascending && level[c] > level[c - 1];
        for (int32_t c = 0; c < half; c++) {
            int32_t opposite = has_zero ? half - c : half - 1 - c;
            symmetric = symmetric && level[opposite] == -level[half + c];
        }
        CHECK(ascending);
        CHECK(symmetric);
        float top = has_zero ? 127 : (float)level[n_codes - 1];
        static const float coarse[] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f}, fine[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
        const float *factors = info->bits == 5 ? fine : coarse;
        CHECK(info->n_factors == (info->bits >= 6 ? 1 : info->bits == 5 ? 5 : 6));
        for (int32_t f = 0; f < info->n_factors; f++) CHECK(info->factor[f] == factors[f] / top);
    }
}

/* ---- bytes ---------------------------------------------------------------------------------------------------- */

static void test_layout(void) {
    static const struct {
        kvm_kvtype type;
        kvm_side side;
        int32_t d;
        bool balance;
        kvm_page_layout want;
    } known[] = {
        {KVM_KVTYPE_Q4, KVM_SIDE_K, 128, false, {1024, 8, 8192, 8704, -1, 8960}},
        {KVM_KVTYPE_Q4, KVM_SIDE_K, 128, true, {1024, 8, 8192, 8704, 8960, 9216}},
        {KVM_KVTYPE_Q3, KVM_SIDE_V, 128, false, {768, 8, 6144, -1, -1, 6656}},
        {KVM_KVTYPE_Q2, KVM_SIDE_K, 64, true, {256, 8, 2048, 2304, 2432, 2560}},
        {KVM_KVTYPE_Q8, KVM_SIDE_V, 64, true, {2048, 4, 8192, -1, -1, 8448}},
        {KVM_KVTYPE_Q3, KVM_SIDE_K, 80, false, {512, 8, 4096, 4352, -1, 4544}}, /* 5 + 3 lines; a group of 80 */
        {KVM_KVTYPE_F16, KVM_SIDE_K, 64, true, {0, 0, 16384, -1, -1, 16384}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        kvm_page_layout got = kvm_page_layout_of(known[i].type, known[i].side, known[i].d, known[i].balance);
        if (!CHECK(memcmp(&got, &known[i].want, sizeof got) == 0)) {
            fprintf(stderr, "    case %zu: %d %d %d %d %d %d\n", i, got.tile_bytes, got.n_tiles, got.scales, got.mean,
                    got.balance, got.total);
        }
    }
    for (int32_t i = 0; i < N_QUANTIZED; i++) { /* physical bits of section 4 */
        double bits = kvm_kvtypes[quantized[i]].bits + 0.25;
        double v = kvm_page_layout_of(quantized[i], KVM_SIDE_V, 128, false).total;
        double k = kvm_page_layout_of(quantized[i], KVM_SIDE_K, 128, false).total;
        CHECK(8 * v / (N * 128) == bits && 8 * k / (N * 128) == bits + 0.125);
    }
}

/* the code of channel c at position p, read from the planes by the diagram of section 4 */
static int32_t code_at(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, int32_t c, int32_t p) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int32_t lane = side == KVM_SIDE_K ? p : c, r = side == KVM_SIDE_K ? c : p, n_reduced = side == KVM_SIDE_K ? d : N;
    const uint8_t *plane = page + kvm_page_layout_of(type, side, d, false).tile_bytes * (lane / 16);
    int32_t code = 0;
    for (int32_t i = 0; i < info->n_planes; i++) {
        int32_t w = info->plane_bits[i], per_line = 32 / w, in_line = r % per_line;
        int32_t byte = plane[r / per_line * 64 + lane % 16 * 4 + in_line % 4];
        code = code << w | (byte >> in_line / 4 * w & ((1 << w) - 1));
        plane += (n_reduced + per_line - 1) / per_line * 64;
    }
    return code;
}

static void check_planes(kvm_kvtype type, kvm_side side, int32_t d) {
    static uint8_t codes[D * N], back[D * N];
    kvm_page_layout layout = kvm_page_layout_of(type, side, d, false);
    uint8_t *page = malloc((size_t)layout.scales); /* exactly the codes: what writes past them is caught */
    for (int32_t i = 0; i < d * N; i++) codes[i] = (uint8_t)(random_u32() & ((1u << kvm_kvtypes[type].bits) - 1));
    memset(page, 0xaa, (size_t)layout.scales);
    kvm_planes_pack(type, side, codes, d, page);
    bool by_diagram = true;
    for (int32_t i = 0; i < d * N; i++) {
        by_diagram = by_diagram && code_at(type, side, page, d, i / N, i % N) == codes[i];
    }
    CHECK(by_diagram);
    memset(back, 0xaa, sizeof back);
    kvm_planes_unpack(type, side, page, d, back);
    CHECK(memcmp(codes, back, (size_t)(d * N)) == 0);
    int64_t sum = 0, sum_want = 0; /* bits that belong to no code are 0: count the ones */
    for (int32_t i = 0; i < layout.scales; i++) sum += __builtin_popcount(page[i]);
    for (int32_t i = 0; i < d * N; i++) sum_want += __builtin_popcount(codes[i]);
    CHECK(sum == sum_want);
    free(page);
}

static void test_planes(void) {
    for (int32_t d = 16; d <= D; d += 16) {
        for (int32_t i = 0; i < N_QUANTIZED; i++) {
            check_planes(quantized[i], KVM_SIDE_K, d);
            check_planes(quantized[i], KVM_SIDE_V, d);
        }
    }
    static uint8_t codes[64 * N], page[64 * N];
    codes[20 * N + 33] = 5; /* K: tile 2, lane 1; channel 20 */
    kvm_planes_pack(KVM_KVTYPE_Q4, KVM_SIDE_K, codes, 64, page);
    CHECK(page[2 * 512 + 2 * 64 + 4 * 1 + 0] == 0x50); /* line 2 holds 16..23; index 4 of it: byte 0, high bits */
    kvm_planes_pack(KVM_KVTYPE_Q3, KVM_SIDE_K, codes, 64, page);
    CHECK(page[2 * 384 + 1 * 64 + 4 * 1 + 0] == 0x02 << 2); /* high plane: 5 >> 1; line 1 holds 16..31 */
    CHECK(page[2 * 384 + 4 * 64 + 4 * 1 + 0] == 1 << 5);    /* low plane after 4 lines; index 20 = 4 * 5 + 0 */
    kvm_planes_pack(KVM_KVTYPE_Q2, KVM_SIDE_V, codes, 64, page); /* V: tile 1, lane 4; position 33 */
    CHECK(page[1 * 512 + 2 * 64 + 4 * 4 + 1] == 5 % 4);
}

/* ---- preconditioning ------------------------------------------------------------------------------------------ */

/* entry (i, j) of the orthonormal Hadamard matrix in blocks */
static double hadamard_entry(int32_t i, int32_t j, int32_t block) {
    if (i / block != j / block) return 0;
    return (__builtin_popcount((unsigned)(i & j & (block - 1))) % 2 ? -1 : 1) / sqrt(block);
}

static void test_hadamard(void) {
    CHECK(kvm_hadamard_block(128, KVM_SIDE_K) == 128 && kvm_hadamard_block(128, KVM_SIDE_V) == 64);
    CHECK(kvm_hadamard_block(80, KVM_SIDE_K) == 16 && kvm_hadamard_block(80, KVM_SIDE_V) == 16);
    CHECK(kvm_hadamard_block(192, KVM_SIDE_K) == 64 && kvm_hadamard_block(256, KVM_SIDE_K) == 256);
    static float x[96 * 3], before[96 * 3];
    for (int32_t i = 0; i < 96 * 3; i++) x[i] = before[i] = normal();
    kvm_hadamard(x, 96, 3, 32);
    double error = 0;
    for (int32_t c = 0; c < 96; c++) {
        for (int32_t p = 0; p < 3; p++) {
            double want = 0;
            for (int32_t j = 0; j < 96; j++) want += hadamard_entry(c, j, 32) * (double)before[j * 3 + p];
            error = fmax(error, fabs(x[c * 3 + p] - want));
        }
    }
    CHECK(error < 2e-6);
}

/* x: [d][128] in another frame -> keys: H, times balance, plus mean; the largest distance from `want` over its size */
static double way_back(const float *x, int32_t d, int32_t first, int32_t n_valid, const uint16_t *mean,
                       const uint16_t *balance, const float *want) {
    int32_t block = kvm_hadamard_block(d, KVM_SIDE_K);
    double error = 0, size = 0;
    for (int32_t c = 0; c < d; c++) {
        for (int32_t p = first; p < n_valid; p++) {
            double k = 0;
            for (int32_t j = c / block * block; j < c / block * block + block; j++) {
                k += hadamard_entry(c, j, block) * (double)x[j * N + p];
            }
            k = k * (double)kvm_f16_to_f32(balance[c]) + (double)kvm_f16_to_f32(mean[c]);
            error += square(k - (double)want[c * N + p]);
            size += square((double)want[c * N + p]);
        }
    }
    return error / size;
}

static void check_precondition(int32_t d, int32_t first, int32_t n_valid) {
    static float x[D * N], before[D * N];
    static uint16_t q_rms[D * N], mean[D], balance[D], mean2[D], balance2[D];
    double n = n_valid - first, rk[D], rq[D], rk_max = 0, rq_max = 0, ratio[D], log_sum = 0;
    for (int32_t c = 0; c < d; c++) {
        double k_size = exp2(14 * uniform() - 7), q_size = exp2(14 * uniform() - 7);
        double k_mean = 5 * k_size * (double)normal(), sum = 0, k_squares = 0, q_squares = 0;
        for (int32_t p = 0; p < N; p++) {
            before[c * N + p] = x[c * N + p] = (float)(k_mean + k_size * (double)normal());
            q_rms[c * N + p] = kvm_f32_to_f16((float)(q_size * (0.5 + uniform())));
            if (p < first || p >= n_valid) continue;
            sum += (double)x[c * N + p];
            q_squares += square((double)kvm_f16_to_f32(q_rms[c * N + p]));
        }
        for (int32_t p = first; p < n_valid; p++) k_squares += square((double)x[c * N + p] - sum / n);
        rk_max = fmax(rk_max, rk[c] = sqrt(k_squares / n));
        rq_max = fmax(rq_max, rq[c] = sqrt(q_squares / n));
    }
    for (int32_t c = 0; c < d; c++) {
        ratio[c] = sqrt(fmax(rk[c], rk_max * 0x1p-10) / fmax(rq[c], rq_max * 0x1p-10));
        log_sum += log2(ratio[c]);
    }
    kvm_precondition_k(x, d, first, n_valid, q_rms, NULL, mean, balance);
    bool means = true, balances = true, clamped = false, outside = true;
    for (int32_t c = 0; c < d; c++) {
        double sum = 0, want = ratio[c] / exp2(log_sum / d), got = (double)kvm_f16_to_f32(balance[c]);
        for (int32_t p = first; p < n_valid; p++) sum += (double)before[c * N + p];
        means = means && fabs((double)kvm_f16_to_f32(mean[c]) - sum / n) <= fabs(sum / n) * 0x1p-10 + 1e-6;
        clamped = clamped || want > 16 || want < 0.0625;
        want = fmin(fmax(want, 0.0625), 16);
        balances = balances && fabs(got - want) <= want * 0x1p-9;
        for (int32_t p = 0; p < N; p++) outside = outside && ((p >= first && p < n_valid) || x[c * N + p] == 0);
    }
    CHECK(means);
    CHECK(balances);
    CHECK(clamped); /* or the data does not test it */
    CHECK(outside);
    CHECK(way_back(x, d, first, n_valid, mean, balance, before) < 1e-12);

    static float again[D * N];
    memcpy(again, before, sizeof again);
    kvm_precondition_k(again, d, first, n_valid, NULL, balance, mean2, balance2); /* frozen at what was found */
    CHECK(memcmp(again, x, (size_t)(d * N) * sizeof *x) == 0);
    CHECK(memcmp(mean, mean2, (size_t)d * 2) == 0 && memcmp(balance, balance2, (size_t)d * 2) == 0);
}

static void test_precondition(void) {
    check_precondition(64, 0, N);
    check_precondition(128, 16, N);
    check_precondition(256, 64, N);
    check_precondition(80, 0, 37);
    check_precondition(128, 16, 18);
    static float x[64 * N];
    static uint16_t q_rms[64 * N], mean[64], balance[64];
    for (int32_t i = 0; i < 64 * N; i++) x[i] = normal();
    kvm_precondition_k(x, 64, 0, N, q_rms, NULL, mean, balance); /* no queries: no balance */
    bool ones = true;
    for (int32_t c = 0; c < 64; c++) ones = ones && balance[c] == kvm_f32_to_f16(1);
    CHECK(ones);
}

/* ---- codec ---------------------------------------------------------------------------------------------------- */

/* encoded and decoded through the bytes of a page: out K [d][128], V [128][d] */
static void round_trip(kvm_kvtype type, kvm_side side, const float *x, int32_t d, uint8_t *codes, uint16_t *scales,
                       float *out) {
    static uint8_t page[D * N * 2];
    kvm_encode(type, side, x, d, codes, scales);
    kvm_planes_pack(type, side, codes, d, page);
    int32_t at = kvm_page_layout_of(type, side, d, false).scales;
    memcpy(page + at, scales, (size_t)(N * (d / kvm_group_of(d)) * 2));
    kvm_decode_page(type, side, page, d, out);
}

/* K: codes are nearest levels, decoded values are scale * level, and no factor by itself would have been better. */
static void check_codec(kvm_kvtype type, const float *x, int32_t d) {
    static uint8_t codes[D * N];
    static uint16_t scales[D * N];
    static float out[D * N];
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int8_t level[256];
    kvm_kvtype_levels(type, level);
    round_trip(type, KVM_SIDE_K, x, d, codes, scales, out);
    int32_t group = kvm_group_of(d), lowest = type == KVM_KVTYPE_Q8 ? 1 : 0; /* q8 does not use -128 */
    bool nearest = true, product = true, searched = true;
    for (int32_t i = 0; i < d / group * N; i++) {
        int32_t g = i / N, p = i % N;
        double scale = (double)kvm_f16_to_f32(scales[i]), error = 0, amax = 0, size = 0;
        for (int32_t c = g * group; c < (g + 1) * group; c++) {
            double value = (double)x[c * N + p], distance = INFINITY;
            for (int32_t l = lowest; l < 1 << info->bits; l++) {
                distance = fmin(distance, fabs(value - scale * level[l]));
            }
            double got = scale * level[codes[c * N + p]];
            nearest = nearest && fabs(value - got) <= distance + 1e-6 * fabs(value);
            product = product && out[c * N + p] == (float)got;
            error += square(value - got);
            size += square(value);
            amax = fmax(amax, fabs(value));
        }
        for (int32_t f = 0; f < info->n_factors; f++) {
            double plain = 0, s = amax * (double)info->factor[f];
            for (int32_t c = g * group; c < (g + 1) * group; c++) {
                double distance = INFINITY;
                for (int32_t l = lowest; l < 1 << info->bits; l++) {
                    distance = fmin(distance, fabs((double)x[c * N + p] - s * level[l]));
                }
                plain += square(distance);
            }
            /* the scale is rounded to f16: 2^-11 of a value is 2^-22 of its square, and 2^-25 absolute */
            searched = searched && error <= plain * 1.0001 + size * 0x1p-21 + group * square(0x1p-25 * 127);
        }
    }
    if (!CHECK(nearest) || !CHECK(product) || !CHECK(searched)) fprintf(stderr, "    %s, d %d\n", info->name, d);
}

/* V: K's codes where there are levels, and a scale with which a group keeps its product with the input: the sum of
 * x * decoded is the sum of x * x, to half a unit of the scale's f16. */
static void check_unbiased(kvm_kvtype type, const float *x, int32_t d) {
    static uint8_t codes[D * N], k_codes[D * N];
    static uint16_t scales[D * N], k_scales[D * N];
    static float out[D * N];
    round_trip(type, KVM_SIDE_V, x, d, codes, scales, out);
    kvm_encode(type, KVM_SIDE_K, x, d, k_codes, k_scales);
    int32_t group = kvm_group_of(d);
    bool unbiased = true, zeros = true;
    for (int32_t i = 0; i < d / group * N; i++) {
        double xx = 0, product = 0;
        for (int32_t c = i / N * group; c < (i / N + 1) * group; c++) {
            double value = (double)x[c * N + i % N];
            xx += square(value);
            product += value * (double)out[i % N * d + c];
        }
        double scale = (double)kvm_f16_to_f32(scales[i]);
        double allowed = xx * (0x1p-11 + 1e-6 + 0x1p-24 / scale); /* the last where an f16 has fewer bits */
        if (scale > 0 && scale < 65504) unbiased = unbiased && fabs(product - xx) <= allowed;
        else zeros = zeros && (scale > 0 || xx <= group * square(0x1p-24 * 127));
    }
    bool same = kvm_is_trellis(type, KVM_SIDE_V) || memcmp(codes, k_codes, (size_t)(d * N)) == 0;
    if (!CHECK(unbiased) || !CHECK(zeros) || !CHECK(same)) {
        fprintf(stderr, "    V of %s, d %d\n", kvm_kvtypes[type].name, d);
    }
}

static void test_codec(void) {
    static float x[D * N];
    static const int32_t dims[] = {16, 64, 80, 192};
    for (int32_t kind = 0; kind < 5; kind++) {
        for (int32_t i = 0; i < D * N; i++) {
            float noise = normal(), outlier = i / N % 64 == i % 40 ? 1000.0f : 1.0f;
            float kinds[] = {noise, noise * outlier, noise > 0 ? 3.7f : -3.7f, noise * 1e4f, (float)(i % N) * 0x1p-24f};
            x[i] = kinds[kind];
        }
        for (int32_t j = 0; j < 4; j++) {
            for (int32_t i = 0; i < N_QUANTIZED; i++) {
                check_codec(quantized[i], x, dims[j]);
                check_unbiased(quantized[i], x, dims[j]);
            }
        }
    }
}

/* The step of position p on its channel's ring, and back (section 5). */
static int32_t step_of(int32_t p) { return p % 4 * 32 + p / 16 * 4 + p / 4 % 4; }
static int32_t position_of(int32_t t) { return (t & 3) * 4 + (t >> 2 & 7) * 16 + (t >> 5); }

/* the level at step t of a ring of symbols [128] */
static int32_t ring_level(const uint8_t *ring, int32_t t) {
    int32_t a = kvm_trellis_a[ring[(t + 125) % 128] + 4 * ring[(t + 126) % 128]];
    return a + kvm_trellis_b[(ring[(t + 127) % 128] + 4 * ring[t % 128] + a + 64) % 16];
}

/* the error of levels against y [128] over the steps that symbols at t and t + 1 reach */
static int32_t error_near(const uint8_t *ring, const int32_t *y, int32_t t) {
    int32_t error = 0;
    for (int32_t i = t; i < t + 5; i++) {
        int32_t off = y[i % 128] - ring_level(ring, i);
        error += off * off;
    }
    return error;
}

/* V of q2: levels are those of the windows that the byte diagram gives, and no pair of neighbouring symbols could be
 * chosen better; but for the last, which a lap chose that did not know the ring's other end. */
static void check_trellis(const float *x, int32_t d) {
    static uint8_t codes[D * N], page[D * N];
    static uint16_t scales[D * N];
    static float out[D * N];
    kvm_encode(KVM_KVTYPE_Q2, KVM_SIDE_V, x, d, codes, scales);
    kvm_planes_pack(KVM_KVTYPE_Q2, KVM_SIDE_V, codes, d, page);
    int32_t group = kvm_group_of(d), n_improved = 0;
    memcpy(page + d * N / 4, scales, (size_t)(N * (d / group) * 2));
    kvm_decode_page(KVM_KVTYPE_Q2, KVM_SIDE_V, page, d, out);
    bool by_diagram = true;
    for (int32_t c = 0; c < d; c++) {
        uint8_t ring[128];
        int32_t y[128];
        for (int32_t p = 0; p < N; p++) {
            ring[step_of(p)] = (uint8_t)code_at(KVM_KVTYPE_Q2, KVM_SIDE_V, page, d, c, p);
            float xx = 0;
            for (int32_t i = c / group * group; i < c / group * group + group; i++) xx += x[i * N + p] * x[i * N + p];
            float t = xx > 0 ? x[c * N + p] * (20.0f / sqrtf(xx / (float)group)) : 0;
            y[step_of(p)] = (int32_t)nearbyintf(fminf(fmaxf(t, -75), 75));
        }
        for (int32_t t = 0; t < N; t++) {
            int32_t p = position_of(t);
            float scale = kvm_f16_to_f32(scales[c / group * N + p]);
            by_diagram = by_diagram && out[p * d + c] == scale * (float)ring_level(ring, t);
        }
        for (int32_t t = 0; t < 124; t++) {
            int32_t error = error_near(ring, y, t), first = ring[t], second = ring[t + 1];
            for (int32_t other = 0; other < 16; other++) {
                ring[t] = (uint8_t)(other % 4);
                ring[t + 1] = (uint8_t)(other / 4);
                n_improved += error_near(ring, y, t) < error;
            }
            ring[t] = (uint8_t)first;
            ring[t + 1] = (uint8_t)second;
        }
    }
    if (!CHECK(by_diagram) || !CHECK(n_improved == 0)) fprintf(stderr, "    trellis, d %d: %d better\n", d, n_improved);
}

static void test_trellis(void) {
    static float x[D * N];
    int32_t top = 0;
    for (int32_t w = 0; w < 256; w++) top = kvm_max(top, abs(kvm_trellis_level(w)));
    CHECK(top == 52);
    for (int32_t t = 0; t < N; t++) CHECK(step_of(position_of(t)) == t && kvm_trellis_position(t) == position_of(t));
    for (int32_t kind = 0; kind < 3; kind++) {
        for (int32_t i = 0; i < D * N; i++) x[i] = normal() * (kind == 0 ? 1 : kind == 1 && i / N != 5 ? 0.03f : 3e3f);
        check_trellis(x, 64);
        check_trellis(x, 80);
        check_trellis(x, 128);
    }
}

/* NMSE of 16 pages of Gaussian rows of 128, as stored and after the best common gain */
static void gaussian_error(kvm_kvtype type, kvm_side side, double *stored, double *gained) {
    static float x[128 * N], out[128 * N];
    static uint8_t codes[128 * N];
    static uint16_t scales[2 * N];
    double error = 0, xx = 0, xy = 0, yy = 0;
    for (int32_t page = 0; page < 16; page++) {
        for (int32_t i = 0; i < 128 * N; i++) x[i] = normal();
        round_trip(type, side, x, 128, codes, scales, out);
        for (int32_t i = 0; i < 128 * N; i++) {
            double value = (double)x[i], got = (double)out[side == KVM_SIDE_K ? i : i % N * 128 + i / N];
            error += square(got - value);
            xx += square(value);
            xy += value * got;
            yy += square(got);
        }
    }
    *stored = error / xx;
    *gained = 1 - xy * xy / (xx * yy);
}

/* What each codec loses: no more than design allows, and no less than it can. */
static void test_gaussian(void) {
    static const struct {
        kvm_kvtype type;
        double least, most;     /* K, and V after the best gain */
        double v_least, v_most; /* V as stored */
    } bounds[] = {
        {KVM_KVTYPE_Q8, 2.5e-5, 3.5e-5, 2.5e-5, 3.5e-5}, {KVM_KVTYPE_Q6, 0.00052, 0.00060, 0.00052, 0.00060},
        {KVM_KVTYPE_Q5, 0.0020, 0.0024, 0.0020, 0.0024}, {KVM_KVTYPE_Q4, 0.0069, 0.0073, 0.0070, 0.0074},
        {KVM_KVTYPE_Q3, 0.0285, 0.0300, 0.0295, 0.0310}, {KVM_KVTYPE_Q2, 0.1090, 0.1140, 0.0805, 0.0830}};
    for (int32_t t = 0; t < N_QUANTIZED; t++) {
        bool trellis = kvm_is_trellis(bounds[t].type, KVM_SIDE_V);
        double k, v, k_gained, v_gained;
        gaussian_error(bounds[t].type, KVM_SIDE_K, &k, &k_gained);
        gaussian_error(bounds[t].type, KVM_SIDE_V, &v, &v_gained);
        double least = trellis ? 0.0745 : bounds[t].least, most = trellis ? 0.0790 : bounds[t].most;
        if (!CHECK(k >= bounds[t].least && k <= bounds[t].most) || !CHECK(v_gained >= least && v_gained <= most) ||
            !CHECK(v >= bounds[t].v_least && v <= bounds[t].v_most)) {
            const char *name = kvm_kvtypes[bounds[t].type].name;
            fprintf(stderr, "    %s: nmse K %.5f, V %.5f, after its gain %.5f\n", name, k, v, v_gained);
        }
    }
}

/* A position with odd numbers: its scale is finite, its codes are codes, and its neighbours keep their bits; or, in a
 * trellis where neighbours depend on it, their quality. */
static void check_odd(kvm_kvtype type, kvm_side side, const float *odd, int32_t n_odd, bool zero_scale) {
    enum { ODD_D = 64, AT = 37 };
    static float x[ODD_D * N], out[ODD_D * N];
    static uint8_t codes[ODD_D * N], clean_codes[ODD_D * N];
    static uint16_t scales[N], clean_scales[N];
    for (int32_t i = 0; i < ODD_D * N; i++) x[i] = normal();
    kvm_encode(type, side, x, ODD_D, clean_codes, clean_scales);
    for (int32_t c = 0; c < ODD_D; c++) x[c * N + AT] = odd[c % n_odd];
    round_trip(type, side, x, ODD_D, codes, scales, out);
    bool valid = true, kept = true, finite = true, trellis = kvm_is_trellis(type, side);
    int32_t half = 1 << (kvm_kvtypes[type].bits - 1);
    double error = 0, size = 0;
    for (int32_t i = 0; i < ODD_D * N; i++) {
        int32_t code = codes[i], at = side == KVM_SIDE_K ? i : i % N * ODD_D + i / N;
        finite = finite && isfinite(out[at]);
        if (i % N == AT) {
            valid = valid && code < 2 * half && (!zero_scale || (trellis ? out[at] == 0 : code == half));
        } else {
            kept = kept && code == clean_codes[i];
            error += square((double)(out[at] - x[i]));
            size += square((double)x[i]);
        }
    }
    CHECK(!zero_scale || scales[AT] == 0);
    scales[AT] = clean_scales[AT];
    CHECK(trellis ? error < 0.1 * size : memcmp(scales, clean_scales, sizeof scales) == 0);
    if (!CHECK(valid) || !CHECK(trellis || kept) || !CHECK(finite)) {
        fprintf(stderr, "    %s with %g %g\n", kvm_kvtypes[type].name, (double)odd[0], (double)odd[n_odd - 1]);
    }
}

static void test_odd(void) {
    for (int32_t i = 0; i < 2 * N_QUANTIZED; i++) {
        kvm_kvtype type = quantized[i / 2];
        kvm_side side = i % 2 == 0 ? KVM_SIDE_K : KVM_SIDE_V;
        check_odd(type, side, (const float[]){0.0f, -0.0f}, 2, true);
        check_odd(type, side, (const float[]){1e-40f, -1e-45f}, 2, true);    /* below f16 and below 1 / FLT_MAX */
        check_odd(type, side, (const float[]){1e-12f, -1e-11f, 0}, 3, true); /* the scale is below f16 */
        check_odd(type, side, (const float[]){NAN, 1, -2}, 3, true);         /* no gain is larger than any other */
        check_odd(type, side, (const float[]){NAN}, 1, true);
        check_odd(type, side, (const float[]){65504, -65504}, 2, false);
        check_odd(type, side, (const float[]){65504, 0, 0, 0x1p-24f}, 4, false);
        check_odd(type, side, (const float[]){1e38f, -3e38f, 1}, 3, false); /* squares overflow */
        check_odd(type, side, (const float[]){INFINITY, 1, -1}, 3, false);
        check_odd(type, side, (const float[]){-INFINITY, INFINITY}, 2, false);
    }
    CHECK(kvm_f16_sat(1e9f) == 0x7bff && kvm_f16_sat(-INFINITY) == 0xfbff && kvm_f16_sat(65519.0f) == 0x7bff);
    CHECK((kvm_f16_sat(NAN) & 0x7fffu) > 0x7c00u);
}

/* constant rows and signs come back within the rounding of the scale */
static void test_exact(void) {
    static float x[64 * N], out[64 * N];
    static uint8_t codes[64 * N];
    static uint16_t scales[N];
    for (int32_t i = 0; i < N_QUANTIZED; i++) { /* V keeps K's codes, but where it is a trellis */
        kvm_side side = kvm_is_trellis(quantized[i], KVM_SIDE_V) ? KVM_SIDE_K : KVM_SIDE_V;
        for (int32_t j = 0; j < 64 * N; j++) x[j] = (j / N % 3 == 0 ? -1.0f : 1.0f) * ldexpf(1.3f, j % N / 8 - 8);
        round_trip(quantized[i], side, x, 64, codes, scales, out);
        bool close = true; /* scales down to 1e-5 have 8 bits left */
        for (int32_t j = 0; j < 64 * N; j++) {
            float got = out[side == KVM_SIDE_K ? j : j % N * 64 + j / N];
            close = close && fabsf(got - x[j]) <= fabsf(x[j]) * 0x1p-7f;
        }
        CHECK(close);
    }
    static uint16_t half[16 * N];
    for (int32_t i = 0; i < 16 * N; i++) half[i] = kvm_f32_to_f16(normal());
    kvm_decode_page(KVM_KVTYPE_F16, KVM_SIDE_V, (const uint8_t *)half, 16, out);
    bool same = true;
    for (int32_t i = 0; i < 16 * N; i++) same = same && kvm_f32_to_f16(out[i]) == half[i];
    CHECK(same);
}

int main(void) {
    test_table();
    test_layout();
    test_planes();
    test_hadamard();
    test_precondition();
    test_codec();
    test_trellis();
    test_gaussian();
    test_odd();
    test_exact();
    return check_report();
}
