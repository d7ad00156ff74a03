/* kernels_scalar.c - the kernel table in plain C: what every faster table is tested against, and what runs on a CPU
 * without one. */
#include "kernels.h"

static bool supported(void) { return true; }

static void gemm_f32(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const float *b, int32_t ldb, float *c,
                     int32_t ldc) {
    for (int32_t i = 0; i < m; i++) {
        float *row = c + (size_t)i * (size_t)ldc;
        for (int32_t l = 0; l < k; l++) {
            float x = a[(size_t)i * (size_t)lda + (size_t)l];
            const float *y = b + (size_t)l * (size_t)ldb;
            for (int32_t j = 0; j < n; j++) row[j] += x * y[j];
        }
    }
}

static void quantize_q8(const float *x, int32_t n, kvm_q8_row out) {
    for (int32_t b = 0; b < n / KVM_Q8_BLOCK; b++) {
        const float *block = x + b * KVM_Q8_BLOCK;
        float amax = 0;
        bool not_number = false;
        for (int32_t i = 0; i < KVM_Q8_BLOCK; i++) {
            amax = fabsf(block[i]) > amax ? fabsf(block[i]) : amax;
            not_number |= isnan(block[i]);
        }
        float scale = not_number ? NAN : amax / 127.0f, inv = amax > 0 ? 127.0f / amax : 0;
        int32_t sum[2] = {0, 0};
        for (int32_t i = 0; i < KVM_Q8_BLOCK; i++) {
            float rounded = (block[i] * inv + 12582912.0f) - 12582912.0f; /* 1.5 x 2^23: to nearest even */
            int8_t q = (int8_t)(rounded > -128.0f && rounded < 128.0f ? rounded : 0); /* the scale keeps inf */
            out.q[b * KVM_Q8_BLOCK + i] = q;
            sum[i / 16] += q;
        }
        out.scale[b] = scale;
        out.sum[b] = scale * (float)(sum[0] + sum[1]);
        out.sum16[b] = scale * (float)sum[0];
    }
}

/* One block of weights at a time against the block's activations as they are after quantization, in f32. */
static void matmul_q8(const kvm_matrix *w, int32_t first, int32_t last, const kvm_q8_row *x, int32_t n_rows, float *y,
                      int32_t ldy) {
    const kvm_dtype_info *info = &kvm_dtypes[w->type];
    size_t row_bytes = kvm_dtype_row_bytes(w->type, w->n_in);
    float weights[256];
    for (int32_t o = first; o < last; o++) {
        const uint8_t *row = (const uint8_t *)w->data + (size_t)o * row_bytes;
        for (int32_t r = 0; r < n_rows; r++) y[(size_t)r * (size_t)ldy + (size_t)o] = 0;
        for (int32_t i = 0; i < w->n_in; i += info->block_values, row += info->block_bytes) {
            info->decode(row, weights, info->block_values);
            for (int32_t r = 0; r < n_rows; r++) {
                float sum = 0;
                for (int32_t j = 0; j < info->block_values; j++) {
                    int32_t at = i + j;
                    sum += weights[j] * (x[r].scale[at / KVM_Q8_BLOCK] * x[r].q[at]);
                }
                y[(size_t)r * (size_t)ldy + (size_t)o] += sum;
            }
        }
    }
}

static void load_weights(const kvm_matrix *w, int32_t first, int32_t last, int32_t i, float *out) {
    int32_t n = kvm_min(KVM_TILE_IN, w->n_in - i);
    float decoded[KVM_TILE_IN];
    for (int32_t o = first; o < last; o++, out++) {
        const uint8_t *row = (const uint8_t *)w->data + (size_t)o * kvm_dtype_row_bytes(w->type, w->n_in);
        kvm_dtypes[w->type].decode(row + kvm_dtype_row_bytes(w->type, i), decoded, n);
        for (int32_t l = 0; l < n; l++) out[l * KVM_TILE_OUT] = decoded[l];
    }
}

static void load_f16(const uint16_t *src, int32_t n, float *dst) {
    for (int32_t i = 0; i < n; i++) dst[i] = kvm_f16_to_f32(src[i]);
}

static void gemm_f16(int32_t m, int32_t n, int32_t k, const float *a, int32_t lda, const uint16_t *b, int32_t ldb,
                     float *c, int32_t ldc, ptrdiff_t ahead) {
    (void)ahead;
    for (int32_t l = 0; l < k; l++) {
        float row[KVM_PAGE];
        for (int32_t j = 0; j < n; j += KVM_PAGE) {
            int32_t width = kvm_min(n - j, KVM_PAGE);
            load_f16(b + l * ldb + j, width, row);
            gemm_f32(m, width, 1, a + l, lda, row, KVM_PAGE, c + j, ldc);
        }
    }
}

