/* sealed.h - files that are whole or refused: sections that end in a CRC-32, and a SHA-256 of the whole.
 *
 * A sealed file is written under another name in the folder of its own, flushed to the disk and then renamed: at its
 * own name there is the old file or the new one, never a part. Only its owner may read it (mode 0600).
 *
 * File:    section (at least one) | SHA-256 of all that precedes
 * section: bytes | CRC-32 of them, u32
 *
 * No length of a section is in the file: who reads it says how many bytes a section has, from what he knows.
 */
#ifndef KVM_SEALED_H
#define KVM_SEALED_H

#include "hash.h"

typedef struct {
    const char *path; /* the caller's */
    char *temporary;  /* where it is written; NULL when it is read */
    int fd;
    uint64_t at, n_bytes; /* bytes behind us; of the whole file, when it is read */
    uint32_t crc;         /* of the section so far */
    kvm_sha256 sha;
} kvm_sealed;

enum { KVM_SEALED_END_BYTES = 4, KVM_SEALED_BYTES = KVM_SHA256_BYTES }; /* beside a section's bytes; beside sections */

/* All of them fail with IO and the system's reason; a damaged file with FORMAT and the place. After a failed create or
 * open there is nothing to close. */
kvmix_status kvm_sealed_create(kvm_sealed *f, const char *path);
kvmix_status kvm_sealed_write(kvm_sealed *f, const void *data, size_t n_bytes);
kvmix_status kvm_sealed_end(kvm_sealed *f);    /* of a section */
kvmix_status kvm_sealed_rename(kvm_sealed *f); /* after the last section; the file is now at its path */

kvmix_status kvm_sealed_open(kvm_sealed *f, const char *path);
kvmix_status kvm_sealed_read(kvm_sealed *f, void *data, size_t n_bytes, const char *section);
kvmix_status kvm_sealed_check(kvm_sealed *f, const char *section); /* the end of a section */
kvmix_status kvm_sealed_check_all(kvm_sealed *f); /* after the last section */

void kvm_sealed_close(kvm_sealed *f); /* and removes what was written and not renamed */

#endif
