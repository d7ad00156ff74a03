/* matmul_formats.h - the part of matmul_tiles.h that makes tiles of each format's blocks; dtype.c draws their bytes.
 *
 * Rows of packed bytes are transposed first and unpacked afterwards, since packed bytes are fewer. Loads stay inside
 * the block. Codes are levels plus the format's zero, so that the product gets unsigned ones.
 */
#ifndef KVM_CPU_MATMUL_FORMATS_H
#define KVM_CPU_MATMUL_FORMATS_H

#include "../iq_tables.h"

/* what the levels of a table get added */
enum { ZERO_IQ1 = 9, ZERO_IQ2 = 43, ZERO_IQ3_XXS = 62, ZERO_IQ3_S = 15, ZERO_IQ4 = ZERO_8BIT, ZERO_MXFP4 = 12 };

/* ---- blocks of 32 ------------------------------------------------------------------------------------------- */

/* 16 bytes of nibbles: the low ones are weights 0..15, the high ones 16..31 */
INLINE void fill_nibbles(const rows *from, size_t at, tile *out) {
    lanes packed[4];
    load_transposed(from, at, packed);
    for (int32_t g = 0; g < 4; g++) {
        out->code[g] = low_nibbles(packed[g]);
        out->code[g + 4] = high_nibbles(packed[g]);
    }
}

INLINE void add_fifth_bits(lanes v, tile *out) {
#pragma GCC unroll 8
    for (int32_t g = 0; g < 8; g++) out->code[g] |= spread_bits(v, g, 4);
}

INLINE void fill_Q4_0(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    fill_nibbles(from, at + 2, out);
}

INLINE void fill_Q4_1(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    out->base[0] = halves(head[0] >> 16);
    fill_nibbles(from, at + 4, out);
}

INLINE void fill_Q5_0(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    fill_nibbles(from, at + 6, out);
    add_fifth_bits(head[0] >> 16 | head[1] << 16, out);
}

INLINE void fill_Q5_1(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    out->base[0] = halves(head[0] >> 16);
    fill_nibbles(from, at + 8, out);
    add_fifth_bits(head[1], out);
}

INLINE void fill_Q8_0(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    load_transposed_32(from, at + 2, out->code);
    for (int32_t g = 0; g < 8; g++) out->code[g] ^= in_each_byte(ZERO_8BIT);
}

/* the table of codes that belong to 16 levels */
INLINE lanes codes_of(const int8_t levels[16], int32_t zero) {
    return (lanes)((bytes)repeated(levels) + (uint8_t)zero);
}

INLINE void fill_levels(const rows *from, size_t at, lanes codes, tile *out) {
    fill_nibbles(from, at, out);
    for (int32_t g = 0; g < 8; g++) out->code[g] = look_up(codes, out->code[g]);
}

INLINE void fill_IQ4_NL(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    out->scale[0] = halves(head[0]);
    fill_levels(from, at + 2, codes_of(kvm_levels_iq4, ZERO_IQ4), out);
}

INLINE void fill_MXFP4(const rows *from, size_t at, tile *out) {
    lanes head[4];
    load_transposed(from, at, head);
    lanes e = bits(head[0], 0, 8), is_normal = (lanes)(e > 1); /* of 2^(e - 128) */
    out->scale[0] = (floats)(((e - 1) << 23 & is_normal) | (1u << 21 << e & ~is_normal));
    fill_levels(from, at + 1, codes_of(kvm_levels_mxfp4, ZERO_MXFP4), out);
}

/* ---- the K formats ------------------------------------------------------------------------------------------ */

/* of two bits: 32 bytes for each four tiles */
INLINE void fill_k_pairs(const rows *from, size_t at, tile out[8]) {
    for (int32_t t = 0; t < 8; t += 4) {
        lanes packed[8];
        load_transposed_32(from, at + 8 * (size_t)t, packed);
        for (int32_t g = 0; g < 8; g++) {
            for (int32_t s = 0; s < 4; s++) out[t + s].code[g] = packed[g] >> (uint32_t)(2 * s) & in_each_byte(3);
        }
    }
}

