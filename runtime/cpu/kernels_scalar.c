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
        out.sum[2 * b] = scale * (float)sum[0];
        out.sum[2 * b + 1] = scale * (float)sum[1];
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

static void load_f16(const uint16_t *src, int32_t n, float *dst) {
    for (int32_t i = 0; i < n; i++) dst[i] = kvm_f16_to_f32(src[i]);
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
    .matmul_q8 = matmul_q8, .load_packed = kvm_decode_page, .encode = kvm_encode,
    .hadamard = kvm_hadamard, .load_f16 = load_f16, .softmax_step = softmax_step,
    .silu_mul = silu_mul, .gelu_mul = gelu_mul};
