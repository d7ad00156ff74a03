/* test_dtype.c - the table of weight formats, and blocks small enough to be decoded by hand.
 *
 * That the decoders give gguf-py's bits for every scale and code is tests/test_dtype.py's work.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "dtype.h"

static void test_table(void) {
    for (int32_t type = 0; type < KVM_DTYPE_COUNT; type++) {
        kvm_dtype found = KVM_DTYPE_COUNT;
        const char *name = NULL;
        CHECK(kvm_dtype_from_gguf(kvm_dtypes[type].gguf_id, &found, &name));
        CHECK((int32_t)found == type && strcmp(name, kvm_dtypes[type].name) == 0);
    }
    CHECK(kvm_dtype_row_bytes(KVM_DTYPE_F32, 3) == 12);
    CHECK(kvm_dtype_row_bytes(KVM_DTYPE_Q4_1, 64) == 40);
    CHECK(kvm_dtype_row_bytes(KVM_DTYPE_Q6_K, INT64_C(1) << 40) == (UINT64_C(1) << 32) * 210);
}

static void test_unknown(void) {
    kvm_dtype type;
    const char *name = "";
    CHECK(!kvm_dtype_from_gguf(34, &type, &name));
    CHECK(name != NULL && strcmp(name, "TQ1_0") == 0);
    CHECK(!kvm_dtype_from_gguf(4, &type, &name)); /* withdrawn */
    CHECK(name == NULL);
    CHECK(!kvm_dtype_from_gguf(41, &type, &name));
    CHECK(name != NULL && strcmp(name, "Q1_0") == 0);
    CHECK(!kvm_dtype_from_gguf(42, &type, &name));
    CHECK(name == NULL);
    CHECK(!kvm_dtype_from_gguf(UINT32_MAX, &type, &name));
    CHECK(name == NULL);
}

/* Two equal blocks at an odd address; values [0, block_values) and their copy, poisoned beforehand. */
static const float *decode_twice(kvm_dtype type, const uint8_t *block) {
    static uint8_t src[1 + 2 * 256];
    static float dst[2 * 256 + 1];
    const kvm_dtype_info *info = &kvm_dtypes[type];
    size_t n_bytes = (size_t)info->block_bytes, n_values = (size_t)info->block_values;
    memcpy(src + 1, block, n_bytes);
    memcpy(src + 1 + n_bytes, block, n_bytes);
    for (size_t i = 0; i <= 2 * n_values; i++) dst[i] = -12345.0f;
    info->decode(src + 1, dst, 2 * (int64_t)n_values);
    CHECK(memcmp(dst, dst + n_values, n_values * sizeof *dst) == 0);
    CHECK(dst[2 * n_values] == -12345.0f);
    return dst;
}

static void put_f16(uint8_t *dst, float value) {
    uint16_t half = kvm_f32_to_f16(value);
    memcpy(dst, &half, sizeof half);
}

static void test_plain(void) {
    CHECK(*decode_twice(KVM_DTYPE_F32, (const uint8_t *)"\x00\x00\xc0\x3f") == 1.5f);
    CHECK(*decode_twice(KVM_DTYPE_F16, (const uint8_t *)"\x00\xbe") == -1.5f);
    CHECK(*decode_twice(KVM_DTYPE_BF16, (const uint8_t *)"\xc0\x3f") == 1.5f);
}

static void test_blocks_of_32(void) {
    uint8_t block[34] = {0};
    put_f16(block, 0.5f);
    block[2] = 0xf0; /* q[0] = 0, q[16] = 15 */
    const float *x = decode_twice(KVM_DTYPE_Q4_0, block);
    CHECK(x[0] == -4.0f && x[16] == 3.5f && x[1] == -4.0f);

    put_f16(block + 2, -1.0f); /* m */
    block[4] = 0x21;
    x = decode_twice(KVM_DTYPE_Q4_1, block);
    CHECK(x[0] == -0.5f && x[16] == 0.0f && x[1] == -1.0f);

    memset(block + 2, 0, 32);
    block[2] = 0x02; /* qh: q[1] has its fifth bit */
    block[5] = 0x80; /* q[31] too */
    block[7] = 0x03; /* low bits of q[1] */
    x = decode_twice(KVM_DTYPE_Q5_0, block);
    CHECK(x[0] == -8.0f && x[1] == 1.5f && x[31] == 0.0f && x[17] == -8.0f);

    memset(block + 2, 0, 32);
    put_f16(block + 2, 2.0f);
    block[5] = 0x01; /* qh: q[8] */
    block[8] = 0x70; /* q[16] = 7 */
    x = decode_twice(KVM_DTYPE_Q5_1, block);
    CHECK(x[0] == 2.0f && x[8] == 10.0f && x[16] == 5.5f);

    memset(block + 2, 0, 32);
    block[2] = 0x80;
    block[33] = 0x7f;
    x = decode_twice(KVM_DTYPE_Q8_0, block);
    CHECK(x[0] == -64.0f && x[31] == 63.5f && x[1] == 0.0f);
}