INLINE void fill_Q2_K(const rows *from, size_t at, tile out[8]) {
    lanes scales[4], tail[4];
    load_transposed(from, at, scales);
    load_transposed(from, at + 68, tail);
    fill_k_pairs(from, at + 16, out);
    floats d = halves(tail[3]), minus_dmin = -halves(tail[3] >> 16);
    for (int32_t s = 0; s < 16; s++) {
        out[s / 2].scale[s % 2] = d * as_floats((ints)bits(scales[s / 4], 8 * (s % 4), 4));
        out[s / 2].base[s % 2] = minus_dmin * as_floats((ints)bits(scales[s / 4], 8 * (s % 4) + 4, 4));
    }
}

INLINE void fill_Q3_K(const rows *from, size_t at, tile out[8]) {
    lanes third[8], tail[4], packed[3], scales[4];
    fill_k_pairs(from, at + 32, out);
    load_transposed_32(from, at, third);
    for (int32_t g = 0; g < 8; g++) {
        for (int32_t t = 0; t < 8; t++) {
            lanes bit = t < 2 ? third[g] << (uint32_t)(2 - t) : third[g] >> (uint32_t)(t - 2);
            out[t].code[g] |= bit & in_each_byte(4);
        }
    }
    load_transposed(from, at + 94, tail);
    for (int32_t j = 0; j < 3; j++) packed[j] = tail[j] >> 16 | tail[j + 1] << 16;
    for (int32_t j = 0; j < 4; j++) {
        scales[j] = j < 2 ? low_nibbles(packed[j]) : high_nibbles(packed[j - 2]);
        scales[j] |= (packed[2] >> (uint32_t)(2 * j) & in_each_byte(3)) << 4;
    }
    floats d = halves(tail[3] >> 16);
    for (int32_t s = 0; s < 16; s++) {
        out[s / 2].scale[s % 2] = d * as_floats(unsigned_byte(scales[s / 4], s % 4) - 32);
    }
}

/* d, dmin and the 12 bytes of 6-bit scales and minima of Q4_K and Q5_K; each dword below holds four of them */
INLINE void fill_k_scales(const rows *from, size_t at, tile out[8]) {
    lanes head[4], scales[2], mins[2];
    load_transposed(from, at, head);
    lanes six_bits = in_each_byte(63), top_bits = in_each_byte(0x30);
    scales[0] = head[1] & six_bits;
    mins[0] = head[2] & six_bits;
    scales[1] = low_nibbles(head[3]) | (head[1] >> 2 & top_bits);
    mins[1] = high_nibbles(head[3]) | (head[2] >> 2 & top_bits);
    floats d = halves(head[0]), minus_dmin = -halves(head[0] >> 16);
    for (int32_t t = 0; t < 8; t++) {
        out[t].scale[0] = d * as_floats(unsigned_byte(scales[t / 4], t % 4));
        out[t].base[0] = minus_dmin * as_floats(unsigned_byte(mins[t / 4], t % 4));
    }
}

/* 32 bytes of nibbles for each two tiles */
INLINE void fill_k_nibbles(const rows *from, size_t at, tile out[8]) {
    for (int32_t t = 0; t < 8; t += 2) {
        lanes packed[8];
        load_transposed_32(from, at + 16 * (size_t)t, packed);
        for (int32_t g = 0; g < 8; g++) {
            out[t].code[g] = low_nibbles(packed[g]);
            out[t + 1].code[g] = high_nibbles(packed[g]);
        }
    }
}

INLINE void fill_Q4_K(const rows *from, size_t at, tile out[8]) {
    fill_k_scales(from, at, out);
    fill_k_nibbles(from, at + 16, out);
}

INLINE void fill_Q5_K(const rows *from, size_t at, tile out[8]) {
    fill_k_scales(from, at, out);
    fill_k_nibbles(from, at + 48, out);
    lanes fifth[8];
    load_transposed_32(from, at + 16, fifth);
    for (int32_t g = 0; g < 8; g++) {
        for (int32_t t = 0; t < 8; t++) {
            lanes bit = t < 4 ? fifth[g] << (uint32_t)(4 - t) : fifth[g] >> (uint32_t)(t - 4);
            out[t].code[g] |= bit & in_each_byte(16);
        }
    }
}

