/* kvtype.c - the table of KV formats and their reference codec. kvtype.h is the specification, section by section.
 *
 * Loops run over the 128 positions of a page in the innermost place, where each position is on its own: compilers
 * vectorize them, and the order of every sum (channels ascending) stays as written. Built without FMA contraction.
 */
#include "kvencode.h"

#define FACTORS(top)                                                                                                   \
    { 1.0f / (top), 0.9f / (top), 0.8f / (top), 0.7f / (top), 0.6f / (top), 0.5f / (top) }

const kvm_kvtype_info kvm_kvtypes[KVM_KVTYPE_COUNT] = {
#define X(id, type_name, n_bits, alias_name) [KVM_KVTYPE_##id] = {.name = type_name, .alias = alias_name, .bits = n_bits, KVM_CODEC_##id},
#define KVM_CODEC_F16 .n_planes = 0
#define KVM_CODEC_Q8 .n_planes = 1, .plane_bits = {8}, .n_factors = 1, .factor = {1.0f / 127}
#define KVM_CODEC_Q6 .n_planes = 2, .plane_bits = {4, 2}, .n_positive = 32, .n_factors = 1, .factor = {1.0f / 63}
#define KVM_CODEC_Q5                                                                                                   \
    .n_planes = 2, .plane_bits = {4, 1}, .n_positive = 16, .n_factors = 5,                                             \
    .factor = {1.0f / 31, 0.95f / 31, 0.9f / 31, 0.85f / 31, 0.8f / 31}
#define KVM_CODEC_Q4                                                                                                   \
    .n_planes = 1, .plane_bits = {4}, .n_positive = 8, .level = {3, 9, 15, 22, 29, 37, 48, 63}, .n_factors = 6,        \
    .factor = FACTORS(63)
#define KVM_CODEC_Q3                                                                                                   \
    .n_planes = 2, .plane_bits = {2, 1}, .n_positive = 4, .level = {3, 9, 16, 26}, .n_factors = 6, .factor = FACTORS(26)
#define KVM_CODEC_Q2                                                                                                   \
    .n_planes = 1, .plane_bits = {2}, .n_positive = 2, .level = {3, 10}, .n_factors = 6, .factor = FACTORS(10),        \
    .v_trellis = true
    KVM_KVTYPE_LIST(X)
#undef X
};

/* found by Lloyd's iteration through the encoder on Gaussian values of deviation 20 */
const int8_t kvm_trellis_a[16] = {-8, 5, 0, -4, -2, 2, -6, -10, 4, -1, -5, 3, -6, 10, -10, 1};
const int8_t kvm_trellis_b[16] = {0, -6, 4, 7, 15, 7, 21, 23, 42, 25, -12, -24, -14, -22, -38, -6};

bool kvm_kvtype_from_name(const char *name, size_t n_bytes, kvm_kvtype *out) {
    for (int32_t t = 0; t < KVM_KVTYPE_COUNT; t++) {
        const kvm_kvtype_info *info = &kvm_kvtypes[t];
        if ((strlen(info->name) == n_bytes && memcmp(info->name, name, n_bytes) == 0) ||
            (strlen(info->alias) == n_bytes && memcmp(info->alias, name, n_bytes) == 0)) {
            *out = (kvm_kvtype)t;
            return true;
        }
    }
    return false;
}

void kvm_kvtype_levels(kvm_kvtype type, int8_t table[256]) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    if (info->n_positive == 0) {
        for (int32_t code = 0; code < 256; code++) table[code] = (int8_t)(code - 128);
        return;
    }
    for (int32_t m = 0; m < info->n_positive; m++) {
        int32_t level = info->level[0] ? info->level[m] : 2 * m + 1;
        table[info->n_positive + m] = (int8_t)level;
        table[info->n_positive - 1 - m] = (int8_t)-level;
    }
}

