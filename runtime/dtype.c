/* dtype.c - the rows of the weight formats and their decoders.
 *
 * Invariants
 * 1. A decoder does the operations of gguf-py's quants.dequantize in the same order in f32, so the results are the
 *    same bits. That needs a build without contraction into FMA (-ffp-contract=off).
 * 2. Blocks may lie at any address: every multi-byte field is loaded by memcpy.
 *
 * In the diagrams a field is `name type[count]`, fields follow each other without padding, numbers are little-endian.
 */
#include "dtype.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "fields of blocks are loaded as they lie");

static inline float load_f16(const uint8_t *src) {
    uint16_t half;
    memcpy(&half, src, sizeof half);
    return kvm_f16_to_f32(half);
}

/* ---- plain numbers ----------------------------------------------------------------------------------------- */

static void decode_F32(const void *src, float *dst, int64_t n) { memcpy(dst, src, (size_t)n * sizeof *dst); }

static void decode_F16(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t i = 0; i < n; i++) dst[i] = load_f16(in + 2 * i);
}

static void decode_BF16(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, in + 2 * i, sizeof half);
        dst[i] = kvm_bf16_to_f32(half);
    }
}

/* ---- blocks of 32: one scale, with or without a minimum, 4 or 5 bits a code --------------------------------- */

/* Q4_0 18 bytes:  d f16 |       |           qs u8[16]      x[i] = d * (q[i] - 8)
 * Q4_1 20 bytes:  d f16 | m f16 |           qs u8[16]      x[i] = d * q[i] + m
 * Q5_0 22 bytes:  d f16 |       | qh u32 |  qs u8[16]      x[i] = d * (q[i] - 16)
 * Q5_1 24 bytes:  d f16 | m f16 | qh u32 |  qs u8[16]      x[i] = d * q[i] + m
 *
 * q[i] has its low four bits in the low nibble of qs[i] for i < 16, in the high nibble of qs[i - 16] from 16 on;
 * its fifth bit is bit i of qh. */
static inline void decode_blocks_of_32(const uint8_t *src, float *dst, int64_t n, bool has_min, bool has_fifth_bit) {
    for (int64_t done = 0; done < n; done += 32, dst += 32) {
        float d = load_f16(src), m = 0.0f;
        uint32_t qh = 0;
        src += 2;
        if (has_min) {
            m = load_f16(src);
            src += 2;
        }
        if (has_fifth_bit) {
            memcpy(&qh, src, sizeof qh);
            src += 4;
        }
        int32_t zero = has_min ? 0 : has_fifth_bit ? 16 : 8;
        for (int32_t i = 0; i < 16; i++) {
            int32_t low = (src[i] & 15) | (int32_t)(((qh >> i) & 1u) << 4);
            int32_t high = (src[i] >> 4) | (int32_t)(((qh >> (i + 16)) & 1u) << 4);
            dst[i] = d * (float)(low - zero);
            dst[i + 16] = d * (float)(high - zero);
        }
        /* apart from the product: adding a zero would turn -0 into +0 */
        for (int32_t i = 0; has_min && i < 32; i++) dst[i] += m;
        src += 16;
    }
}

static void decode_Q4_0(const void *src, float *dst, int64_t n) { decode_blocks_of_32(src, dst, n, false, false); }
static void decode_Q4_1(const void *src, float *dst, int64_t n) { decode_blocks_of_32(src, dst, n, true, false); }
static void decode_Q5_0(const void *src, float *dst, int64_t n) { decode_blocks_of_32(src, dst, n, false, true); }
static void decode_Q5_1(const void *src, float *dst, int64_t n) { decode_blocks_of_32(src, dst, n, true, true); }

/* Q8_0 34 bytes:  d f16 | q i8[32]      x[i] = q[i] * d */
static void decode_Q8_0(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 32, dst += 32, in += 34) {
        float d = load_f16(in);
        const int8_t *q = (const int8_t *)(in + 2);
        for (int32_t i = 0; i < 32; i++) dst[i] = (float)q[i] * d;
    }
}

/* ---- super-blocks of 256: the K formats --------------------------------------------------------------------- */

/* The 6-bit scale and minimum of group g of 8, out of 12 bytes:
 *
 *   byte g     (g < 4)   | scale[g + 4] bits 4-5 | scale[g] bits 0-5 |
 *   byte g + 4 (g < 4)   | min[g + 4]   bits 4-5 | min[g]   bits 0-5 |
 *   byte g + 4 (g >= 4)  | min[g] bits 0-3 | scale[g] bits 0-3 |            high bits left */
static inline void unpack_scale_min(const uint8_t *packed, int32_t g, int32_t *scale, int32_t *min) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *min = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | ((packed[g - 4] >> 6) << 4);
        *min = (packed[g + 4] >> 4) | ((packed[g] >> 6) << 4);
    }
}