static void test_blocks_of_256(void) {
    uint8_t block[210] = {0};
    put_f16(block, 0.5f);
    put_f16(block + 2, 0.25f);
    block[4] = 0x83;  /* scale[0] = 3, scale[4] bits 4-5 = 2 */
    block[8] = 0x44;  /* min[0] = 4, min[4] bits 4-5 = 1 */
    block[12] = 0x65; /* scale[4] = 32 + 5, min[4] = 16 + 6 */
    block[16] = 0x09; /* Q4_K: q[0] = 9; Q5_K: qh[0], the fifth bits of q[0] and q[96] */
    block[16 + 64] = 0x02; /* Q4_K: q[128] = 2 */
    const float *x = decode_twice(KVM_DTYPE_Q4_K, block);
    CHECK(x[0] == 0.5f * 3 * 9 - 1.0f && x[1] == -1.0f && x[32] == 0.0f);
    CHECK(x[128] == 0.5f * 37 * 2 - 0.25f * 22 && x[129] == -0.25f * 22);

    block[16] = 0x11;      /* fifth bits of q[0] and q[128] */
    block[48 + 64] = 0x02; /* low bits of q[128] */
    x = decode_twice(KVM_DTYPE_Q5_K, block);
    CHECK(x[0] == 0.5f * 3 * 16 - 1.0f && x[128] == 0.5f * 37 * 18 - 0.25f * 22);

    memset(block, 0, sizeof block);
    put_f16(block + 208, 0.5f);
    block[192] = 1;          /* scales[0] */
    block[192 + 9] = 0xfe;   /* scales[9] = -2: group 4, values 16..31 */
    block[0] = 0x05;         /* low bits of q[0] */
    block[128] = 0x03;       /* high bits of q[0] */
    block[64 + 16] = 0x01;   /* group 4 is the first of the second half */
    x = decode_twice(KVM_DTYPE_Q6_K, block);
    CHECK(x[0] == 0.5f * (53 - 32) && x[1] == -16.0f && x[16] == 0.0f);
    CHECK(x[128 + 16] == -1.0f * (1 - 32) && x[128 + 15] == 0.0f);
}

static void test_levels(void) {
    uint8_t block[34] = {0};
    put_f16(block, 0.5f);
    block[2] = 0xf8; /* q[0] = 8, q[16] = 15 */
    const float *x = decode_twice(KVM_DTYPE_IQ4_NL, block);
    CHECK(x[0] == 0.5f && x[16] == 56.5f && x[1] == -63.5f);

    block[0] = 129; /* 2 */
    block[1] = 0xf3;
    x = decode_twice(KVM_DTYPE_MXFP4, block);
    CHECK(x[0] == 6.0f && x[16] == -24.0f && x[1] == 0.0f && !signbit(x[1])); /* q[1] = 8 */
    block[0] = 0;
    CHECK(decode_twice(KVM_DTYPE_MXFP4, block)[0] == 3 * 0x1p-128f);
}