INLINE void fill_Q6_K(const rows *from, size_t at, tile out[8]) {
    for (size_t half = 0; half < 2; half++) {
        lanes low[2][8], high[8];
        load_transposed_32(from, at + 64 * half, low[0]);
        load_transposed_32(from, at + 64 * half + 32, low[1]);
        load_transposed_32(from, at + 128 + 32 * half, high);
        for (int32_t t = 0; t < 4; t++) {
            for (int32_t g = 0; g < 8; g++) {
                lanes nibbles = t < 2 ? low_nibbles(low[t][g]) : high_nibbles(low[t - 2][g]);
                lanes top = t < 3 ? high[g] << (uint32_t)(4 - 2 * t) : high[g] >> 2;
                out[4 * half + (size_t)t].code[g] = nibbles | (top & in_each_byte(0x30));
            }
        }
    }
    lanes scales[4], tail[4];
    load_transposed(from, at + 192, scales);
    load_transposed(from, at + 194, tail);
    floats d = halves(tail[3] >> 16);
    for (int32_t s = 0; s < 16; s++) out[s / 2].scale[s % 2] = d * as_floats(signed_byte(scales[s / 4], s % 4));
}

INLINE void fill_IQ4_XS(const rows *from, size_t at, tile out[8]) {
    lanes head[4], codes = codes_of(kvm_levels_iq4, ZERO_IQ4);
    load_transposed(from, at, head);
    floats d = halves(head[0]);
    for (int32_t t = 0; t < 8; t++) {
        lanes scale = bits(head[1], 4 * t, 4) | bits(head[0], 16 + 2 * t, 2) << 4;
        out[t].scale[0] = d * as_floats((ints)scale - 32);
        fill_levels(from, at + 8 + 16 * (size_t)t, codes, out + t);
    }
}

/* ---- grids -------------------------------------------------------------------------------------------------- */

/* A tile of entries with these numbers; bit i of flags is for weight i. */
INLINE void fill_eights(const uint32_t *grid, lanes codes, const lanes number[4], lanes flags, tile *out) {
#pragma GCC unroll 4
    for (int32_t k = 0; k < 4; k++) {
        lanes entry = gather(grid, number[k]);
        out->code[2 * k] = look_up(codes, low_nibbles(entry) | spread_bits(flags, 2 * k, 3));
        out->code[2 * k + 1] = look_up(codes, high_nibbles(entry) | spread_bits(flags, 2 * k + 1, 3));
    }
}

INLINE void fill_fours(const uint32_t *grid, lanes codes, const lanes number[8], lanes flags, tile *out) {
#pragma GCC unroll 8
    for (int32_t g = 0; g < 8; g++) {
        out->code[g] = look_up(codes, gather(grid, number[g]) | spread_bits(flags, g, 3));
    }
}

/* Flags of which each byte has seven: its eighth makes the number of those set even. */
INLINE lanes even_flags(lanes v) {
    lanes odd = v ^ v >> 4; /* bit 0 of each byte in the end */
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return v | (odd & in_each_byte(1)) << 7;
}

/* 28 flags and a scale of 4 bits */
INLINE lanes flags_of_word(lanes word) {
    return even_flags(bits(word, 0, 7) | bits(word, 7, 7) << 8 | bits(word, 14, 7) << 16 | bits(word, 21, 7) << 24);
}

INLINE floats half_and(lanes scale) { return 0.5f + as_floats((ints)scale); }
INLINE floats odd_number(lanes scale) { return as_floats((ints)(2 * scale + 1)); }

INLINE void fill_IQ2_XXS(const rows *from, size_t at, tile out[8]) {
    lanes packed[4], number[4], codes = codes_of(kvm_levels_iq2, ZERO_IQ2);
    load_transposed(from, at, packed);
    floats d = halves(packed[0]);
    for (int32_t t = 0; t < 8; t++) {
        if (t % 2 == 0) load_transposed(from, at + 2 + 8 * (size_t)t, packed);
        lanes qs = packed[t % 2 * 2], word = packed[t % 2 * 2 + 1];
        for (int32_t k = 0; k < 4; k++) number[k] = bits(qs, 8 * k, 8);
        fill_eights(kvm_grid_iq2_xxs, codes, number, flags_of_word(word), out + t);
        out[t].scale[0] = d * half_and(bits(word, 28, 4)) * 0.25f;
    }
}

