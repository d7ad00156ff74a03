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
    CHECK(!kvm_dtype_from_gguf(10, &type, &name));
    CHECK(name != NULL && strcmp(name, "Q2_K") == 0);
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

int main(void) {
    test_table();
    test_unknown();
    test_plain();
    test_blocks_of_32();
    test_blocks_of_256();
    return check_report();
}
