/* hash.h - the checksums that files carry: zlib's CRC-32, and SHA-256 (FIPS 180-4). */
#ifndef KVM_HASH_H
#define KVM_HASH_H

#include "base.h"

/* of data[n_bytes] behind bytes whose CRC is `crc`; 0 for none */
uint32_t kvm_hash_crc32(uint32_t crc, const void *data, size_t n_bytes);

enum { KVM_SHA256_BYTES = 32, KVM_SHA256_BLOCK = 64 };

typedef struct {
    uint32_t h[8];
    uint64_t n_bytes;
    uint8_t block[KVM_SHA256_BLOCK]; /* its first n_bytes % 64 are waiting */
} kvm_sha256;

void kvm_hash_sha256_init(kvm_sha256 *s);
void kvm_hash_sha256_add(kvm_sha256 *s, const void *data, size_t n_bytes);
void kvm_hash_sha256_finish(kvm_sha256 *s, uint8_t out[KVM_SHA256_BYTES]);

#endif
