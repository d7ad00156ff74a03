/* dtype.c - the rows of the weight formats and their decoders.
 *
 * Invariants
 * 1. A decoder does the operations of gguf-py's quants.dequantize in the same order in f32, or all of them are exact:
 *    the results are the same bits. That needs a build without contraction into FMA (-ffp-contract=off).
 * 2. Blocks may lie at any address: every multi-byte field is loaded by memcpy.
 *
 * In the diagrams a field is `name type[count]`, fields follow each other without padding, numbers are little-endian.
 */
#include "dtype.h"

#include "iq_tables.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "fields of blocks are loaded as they lie");

static inline uint32_t load_u16(const uint8_t *src) {
    uint16_t value;
    memcpy(&value, src, sizeof value);
    return value;
}

static inline uint32_t load_u32(const uint8_t *src) {
    uint32_t value;
    memcpy(&value, src, sizeof value);
    return value;
}

static inline float load_f16(const uint8_t *src) { return kvm_f16_to_f32((uint16_t)load_u16(src)); }

/* n bits of v from bit `at` on; nibble i of bytes, the low one of a byte first */
static inline uint32_t bits(uint32_t v, int32_t at, int32_t n) { return (v >> at) & ((1u << n) - 1); }
static inline uint32_t nibble(const uint8_t *src, int32_t i) { return bits(src[i / 2], i % 2 * 4, 4); }

/* ---- plain numbers ----------------------------------------------------------------------------------------- */

static void decode_F32(const void *src, float *dst, int64_t n) { memcpy(dst, src, (size_t)n * sizeof *dst); }

static void decode_F16(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t i = 0; i < n; i++) dst[i] = load_f16(in + 2 * i);
}

static void decode_BF16(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t i = 0; i < n; i++) dst[i] = kvm_bf16_to_f32((uint16_t)load_u16(in + 2 * i));
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
            qh = load_u32(src);
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

/* IQ4_NL 18 bytes:  d f16 | qs u8[16]      x[i] = d * kvm_levels_iq4[q[i]]
 * MXFP4  17 bytes:  e u8  | qs u8[16]      x[i] = 2^(e - 128) * kvm_levels_mxfp4[q[i]]
 *
 * q[i] is the low nibble of qs[i] for i < 16, the high nibble of qs[i - 16] from 16 on. */
static inline void decode_levels(const uint8_t *qs, float *dst, float d, const int8_t levels[16]) {
    for (int32_t i = 0; i < 16; i++) {
        dst[i] = d * (float)levels[qs[i] & 15];
        dst[i + 16] = d * (float)levels[qs[i] >> 4];
    }
}

static void decode_IQ4_NL(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 32, dst += 32, in += 18) {
        decode_levels(in + 2, dst, load_f16(in), kvm_levels_iq4);
    }
}

static void decode_MXFP4(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 32, dst += 32, in += 17) {
        decode_levels(in + 1, dst, ldexpf(1.0f, in[0] - 128), kvm_levels_mxfp4);
    }
}

/* ---- super-blocks of 256: the K formats --------------------------------------------------------------------- */

/* Q2_K 84 bytes:  scales u8[16] | qs u8[64] | d f16 | dmin f16
 *
 * 16 groups of 16: x[16 g + i] = (d * low nibble of scales[g]) * q - dmin * high nibble. Of 128 values, value
 * 32 t + j has its q in bits 2t and 2t + 1 of qs[j]; the second 128 have the second 32 bytes. */
static void decode_Q2_K(const void *src, float *dst, int64_t n) {
    const uint8_t *scales = src;
    for (int64_t done = 0; done < n; done += 256, scales += 84) {
        float d = load_f16(scales + 80), dmin = load_f16(scales + 82);
        for (int32_t g = 0; g < 16; g++, dst += 16) {
            float step = d * (float)(scales[g] & 15), base = dmin * (float)(scales[g] >> 4);
            const uint8_t *qs = scales + 16 + 32 * (g / 8) + 16 * (g % 2);
            for (int32_t i = 0; i < 16; i++) dst[i] = step * (float)((qs[i] >> (g % 8 / 2 * 2)) & 3) - base;
        }
    }
}

/* Q3_K 110 bytes:  hmask u8[32] | qs u8[64] | scales u8[12] | d f16
 *
 * 16 groups of 16: x[16 g + i] = (d * (scale[g] - 32)) * (q - 4). The low two bits of q lie as Q2_K's; its third is,
 * for value 32 t + j, bit t of hmask[j]. scale[g] has its low four bits in the low nibble of scales[g] for g < 8, in
 * the high nibble of scales[g - 8] from 8 on; its two high bits are bits 2(g / 4) and up of scales[8 + g % 4]. */