INLINE void fill_IQ2_XS(const rows *from, size_t at, tile out[8]) {
    lanes packed[4], tail[4], number[4], codes = codes_of(kvm_levels_iq2, ZERO_IQ2);
    load_transposed(from, at, packed);
    load_transposed(from, at + 58, tail);
    floats d = halves(packed[0]);
    for (int32_t t = 0; t < 8; t++) {
        if (t % 2 == 0) load_transposed(from, at + 2 + 8 * (size_t)t, packed);
        lanes flags = {0};
        for (int32_t k = 0; k < 4; k++) {
            lanes q = bits(packed[t % 2 * 2 + k / 2], 16 * (k % 2), 16);
            number[k] = bits(q, 0, 9);
            flags |= bits(q, 9, 7) << (uint32_t)(8 * k);
        }
        fill_eights(kvm_grid_iq2_xs, codes, number, even_flags(flags), out + t);
        for (int32_t s = 0; s < 2; s++) {
            out[t].scale[s] = d * half_and(bits(tail[2 + t / 4], 8 * (t % 4) + 4 * s, 4)) * 0.25f;
        }
    }
}

INLINE void fill_IQ2_S(const rows *from, size_t at, tile out[8]) {
    lanes head[4], qs[8], flags[8], tail[4], number[4], codes = codes_of(kvm_levels_iq2, ZERO_IQ2);
    load_transposed(from, at, head);
    load_transposed_32(from, at + 2, qs);
    load_transposed_32(from, at + 34, flags);
    load_transposed(from, at + 66, tail);
    floats d = halves(head[0]);
    for (int32_t t = 0; t < 8; t++) {
        lanes high = tail[t / 4], scales = tail[2 + t / 4];
        for (int32_t k = 0; k < 4; k++) {
            number[k] = bits(qs[t], 8 * k, 8) | bits(high, 8 * (t % 4) + 2 * k, 2) << 8;
        }
        fill_eights(kvm_grid_iq2_s, codes, number, flags[t], out + t);
        for (int32_t s = 0; s < 2; s++) {
            out[t].scale[s] = d * half_and(bits(scales, 8 * (t % 4) + 4 * s, 4)) * 0.25f;
        }
    }
}

INLINE void fill_IQ3_XXS(const rows *from, size_t at, tile out[8]) {
    lanes packed[4], words[8], number[8], codes = codes_of(kvm_levels_iq3_xxs, ZERO_IQ3_XXS);
    load_transposed(from, at, packed);
    load_transposed_32(from, at + 66, words);
    floats d = halves(packed[0]);
    for (int32_t t = 0; t < 8; t++) {
        if (t % 2 == 0) load_transposed(from, at + 2 + 8 * (size_t)t, packed);
        for (int32_t g = 0; g < 8; g++) number[g] = bits(packed[t % 2 * 2 + g / 4], 8 * (g % 4), 8);
        fill_fours(kvm_grid_iq3_xxs, codes, number, flags_of_word(words[t]), out + t);
        out[t].scale[0] = d * half_and(bits(words[t], 28, 4)) * 0.5f;
    }
}

INLINE void fill_IQ3_S(const rows *from, size_t at, tile out[8]) {
    lanes packed[4], high[4], flags[8], tail[4], number[8], codes = codes_of(kvm_levels_iq3_s, ZERO_IQ3_S);
    load_transposed(from, at, packed);
    load_transposed(from, at + 66, high);
    load_transposed_32(from, at + 74, flags);
    load_transposed(from, at + 94, tail);
    floats d = halves(packed[0]);
    for (int32_t t = 0; t < 8; t++) {
        if (t % 2 == 0) load_transposed(from, at + 2 + 8 * (size_t)t, packed);
        for (int32_t g = 0; g < 8; g++) {
            number[g] = bits(packed[t % 2 * 2 + g / 4], 8 * (g % 4), 8) | bits(high[t / 4], 8 * (t % 4) + g, 1) << 8;
        }
        fill_fours(kvm_grid_iq3_s, codes, number, flags[t], out + t);
        out[t].scale[0] = d * odd_number(bits(tail[3], 4 * t, 4));
    }
}