static void score_packed(kvm_kvtype type, const uint8_t *codes, const uint16_t *scales, int32_t d, int32_t m,
                         kvm_q8_queries q, const float *start, float *score, ptrdiff_t ahead) {
    (void)ahead;
    int32_t group = kvm_group_of(d), n_groups = d / group;
    uint8_t plain[KVM_HEAD_DIM_MAX * KVM_PAGE]; /* [d][128] */
    int8_t level[KVM_HEAD_DIM_MAX * KVM_PAGE];
    kvm_planes_unpack(type, KVM_SIDE_K, codes, d, plain);
    kvm_levels_of(type, KVM_SIDE_K, plain, d, level);
    for (int32_t i = 0; i < m * KVM_PAGE; i++) score[i] = start[i / KVM_PAGE];
    for (int32_t i = 0; i < m * n_groups; i++) {
        int32_t row = i / n_groups, g = i % n_groups, dot[KVM_PAGE] = {0};
        for (int32_t c = g * group; c < (g + 1) * group; c++) {
            for (int32_t p = 0; p < KVM_PAGE; p++) dot[p] += q.q[row * d + c] * level[c * KVM_PAGE + p];
        }
        for (int32_t p = 0; p < KVM_PAGE; p++) {
            score[row * KVM_PAGE + p] += (float)dot[p] * (kvm_f16_to_f32(scales[g * KVM_PAGE + p]) * q.scale[i]);
        }
    }
}

static void quantize_weights(const float *p, const uint16_t *scales, int32_t n_groups, int32_t m, kvm_u8_weights out) {
    for (int32_t at = 0; at < m * n_groups * KVM_PAGE; at += KVM_WEIGHT_BLOCK) {
        int32_t row = at / KVM_PAGE / n_groups, g = at / KVM_PAGE % n_groups, first = at % KVM_PAGE;
        float weight[KVM_WEIGHT_BLOCK], max = 0;
        for (int32_t i = 0; i < KVM_WEIGHT_BLOCK; i++) {
            weight[i] = p[row * KVM_PAGE + first + i] * kvm_f16_to_f32(scales[g * KVM_PAGE + first + i]);
            max = weight[i] > max ? weight[i] : max;
        }
        float inv = max > 0 ? 255.0f / max : 0.0f;
        for (int32_t i = 0; i < KVM_WEIGHT_BLOCK; i++) {
            float rounded = (weight[i] * inv + 12582912.0f) - 12582912.0f; /* 1.5 x 2^23: to nearest even */
            out.w[at + i] = (uint8_t)(rounded >= 0 && rounded < 256 ? rounded : 0); /* NaN: it is in the sum of p */
        }
        out.scale[at / KVM_WEIGHT_BLOCK] = max / 255.0f;
    }
}

static void mix_packed(kvm_kvtype type, const uint8_t *codes, int32_t d, int32_t m, kvm_u8_weights w, float *acc,
                       ptrdiff_t ahead) {
    (void)ahead;
    int32_t group = kvm_group_of(d), n_groups = d / group;
    uint8_t plain[KVM_HEAD_DIM_MAX * KVM_PAGE]; /* [d][128] */
    int8_t level[KVM_HEAD_DIM_MAX * KVM_PAGE];
    kvm_planes_unpack(type, KVM_SIDE_V, codes, d, plain);
    kvm_levels_of(type, KVM_SIDE_V, plain, d, level);
    for (int32_t i = 0; i < m * d; i++) {
        int32_t c = i % d, from = (i / d * n_groups + c / group) * KVM_PAGE; /* of its row and group's weights */
        for (int32_t first = 0; first < KVM_PAGE; first += KVM_WEIGHT_BLOCK) {
            int32_t dot = 0;
            for (int32_t p = first; p < first + KVM_WEIGHT_BLOCK; p++) dot += w.w[from + p] * level[c * KVM_PAGE + p];
            acc[i] += (float)dot * w.scale[(from + first) / KVM_WEIGHT_BLOCK];
        }
    }
}

static float softmax_step(float *score, float *m, float *l) {
    float top = *m;
    for (int32_t p = 0; p < KVM_PAGE; p++) top = score[p] > top ? score[p] : top;
    float factor = expf(*m - top), sum = 0;
    for (int32_t p = 0; p < KVM_PAGE; p++) {
        score[p] = expf(score[p] - top);
        sum += score[p];
    }
    *m = top;
    *l = *l * factor + sum;
    return factor;
}

static void silu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

static void gelu_mul(float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        float x = gate[i], z = KVM_GELU_LINEAR * x * (1.0f + KVM_GELU_CUBIC * (x * x));
        gate[i] = x / (1.0f + expf(-z)) * up[i];
    }
}

const kvm_cpu_kernels kvm_kernels_scalar = {
    .name = "scalar", .supported = supported, .gemm_f32 = gemm_f32, .quantize_q8 = quantize_q8,
    .matmul_q8 = matmul_q8, .load_weights = load_weights, .load_packed = kvm_decode_page, .encode = kvm_encode,
    .hadamard = kvm_hadamard, .load_f16 = load_f16, .gemm_f16 = gemm_f16, .score_packed = score_packed,
    .quantize_weights = quantize_weights, .mix_packed = mix_packed, .softmax_step = softmax_step,
    .silu_mul = silu_mul, .gelu_mul = gelu_mul};