void kvm_levels_of(kvm_kvtype type, kvm_side side, const uint8_t *codes, int32_t d, int8_t *levels) {
    if (!kvm_is_trellis(type, side)) {
        int8_t table[256];
        kvm_kvtype_levels(type, table);
        for (int32_t i = 0; i < d * KVM_PAGE; i++) levels[i] = table[codes[i]];
        return;
    }
    for (int32_t c = 0; c < d; c++, codes += KVM_PAGE, levels += KVM_PAGE) {
        int32_t window = 0;
        for (int32_t t = -3; t < KVM_PAGE; t++) {
            int32_t p = kvm_trellis_position((t + KVM_PAGE) % KVM_PAGE);
            window = window >> 2 | codes[p] << 6;
            if (t >= 0) levels[p] = (int8_t)kvm_trellis_level(window);
        }
    }
}

/* ---- layout (section 4) ------------------------------------------------------------------------------------- */

static int32_t lanes_total(kvm_side side, int32_t d) { return side == KVM_SIDE_K ? KVM_PAGE : d; }
static int32_t reduced_total(kvm_side side, int32_t d) { return side == KVM_SIDE_K ? d : KVM_PAGE; }

kvm_page_layout kvm_page_layout_of(kvm_kvtype type, kvm_side side, int32_t d, bool balance_page) {
    kvm_page_layout layout = {.mean = -1, .balance = -1};
    if (type == KVM_KVTYPE_F16) {
        layout.total = layout.scales = 2 * KVM_PAGE * d;
        return layout;
    }
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    layout.n_tiles = lanes_total(side, d) / KVM_LANES;
    for (int32_t i = 0; i < info->n_planes; i++) {
        layout.tile_bytes += KVM_LINE * kvm_ceil_div(reduced_total(side, d), 32 / info->plane_bits[i]);
    }
    int32_t end = layout.scales = layout.n_tiles * layout.tile_bytes;
    end += 2 * KVM_PAGE * (d / kvm_group_of(d));
    if (side == KVM_SIDE_K) {
        layout.mean = end;
        end += 2 * d;
        if (balance_page) {
            layout.balance = end;
            end += 2 * d;
        }
    }
    layout.total = kvm_ceil_div(end, KVM_LINE) * KVM_LINE;
    return layout;
}

/* where the code of (lane, r) lies in codes[d][128] */
static inline int32_t code_index(kvm_side side, int32_t lane, int32_t r) {
    return side == KVM_SIDE_K ? r * KVM_PAGE + lane : lane * KVM_PAGE + r;
}

void kvm_planes_pack(kvm_kvtype type, kvm_side side, const uint8_t *codes, int32_t d, uint8_t *page) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int32_t n_reduced = reduced_total(side, d);
    for (int32_t tile = 0; tile < lanes_total(side, d) / KVM_LANES; tile++) {
        int32_t shift = info->bits;
        for (int32_t plane = 0; plane < info->n_planes; plane++) {
            int32_t w = info->plane_bits[plane], per_line = 32 / w, mask = (1 << w) - 1;
            shift -= w;
            for (int32_t g = 0; g < kvm_ceil_div(n_reduced, per_line); g++, page += KVM_LINE) {
                for (int32_t byte = 0; byte < KVM_LINE; byte++) {
                    int32_t lane = tile * KVM_LANES + byte / 4, value = 0;
                    for (int32_t j = 0; j < 8 / w; j++) {
                        int32_t r = g * per_line + 4 * j + byte % 4;
                        if (r < n_reduced) value |= (codes[code_index(side, lane, r)] >> shift & mask) << (w * j);
                    }
                    page[byte] = (uint8_t)value;
                }
            }
        }
    }
}

void kvm_planes_unpack(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, uint8_t *codes) {
    const kvm_kvtype_info *info = &kvm_kvtypes[type];
    int32_t n_reduced = reduced_total(side, d);
    memset(codes, 0, (size_t)(KVM_PAGE * d));
    for (int32_t tile = 0; tile < lanes_total(side, d) / KVM_LANES; tile++) {
        int32_t shift = info->bits;
        for (int32_t plane = 0; plane < info->n_planes; plane++) {
            int32_t w = info->plane_bits[plane], per_line = 32 / w, mask = (1 << w) - 1;
            shift -= w;
            for (int32_t g = 0; g < kvm_ceil_div(n_reduced, per_line); g++, page += KVM_LINE) {
                for (int32_t byte = 0; byte < KVM_LINE; byte++) {
                    int32_t lane = tile * KVM_LANES + byte / 4;
                    for (int32_t j = 0; j < 8 / w; j++) {
                        int32_t r = g * per_line + 4 * j + byte % 4;
                        int32_t bits = (page[byte] >> (w * j) & mask) << shift;
                        if (r < n_reduced) codes[code_index(side, lane, r)] |= (uint8_t)bits;
                    }
                }
            }
        }
    }
}

