/* sealed.c - writing and reading sealed files, by plain calls of the system. */
#include "sealed.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static kvmix_status io_failure(const kvm_sealed *f, const char *what) {
    char reason[128];
    return kvm_fail(KVMIX_IO, "%s cannot be %s: %s", f->path, what, strerror_r(errno, reason, sizeof reason));
}

static kvmix_status damaged(const kvm_sealed *f, const char *section) {
    return kvm_fail(KVMIX_FORMAT, "%s is damaged before its byte %llu, in its %s: it cannot be used, save it anew", f->path,
                    (unsigned long long)f->at, section);
}

static void pass(kvm_sealed *f, const void *data, size_t n_bytes) {
    f->at += n_bytes;
    f->crc = kvm_hash_crc32(f->crc, data, n_bytes);
    kvm_hash_sha256_add(&f->sha, data, n_bytes);
}

void kvm_sealed_close(kvm_sealed *f) {
    if (f->fd >= 0) close(f->fd);
    if (f->temporary != NULL) unlink(f->temporary);
    free(f->temporary);
    f->temporary = NULL;
    f->fd = -1;
}

/* ---- writing ------------------------------------------------------------------------------------------------- */

kvmix_status kvm_sealed_create(kvm_sealed *f, const char *path) {
    *f = (kvm_sealed){.path = path, .fd = -1};
    struct stat there;
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) {
        return kvm_fail(KVMIX_IO, "%s is there already and no file: give another name", path);
    }
    static const char suffix[] = ".XXXXXX";
    size_t n = strlen(path);
    char *name = kvm_alloc(n + sizeof suffix, 1);
    if (name == NULL) return kvm_fail(KVMIX_NOMEM, "no memory for a file's name");
    memcpy(name, path, n);
    memcpy(name + n, suffix, sizeof suffix);
    f->fd = mkostemp(name, O_CLOEXEC); /* mode 0600 */
    if (f->fd < 0) {
        free(name);
        return io_failure(f, "written");
    }
    f->temporary = name;
    kvm_hash_sha256_init(&f->sha);
    return KVMIX_OK;
}

static kvmix_status write_all(const kvm_sealed *f, const void *data, size_t n_bytes) {
    const uint8_t *bytes = data;
    while (n_bytes > 0) {
        ssize_t n = write(f->fd, bytes, n_bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return io_failure(f, "written");
        bytes += n;
        n_bytes -= (size_t)n;
    }
    return KVMIX_OK;
}

kvmix_status kvm_sealed_write(kvm_sealed *f, const void *data, size_t n_bytes) {
    KVM_TRY(write_all(f, data, n_bytes));
    pass(f, data, n_bytes);
    return KVMIX_OK;
}

kvmix_status kvm_sealed_end(kvm_sealed *f) {
    uint32_t crc = f->crc;
    KVM_TRY(kvm_sealed_write(f, &crc, sizeof crc));
    f->crc = 0;
    return KVMIX_OK;
}

/* Flushes the folder's list of names. Where a file system cannot, the rename comes to the disk when it will: there is
 * still the old file or the new one. */
static void sync_folder(const char *path) {
    const char *slash = strrchr(path, '/');
    size_t n = slash == NULL ? 0 : (size_t)(slash - path) + 1;
    char *folder = kvm_alloc_zero(n + 2, 1);
    if (folder == NULL) return;
    memcpy(folder, n > 0 ? path : ".", n > 0 ? n : 1);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(folder);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

kvmix_status kvm_sealed_rename(kvm_sealed *f) {
    uint8_t hash[KVM_SHA256_BYTES];
    kvm_hash_sha256_finish(&f->sha, hash);
    KVM_TRY(write_all(f, hash, sizeof hash));
    if (fsync(f->fd) != 0) return io_failure(f, "written");
    int fd = f->fd;
    f->fd = -1;
    if (close(fd) != 0 || rename(f->temporary, f->path) != 0) return io_failure(f, "written");
    free(f->temporary);
    f->temporary = NULL;
    sync_folder(f->path);
    return KVMIX_OK;
}

/* ---- reading ------------------------------------------------------------------------------------------------- */

kvmix_status kvm_sealed_open(kvm_sealed *f, const char *path) {
    *f = (kvm_sealed){.path = path};
    f->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would wait for a writer */
    if (f->fd < 0) return io_failure(f, "opened");
    struct stat info;
    kvmix_status status = KVMIX_OK;
    if (fstat(f->fd, &info) != 0) status = io_failure(f, "read");
    else if (!S_ISREG(info.st_mode)) status = kvm_fail(KVMIX_IO, "%s is no file", path);
    if (status != KVMIX_OK) {
        kvm_sealed_close(f);
        return status;
    }
    f->n_bytes = (uint64_t)info.st_size;
    kvm_hash_sha256_init(&f->sha);
    return KVMIX_OK;
}

static kvmix_status read_all(kvm_sealed *f, void *data, size_t n_bytes, const char *section) {
    uint8_t *bytes = data;
    size_t left = n_bytes;
    while (left > 0) {
        ssize_t n = read(f->fd, bytes, left);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return io_failure(f, "read");
        if (n == 0) {
            return kvm_fail(KVMIX_FORMAT, "%s ends at its byte %llu, in its %s: it cannot be used, save it anew", f->path,
                            (unsigned long long)(f->at + n_bytes - left), section);
        }
        bytes += n;
        left -= (size_t)n;
    }
    return KVMIX_OK;
}

kvmix_status kvm_sealed_read(kvm_sealed *f, void *data, size_t n_bytes, const char *section) {
    KVM_TRY(read_all(f, data, n_bytes, section));
    pass(f, data, n_bytes);
    return KVMIX_OK;
}

kvmix_status kvm_sealed_check(kvm_sealed *f, const char *section) {
    uint32_t want = f->crc, crc;
    KVM_TRY(kvm_sealed_read(f, &crc, sizeof crc, section));
    f->crc = 0;
    return crc == want ? KVMIX_OK : damaged(f, section);
}

kvmix_status kvm_sealed_check_all(kvm_sealed *f) {
    uint8_t want[KVM_SHA256_BYTES], hash[KVM_SHA256_BYTES];
    kvm_hash_sha256_finish(&f->sha, want);
    KVM_TRY(read_all(f, hash, sizeof hash, "checksum"));
    return memcmp(hash, want, sizeof hash) == 0 ? KVMIX_OK : damaged(f, "checksum");
}