static void decode_Q3_K(const void *src, float *dst, int64_t n) {
    const uint8_t *hmask = src;
    for (int64_t done = 0; done < n; done += 256, hmask += 110) {
        const uint8_t *scales = hmask + 96;
        float d = load_f16(hmask + 108);
        for (int32_t g = 0; g < 16; g++, dst += 16) {
            int32_t low = (scales[g % 8] >> (g / 8 * 4)) & 15, high = (scales[8 + g % 4] >> (g / 4 * 2)) & 3;
            float step = d * (float)((low | high << 4) - 32);
            const uint8_t *qs = hmask + 32 + 32 * (g / 8) + 16 * (g % 2), *third = hmask + 16 * (g % 2);
            for (int32_t i = 0; i < 16; i++) {
                int32_t q = ((qs[i] >> (g % 8 / 2 * 2)) & 3) | ((third[i] >> (g / 2)) & 1) << 2;
                dst[i] = step * (float)(q - 4);
            }
        }
    }
}

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

/* IQ4_XS 136 bytes:  d f16 | scales_h u16 | scales_l u8[4] | qs u8[128]
 *
 * 8 groups of 32, the qs of each as in IQ4_NL: x[i] = (d * (scale - 32)) * kvm_levels_iq4[q]. The low four bits of
 * scale g are nibble g of scales_l, the low one first; its two high bits are bits 2g and 2g + 1 of scales_h. */
static void decode_IQ4_XS(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 136) {
        float d = load_f16(in);
        for (int32_t g = 0; g < 8; g++, dst += 32) {
            int32_t scale = (int32_t)(nibble(in + 4, g) | bits(load_u16(in + 2), 2 * g, 2) << 4);
            decode_levels(in + 8 + 16 * g, dst, d * (float)(scale - 32), kvm_levels_iq4);
        }
    }
}

/* ---- super-blocks of 256: the grids of iq_tables.h ---------------------------------------------------------- */

/* A block is 8 groups of 32 values: four entries of a grid of eights, or eight of a grid of fours. An entry has its
 * number in the grid, of which the low byte is in qs; a flag for each value, bit 3 of its index; and a scale that it
 * shares: x = step * levels[index]. Where flags have seven bits, an eighth makes the number of those set even. */
static inline void decode_entry(uint32_t entry, uint32_t flags, int32_t n, const int8_t levels[16], float step,
                                float *dst) {
    for (int32_t i = 0; i < n; i++) {
        uint32_t index = bits(entry, 8 * (i % 4) + 4 * (i / 4), 3) | bits(flags, i, 1) << 3;
        dst[i] = step * (float)levels[index];
    }
}

static inline uint32_t even_flags(uint32_t seven) { return seven | (uint32_t)__builtin_parity(seven) << 7; }

/* IQ2_XXS 66 bytes:  d f16 | 8 of (qs u8[4] | word u32)
 *
 * The flags of entry k are bits 7k to 7k + 6 of the word; step = (d * (0.5 + bits 28-31)) / 4. */
static void decode_IQ2_XXS(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 66) {
        float d = load_f16(in);
        for (int32_t g = 0; g < 8; g++) {
            const uint8_t *qs = in + 2 + 8 * g;
            uint32_t word = load_u32(qs + 4);
            float step = d * (0.5f + (float)(word >> 28)) * 0.25f;
            for (int32_t k = 0; k < 4; k++, dst += 8) {
                decode_entry(kvm_grid_iq2_xxs[qs[k]], even_flags(bits(word, 7 * k, 7)), 8, kvm_levels_iq2, step, dst);
            }
        }
    }
}

/* IQ2_XS 74 bytes:  d f16 | qs u16[32] | scales u8[8]
 *
 * Bits 0-8 of qs are the number, bits 9-15 the flags. Nibble h of scales[g], the low one first, is for half h of group
 * g: step = (d * (0.5 + nibble)) / 4. */
static void decode_IQ2_XS(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 74) {
        float d = load_f16(in);
        for (int32_t k = 0; k < 32; k++, dst += 8) {
            uint32_t q = load_u16(in + 2 + 2 * k);
            float step = d * (0.5f + (float)nibble(in + 66, k / 2)) * 0.25f;
            decode_entry(kvm_grid_iq2_xs[bits(q, 0, 9)], even_flags(bits(q, 9, 7)), 8, kvm_levels_iq2, step, dst);
        }
    }
}

/* IQ2_S 82 bytes:  d f16 | qs u8[32] | flags u8[32] | qh u8[8] | scales u8[8]
 *
 * Bits 8 and 9 of the number of entry k of group g are bits 2k and 2k + 1 of qh[g]; the scales are IQ2_XS's. */