INLINE void fill_IQ1_S(const rows *from, size_t at, tile out[8]) {
    lanes head[4], qs[8], high[4], number[4], codes = codes_of(kvm_levels_iq1, ZERO_IQ1);
    load_transposed(from, at, head);
    load_transposed_32(from, at + 2, qs);
    load_transposed(from, at + 34, high);
    floats d = halves(head[0]);
    for (int32_t t = 0; t < 8; t++) {
        lanes qh = bits(high[t / 2], 16 * (t % 2), 16);
        for (int32_t k = 0; k < 4; k++) number[k] = bits(qs[t], 8 * k, 8) | bits(qh, 3 * k, 3) << 8;
        fill_eights(kvm_grid_iq1_s, codes, number, -bits(qh, 15, 1), out + t);
        out[t].scale[0] = d * odd_number(bits(qh, 12, 3)) * 0.125f;
    }
}

INLINE void fill_IQ1_M(const rows *from, size_t at, tile out[8]) {
    lanes qs[8], high[4], tail[4], number[4], codes = codes_of(kvm_levels_iq1, ZERO_IQ1);
    load_transposed_32(from, at, qs);
    load_transposed(from, at + 32, high);
    load_transposed(from, at + 40, tail);
    const lanes *scales = tail + 2;
    floats d = halves(bits(scales[0], 12, 4) | bits(scales[0], 28, 4) << 4 | bits(scales[1], 12, 4) << 8 |
                      bits(scales[1], 28, 4) << 12);
    for (int32_t t = 0; t < 8; t++) {
        lanes qh = bits(high[t / 2], 16 * (t % 2), 16), flags = {0};
        for (int32_t k = 0; k < 4; k++) {
            number[k] = bits(qs[t], 8 * k, 8) | bits(qh, 4 * k, 3) << 8;
            flags |= -bits(qh, 4 * k + 3, 1) & 255u << (8 * k);
        }
        fill_eights(kvm_grid_iq1_s, codes, number, flags, out + t);
        for (int32_t s = 0; s < 2; s++) {
            int32_t half = t % 4 * 2 + s; /* of the eight whose scales are in one dword */
            out[t].scale[s] = d * odd_number(bits(scales[t / 4], 16 * (half / 4) + 3 * (half % 4), 3)) * 0.125f;
        }
    }
}

/* ---- the list ----------------------------------------------------------------------------------------------- */

/*  X(format, largest |code|, scales in 32 weights, zero, has a base, codes are signed) */
#define FORMAT_LIST(X)                                                                                                 \
    X(Q4_0, 15, 1, 8, false, false)                                                                                    \
    X(Q4_1, 15, 1, 0, true, false)                                                                                     \
    X(Q5_0, 31, 1, 16, false, false)                                                                                   \
    X(Q5_1, 31, 1, 0, true, false)                                                                                     \
    X(Q8_0, ZERO_8BIT == 0 ? 128 : 255, 1, ZERO_8BIT, false, ZERO_8BIT == 0)                                           \
    X(Q2_K, 3, 2, 0, true, false)                                                                                      \
    X(Q3_K, 7, 2, 4, false, false)                                                                                     \
    X(Q4_K, 15, 1, 0, true, false)                                                                                     \
    X(Q5_K, 31, 1, 0, true, false)                                                                                     \
    X(Q6_K, 63, 2, 32, false, false)                                                                                   \
    X(IQ1_S, 2 * ZERO_IQ1, 1, ZERO_IQ1, false, false)                                                                  \
    X(IQ1_M, 2 * ZERO_IQ1, 2, ZERO_IQ1, false, false)                                                                  \
    X(IQ2_XXS, 2 * ZERO_IQ2, 1, ZERO_IQ2, false, false)                                                                \
    X(IQ2_XS, 2 * ZERO_IQ2, 2, ZERO_IQ2, false, false)                                                                 \
    X(IQ2_S, 2 * ZERO_IQ2, 2, ZERO_IQ2, false, false)                                                                  \
    X(IQ3_XXS, 2 * ZERO_IQ3_XXS, 1, ZERO_IQ3_XXS, false, false)                                                        \
    X(IQ3_S, 2 * ZERO_IQ3_S, 1, ZERO_IQ3_S, false, false)                                                              \
    X(IQ4_NL, 127 + ZERO_IQ4, 1, ZERO_IQ4, false, ZERO_IQ4 == 0)                                                       \
    X(IQ4_XS, 127 + ZERO_IQ4, 1, ZERO_IQ4, false, ZERO_IQ4 == 0)                                                       \
    X(MXFP4, 2 * ZERO_MXFP4, 1, ZERO_MXFP4, false, false)

#endif