/* Q4_K 144 bytes:  d f16 | dmin f16 | scales u8[12] |             qs u8[128]
 * Q5_K 176 bytes:  d f16 | dmin f16 | scales u8[12] | qh u8[32] | qs u8[128]
 *
 * 8 groups of 32: x[32 g + i] = (d * scale[g]) * q - dmin * min[g]. The low four bits of q are in byte
 * 32 (g / 2) + i of qs, low nibble for even g, high for odd; its fifth bit is bit g of qh[i]. */
static inline void decode_scale_min_k(const uint8_t *src, float *dst, int64_t n, bool has_fifth_bit) {
    for (int64_t done = 0; done < n; done += 256) {
        float d = load_f16(src), dmin = load_f16(src + 2);
        const uint8_t *scales = src + 4, *qh = src + 16, *qs = has_fifth_bit ? qh + 32 : qh;
        for (int32_t g = 0; g < 8; g++, dst += 32) {
            int32_t scale, min;
            unpack_scale_min(scales, g, &scale, &min);
            float step = d * (float)scale, base = dmin * (float)min;
            const uint8_t *nibbles = qs + 32 * (g / 2);
            int32_t shift = 4 * (g % 2);
            for (int32_t i = 0; i < 32; i++) {
                int32_t q = (nibbles[i] >> shift) & 15;
                if (has_fifth_bit) q |= ((qh[i] >> g) & 1) << 4;
                dst[i] = step * (float)q - base;
            }
        }
        src = qs + 128;
    }
}

static void decode_Q4_K(const void *src, float *dst, int64_t n) { decode_scale_min_k(src, dst, n, false); }
static void decode_Q5_K(const void *src, float *dst, int64_t n) { decode_scale_min_k(src, dst, n, true); }

/* Q6_K 210 bytes:  ql u8[128] | qh u8[64] | scales i8[16] | d f16
 *
 * 8 groups of 32, four in each half h = g / 4; t = g % 4:
 * x[32 g + i] = (d * scales[2 g + i / 16]) * (q - 32). The low four bits of q are in ql[64 h + 32 (t % 2) + i], low
 * nibble for t < 2, high for t >= 2; its two high bits are bits 2t and 2t + 1 of qh[32 h + i]. */
static void decode_Q6_K(const void *src, float *dst, int64_t n) {
    const uint8_t *ql = src;
    for (int64_t done = 0; done < n; done += 256, ql += 210) {
        const uint8_t *qh = ql + 128;
        const int8_t *scales = (const int8_t *)(ql + 192);
        float d = load_f16(ql + 208);
        for (int32_t g = 0; g < 8; g++, dst += 32) {
            int32_t half = g / 4, t = g % 4;
            const uint8_t *low = ql + 64 * half + 32 * (t % 2), *high = qh + 32 * half;
            float step[2] = {d * (float)scales[2 * g], d * (float)scales[2 * g + 1]};
            for (int32_t i = 0; i < 32; i++) {
                int32_t q = ((low[i] >> (4 * (t / 2))) & 15) | (((high[i] >> (2 * t)) & 3) << 4);
                dst[i] = step[i / 16] * (float)(q - 32);
            }
        }
    }
}

/* ---- the table --------------------------------------------------------------------------------------------- */

const kvm_dtype_info kvm_dtypes[KVM_DTYPE_COUNT] = {
#define X(id, name, gguf, values, bytes) {name, gguf, values, bytes, decode_##id},
    KVM_DTYPE_LIST(X)
#undef X
};

/* ggml's names of the types without a row, to say what a file holds */
static const char *const ggml_names[] = {
    [9] = "Q8_1",     [10] = "Q2_K",  [11] = "Q3_K",   [15] = "Q8_K",  [16] = "IQ2_XXS", [17] = "IQ2_XS",
    [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S", [22] = "IQ2_S",   [23] = "IQ4_XS",
    [24] = "I8",      [25] = "I16",   [26] = "I32",    [27] = "I64",   [28] = "F64",     [29] = "IQ1_M",
    [34] = "TQ1_0",   [35] = "TQ2_0", [39] = "MXFP4",  [40] = "NVFP4", [41] = "Q1_0",
};

bool kvm_dtype_from_gguf(uint32_t gguf_id, kvm_dtype *out, const char **name) {
    for (int32_t type = 0; type < KVM_DTYPE_COUNT; type++) {
        if (kvm_dtypes[type].gguf_id == gguf_id) {
            *out = (kvm_dtype)type;
            *name = kvm_dtypes[type].name;
            return true;
        }
    }
    *name = gguf_id < sizeof ggml_names / sizeof *ggml_names ? ggml_names[gguf_id] : NULL;
    return false;
}