static void decode_IQ2_S(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 82) {
        float d = load_f16(in);
        for (int32_t k = 0; k < 32; k++, dst += 8) {
            uint32_t number = in[2 + k] | bits(in[66 + k / 4], k % 4 * 2, 2) << 8;
            float step = d * (0.5f + (float)nibble(in + 74, k / 2)) * 0.25f;
            decode_entry(kvm_grid_iq2_s[number], in[34 + k], 8, kvm_levels_iq2, step, dst);
        }
    }
}

/* IQ3_XXS 98 bytes:  d f16 | qs u8[64] | words u32[8]
 *
 * The flags of entries 2k and 2k + 1 of group g are bits 7k to 7k + 6 of words[g];
 * step = (d * (0.5 + bits 28-31)) / 2. */
static void decode_IQ3_XXS(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 98) {
        float d = load_f16(in);
        for (int32_t k = 0; k < 64; k++, dst += 4) {
            uint32_t word = load_u32(in + 66 + 4 * (k / 8)), flags = even_flags(bits(word, k % 8 / 2 * 7, 7));
            float step = d * (0.5f + (float)(word >> 28)) * 0.5f;
            decode_entry(kvm_grid_iq3_xxs[in[2 + k]], flags >> (k % 2 * 4), 4, kvm_levels_iq3_xxs, step, dst);
        }
    }
}

/* IQ3_S 110 bytes:  d f16 | qs u8[64] | qh u8[8] | flags u8[32] | scales u8[4]
 *
 * Bit 8 of the number of entry k of group g is bit k of qh[g]; step = d * (1 + 2 * nibble g of scales). */
static void decode_IQ3_S(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 110) {
        float d = load_f16(in);
        for (int32_t k = 0; k < 64; k++, dst += 4) {
            uint32_t number = in[2 + k] | bits(in[66 + k / 8], k % 8, 1) << 8;
            float step = d * (float)(1 + 2 * nibble(in + 106, k / 8));
            decode_entry(kvm_grid_iq3_s[number], nibble(in + 74, k), 4, kvm_levels_iq3_s, step, dst);
        }
    }
}

/* IQ1_S 50 bytes:  d f16 | qs u8[32] | qh u16[8]
 *
 * Bits 8-10 of the number of entry k of group g are bits 3k to 3k + 2 of qh[g]; bit 15 of qh[g] is the flag of all 32
 * values; step = (d * (1 + 2 * bits 12-14)) / 8. */
static void decode_IQ1_S(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 50) {
        float d = load_f16(in);
        for (int32_t k = 0; k < 32; k++, dst += 8) {
            uint32_t qh = load_u16(in + 34 + 2 * (k / 4)), number = in[2 + k] | bits(qh, k % 4 * 3, 3) << 8;
            float step = d * (float)(1 + 2 * bits(qh, 12, 3)) * 0.125f;
            decode_entry(kvm_grid_iq1_s[number], bits(qh, 15, 1) * 255, 8, kvm_levels_iq1, step, dst);
        }
    }
}

/* IQ1_M 56 bytes:  qs u8[32] | qh u8[16] | scales u16[4]
 *
 * Nibble k of qh, the low one first, has bits 8-10 of entry k's number and the flag of its values. Bits 12-15 of the
 * four scales are d, an f16, the low bits first; bits 3i to 3i + 2 of scales[j] are for the 16 values of half 4j + i:
 * step = (d * (1 + 2 * bits)) / 8. */
static void decode_IQ1_M(const void *src, float *dst, int64_t n) {
    const uint8_t *in = src;
    for (int64_t done = 0; done < n; done += 256, in += 56) {
        uint32_t half = 0;
        for (int32_t j = 0; j < 4; j++) half |= load_u16(in + 48 + 2 * j) >> 12 << (4 * j);
        float d = kvm_f16_to_f32((uint16_t)half);
        for (int32_t k = 0; k < 32; k++, dst += 8) {
            uint32_t qh = nibble(in + 32, k), scales = load_u16(in + 48 + 2 * (k / 8));
            float step = d * (float)(1 + 2 * bits(scales, k / 2 % 4 * 3, 3)) * 0.125f;
            uint32_t entry = kvm_grid_iq1_s[in[k] | bits(qh, 0, 3) << 8];
            decode_entry(entry, bits(qh, 3, 1) * 255, 8, kvm_levels_iq1, step, dst);
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
    [9] = "Q8_1", [15] = "Q8_K",  [24] = "I8",    [25] = "I16",   [26] = "I32",  [27] = "I64",
    [28] = "F64", [34] = "TQ1_0", [35] = "TQ2_0", [40] = "NVFP4", [41] = "Q1_0",
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