static void test_blocks_of_256_in_few_bits(void) {
    uint8_t block[210] = {0};
    put_f16(block + 80, 0.5f);
    put_f16(block + 82, 0.25f);
    block[11] = 0x53;           /* group 11: scale 3, minimum 5 */
    block[16 + 32 + 16] = 0x08; /* its first value, 128 + 32 + 16, has bits 2 and 3 of byte 16 in the second half */
    const float *x = decode_twice(KVM_DTYPE_Q2_K, block);
    CHECK(x[176] == 0.5f * 3 * 2 - 0.25f * 5 && x[177] == -1.25f && x[0] == 0.0f);

    memset(block, 0, sizeof block);
    put_f16(block + 108, 0.5f);
    block[96 + 3] = 0x70;       /* group 11: the low bits of its scale are 7 */
    block[96 + 8 + 3] = 0x20;   /* bits 4 and 5: the scale is 39 - 32 */
    block[32 + 32 + 16] = 0x0c; /* q of value 176: 3 */
    block[16] = 0x20;           /* and its third bit, 5 of byte 16 */
    x = decode_twice(KVM_DTYPE_Q3_K, block);
    CHECK(x[176] == 0.5f * 7 * 3 && x[177] == 0.5f * 7 * -4 && x[0] == 0.5f * -32 * -4);

    memset(block, 0, sizeof block);
    put_f16(block, 0.5f);
    block[2] = 0x40;          /* group 3: bits 4 and 5 of its scale */
    block[5] = 0xf0;          /* the low bits: 15 + 16 - 32 */
    block[8 + 3 * 16] = 0x0f; /* q of value 96 */
    x = decode_twice(KVM_DTYPE_IQ4_XS, block);
    CHECK(x[96] == -56.5f && x[97] == 63.5f && x[0] == 0.5f * -32 * -127);
}

static void test_grids(void) {
    uint8_t block[210] = {0};
    put_f16(block, 8.0f); /* times 1/2 and 1/4: step 1 */
    block[6] = 0x01;      /* the flag of value 0, and so value 7 has one: their number is even */
    const float *x = decode_twice(KVM_DTYPE_IQ2_XXS, block);
    CHECK(x[0] == -8.0f && x[1] == 8.0f && x[7] == -8.0f && x[8] == 8.0f);

    memset(block + 2, 0, sizeof block - 2);
    block[66] = 0x10; /* half 1 of group 0: step 3 */
    block[7] = 0x06;  /* entry 2: values 16 and 17 */
    x = decode_twice(KVM_DTYPE_IQ2_XS, block);
    CHECK(x[16] == -24.0f && x[17] == -24.0f && x[18] == 24.0f && x[23] == 24.0f && x[0] == 8.0f);

    memset(block + 2, 0, sizeof block - 2);
    block[74] = 0x10;
    block[34 + 2] = 0x80; /* the flag of value 23 */
    x = decode_twice(KVM_DTYPE_IQ2_S, block);
    CHECK(x[22] == 24.0f && x[23] == -24.0f && x[0] == 8.0f);

    memset(block + 2, 0, sizeof block - 2);
    block[66 + 3] = 0x10; /* group 0: times 3/2 and 1/2 */
    x = decode_twice(KVM_DTYPE_IQ3_XXS, block);
    CHECK(x[0] == 8 * 0.75f * 4 && x[32] == 8 * 0.25f * 4);

    memset(block + 2, 0, sizeof block - 2);
    block[106] = 0x10; /* group 1: step 3 * 8 */
    block[74] = 0x10;  /* the flag of value 4 */
    x = decode_twice(KVM_DTYPE_IQ3_S, block);
    CHECK(x[3] == 8.0f && x[4] == -8.0f && x[32] == 24.0f);

    memset(block + 2, 0, sizeof block - 2);
    block[35] = 0x80; /* group 0 is shifted down */
    block[37] = 0x10; /* group 1: step 3 */
    x = decode_twice(KVM_DTYPE_IQ1_S, block);
    CHECK(x[0] == -9.0f && x[32] == -21.0f && x[64] == -7.0f);

    memset(block, 0, sizeof block);
    block[53] = 0x80; /* d = 8 = 0x4800, its nibbles in the scales */
    block[55] = 0x40;
    block[48] = 0x08; /* half 1 of group 0: step 3 */
    block[32] = 0x80; /* entry 1 is shifted down */
    x = decode_twice(KVM_DTYPE_IQ1_M, block);
    CHECK(x[0] == -7.0f && x[8] == -9.0f && x[16] == -21.0f && x[32] == -7.0f);
}

int main(void) {
    test_table();
    test_unknown();
    test_plain();
    test_blocks_of_32();
    test_blocks_of_256();
    test_levels();
    test_blocks_of_256_in_few_bits();
    test_grids();
    return check_report();
}
