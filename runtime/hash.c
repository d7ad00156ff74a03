/* hash.c - CRC-32 by a table of bytes, SHA-256 as the standard writes it. */
#include "hash.h"

uint32_t kvm_hash_crc32(uint32_t crc, const void *data, size_t n_bytes) {
    const uint8_t *bytes = data;
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++) table[i] = (table[i] >> 1) ^ (table[i] & 1 ? 0xEDB88320 : 0);
    }
    crc = ~crc;
    for (size_t i = 0; i < n_bytes; i++) crc = (crc >> 8) ^ table[(crc ^ bytes[i]) & 255];
    return ~crc;
}

/* the first 32 bits of the fractional parts of the cube roots of the first 64 primes */
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void add_block(uint32_t *state, const uint8_t *bytes) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++, bytes += 4) {
        w[i] = (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
    }
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25), choice = (e & f) ^ (~e & g);
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22), majority = (a & b) ^ (a & c) ^ (b & c);
        uint32_t t = h + s1 + choice + round_constants[i] + w[i];
        h = g, g = f, f = e, e = d + t;
        d = c, c = b, b = a, a = t + s0 + majority;
    }
    const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) state[i] += sums[i];
}

void kvm_hash_sha256_init(kvm_sha256 *s) {
    *s = (kvm_sha256){.h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab,
                            0x5be0cd19}};
}

void kvm_hash_sha256_add(kvm_sha256 *s, const void *data, size_t n_bytes) {
    const uint8_t *bytes = data;
    while (n_bytes > 0) {
        size_t waiting = s->n_bytes % KVM_SHA256_BLOCK, n = KVM_SHA256_BLOCK - waiting;
        if (n > n_bytes) n = n_bytes;
        memcpy(s->block + waiting, bytes, n);
        if (waiting + n == KVM_SHA256_BLOCK) add_block(s->h, s->block);
        s->n_bytes += n;
        bytes += n;
        n_bytes -= n;
    }
}

void kvm_hash_sha256_finish(kvm_sha256 *s, uint8_t out[KVM_SHA256_BYTES]) {
    uint64_t n_bits = 8 * s->n_bytes;
    uint8_t end[KVM_SHA256_BLOCK] = {0x80}, length[8];
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(n_bits >> (56 - 8 * i));
    size_t n_end = (119 - s->n_bytes % KVM_SHA256_BLOCK) % KVM_SHA256_BLOCK + 1; /* up to 8 bytes before a block's end */
    kvm_hash_sha256_add(s, end, n_end);
    kvm_hash_sha256_add(s, length, sizeof length);
    for (int i = 0; i < KVM_SHA256_BYTES; i++) out[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}