/* ---- preconditioning (section 2) ---------------------------------------------------------------------------- */

int32_t kvm_hadamard_block(int32_t d, kvm_side side) {
    int32_t block = d & -d;
    return side == KVM_SIDE_V ? kvm_min(block, 64) : block;
}

void kvm_hadamard(float *x, int32_t d, int32_t n, int32_t block) { hadamard(x, d, n, block); }

static float sum128(const float x[KVM_PAGE]) {
    float lane[KVM_LANES];
    memcpy(lane, x, sizeof lane);
    for (int32_t i = KVM_LANES; i < KVM_PAGE; i += KVM_LANES) {
        for (int32_t j = 0; j < KVM_LANES; j++) lane[j] += x[i + j];
    }
    for (int32_t half = KVM_LANES / 2; half >= 1; half /= 2) {
        for (int32_t j = 0; j < half; j++) lane[j] += lane[j + half];
    }
    return lane[0];
}

static float rms128(const float x[KVM_PAGE], float n) {
    float square[KVM_PAGE];
    for (int32_t p = 0; p < KVM_PAGE; p++) square[p] = x[p] * x[p];
    return sqrtf(sum128(square) / n);
}

/* rk, rq: [d] -> balance [d] */
static void balance_of(float *rk, float *rq, int32_t d, uint16_t *balance) {
    float rk_max = 0, rq_max = 0;
    for (int32_t c = 0; c < d; c++) {
        if (rk[c] > rk_max) rk_max = rk[c];
        if (rq[c] > rq_max) rq_max = rq[c];
    }
    if (!(rk_max > 0) || !(rq_max > 0)) {
        for (int32_t c = 0; c < d; c++) balance[c] = kvm_f32_to_f16(1.0f);
        return;
    }
    float k_floor = rk_max * 0x1p-10f, q_floor = rq_max * 0x1p-10f;
    double log_sum = 0;
    for (int32_t c = 0; c < d; c++) {
        float k = rk[c] > k_floor ? rk[c] : k_floor, q = rq[c] > q_floor ? rq[c] : q_floor;
        rk[c] = sqrtf(k / q);
        log_sum += log2((double)rk[c]);
    }
    float center = (float)exp2(log_sum / d);
    for (int32_t c = 0; c < d; c++) {
        float ratio = rk[c] / center;
        balance[c] = kvm_f32_to_f16(ratio > 16.0f ? 16.0f : ratio < 0.0625f ? 0.0625f : ratio);
    }
}

void kvm_precondition_k(float *x, int32_t d, int32_t first, int32_t n_valid, const uint16_t *q_rms,
                        const uint16_t *frozen, uint16_t *mean, uint16_t *balance) {
    float n = (float)kvm_max(n_valid - first, 1), rk[KVM_HEAD_DIM_MAX], rq[KVM_HEAD_DIM_MAX];
    for (int32_t c = 0; c < d; c++) {
        float *row = x + (size_t)c * KVM_PAGE;
        for (int32_t p = 0; p < KVM_PAGE; p++) row[p] = p >= first && p < n_valid ? row[p] : 0.0f;
        mean[c] = kvm_f32_to_f16(sum128(row) / n);
        float m = kvm_f16_to_f32(mean[c]);
        for (int32_t p = first; p < n_valid; p++) row[p] -= m;
        if (frozen != NULL) continue;
        float q[KVM_PAGE];
        for (int32_t p = 0; p < KVM_PAGE; p++) {
            q[p] = p >= first && p < n_valid ? kvm_f16_to_f32(q_rms[(size_t)c * KVM_PAGE + (size_t)p]) : 0.0f;
        }
        rk[c] = rms128(row, n);
        rq[c] = rms128(q, n);
    }
    if (frozen != NULL) memcpy(balance, frozen, (size_t)d * 2);
    else balance_of(rk, rq, d, balance);
    for (int32_t c = 0; c < d; c++) {
        float *row = x + (size_t)c * KVM_PAGE, b = kvm_f16_to_f32(balance[c]);
        for (int32_t p = 0; p < KVM_PAGE; p++) row[p] /= b;
    }
    kvm_hadamard(x, d, KVM_PAGE, kvm_hadamard_block(d, KVM_SIDE_K));
}

void kvm_encode(kvm_kvtype type, kvm_side side, const float *x, int32_t d, uint8_t *codes, uint16_t *scales) {
    encode_page(type, side, x, d, codes, scales);
}

void kvm_decode_page(kvm_kvtype type, kvm_side side, const uint8_t *page, int32_t d, float *out) {
    const uint16_t *half = (const uint16_t *)(const void *)page;
    if (type == KVM_KVTYPE_F16) {
        for (int32_t i = 0; i < d * KVM_PAGE; i++) out[i] = kvm_f16_to_f32(half[i]);
        return;
    }
    uint8_t codes[KVM_HEAD_DIM_MAX * KVM_PAGE];
    int8_t level[KVM_HEAD_DIM_MAX * KVM_PAGE];
    kvm_planes_unpack(type, side, page, d, codes);
    kvm_levels_of(type, side, codes, d, level);
    const uint16_t *scales = half + kvm_page_layout_of(type, side, d, false).scales / 2;
    for (int32_t c = 0; c < d; c++) {
        const uint16_t *scale = scales + c / kvm_group_of(d) * KVM_PAGE;
        for (int32_t p = 0; p < KVM_PAGE; p++) {
            float value = kvm_f16_to_f32(scale[p]) * level[c * KVM_PAGE + p];
            out[side == KVM_SIDE_K ? c * KVM_PAGE + p : p * d + c] = value;
        }
    }
}

void kvm_roundtrip(kvm_kvtype type, kvm_side side, float *x, int32_t d, int32_t first, int32_t n_valid,
                   const uint16_t *q_rms) {
    uint8_t codes[KVM_HEAD_DIM_MAX * KVM_PAGE];
    uint16_t scales[KVM_HEAD_DIM_MAX / KVM_GROUP * KVM_PAGE], mean[KVM_HEAD_DIM_MAX], balance[KVM_HEAD_DIM_MAX];
    int8_t level[KVM_HEAD_DIM_MAX * KVM_PAGE];
    int32_t block = kvm_hadamard_block(d, side);
    if (side == KVM_SIDE_K) {
        kvm_precondition_k(x, d, first, n_valid, q_rms, NULL, mean, balance);
    } else {
        for (int32_t i = 0; i < d * KVM_PAGE; i++) x[i] = i % KVM_PAGE >= first && i % KVM_PAGE < n_valid ? x[i] : 0.0f;
        kvm_hadamard(x, d, KVM_PAGE, block);
    }
    kvm_encode(type, side, x, d, codes, scales);
    kvm_levels_of(type, side, codes, d, level);
    for (int32_t i = 0; i < d * KVM_PAGE; i++) {
        int32_t group = i / KVM_PAGE / kvm_group_of(d);
        x[i] = kvm_f16_to_f32(scales[group * KVM_PAGE + i % KVM_PAGE]) * level[i];
    }
    kvm_hadamard(x, d, KVM_PAGE, block);
    for (int32_t i = 0; i < d * KVM_PAGE; i++) {
        int32_t c = i / KVM_PAGE;
        bool inside = i % KVM_PAGE >= first && i % KVM_PAGE < n_valid;
        if (!inside) x[i] = 0;
        else if (side == KVM_SIDE_K) x[i] = x[i] * kvm_f16_to_f32(balance[c]) + kvm_f16_to_f32(mean[c]);
    }
}
