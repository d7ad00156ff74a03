/* gguf.h - a bounds-checked reader of GGUF files, versions 2 and 3, little-endian. Knows no model.
 *
 * Invariants
 * 1. No number from the file is used before it was compared with the bytes left; sums and products are checked.
 * 2. After a successful open every key, string, array and tensor lies inside the mapping, tensors do not overlap,
 *    keys and tensor names are unique.
 * 3. Strings and arrays point into the mapping: nothing of the data is copied. They live until kvm_gguf_close.
 *
 * Limits: header 128 MiB; 65,536 keys; 65,536 tensors; key 1..65,535 bytes without NUL; string 64 MiB; array
 * 16,777,216 elements, not nested; tensor name 1..64 printable bytes; 1..4 dimensions, each >= 1; alignment a power
 * of two 8..65,536. A wrong file kind is named (HTML, a Git LFS pointer, safetensors, a big-endian or version 1 GGUF).
 */
#ifndef KVM_GGUF_H
#define KVM_GGUF_H

#include "base.h"
#include "dtype.h"

typedef struct kvm_gguf kvm_gguf;

typedef struct {
    const char *data; /* not NUL-terminated */
    size_t n_bytes;
} kvm_text;

typedef enum { /* numbers of the format */
    KVM_GGUF_U8, KVM_GGUF_I8, KVM_GGUF_U16, KVM_GGUF_I16, KVM_GGUF_U32, KVM_GGUF_I32, KVM_GGUF_F32, KVM_GGUF_BOOL,
    KVM_GGUF_STRING, KVM_GGUF_ARRAY, KVM_GGUF_U64, KVM_GGUF_I64, KVM_GGUF_F64, KVM_GGUF_TYPE_COUNT
} kvm_gguf_type;

typedef struct {
    kvm_gguf_type type; /* of the elements */
    uint64_t n;
    const uint8_t *data; /* n elements, unaligned; strings as (u64 length, bytes) */
} kvm_gguf_array;

typedef struct {
    kvm_text name;
    int32_t index; /* kvm_gguf_tensor_at(file, index) is this one */
    kvm_dtype type;
    int32_t n_dims;
    uint64_t dim[4]; /* as in the file: dim[0] is the fast one; 1 past n_dims. A matrix has dim[1] rows of dim[0] */
    uint64_t n_values, n_bytes;
    const void *data; /* aligned to the file's alignment */
} kvm_gguf_tensor;

/* use_mmap: map the file read-only, else read it into memory. IO, FORMAT (names the byte offset), NOMEM, UNSUPPORTED
 * (another version, big-endian, or a tensor type without a row in dtype.h: the sentence has the type, the tensor and
 * the types there are). */
kvmix_status kvm_gguf_open(kvm_gguf **out, const char *path, bool use_mmap);
/* The same over memory that outlives the object; `name` appears in error sentences. */
kvmix_status kvm_gguf_open_memory(kvm_gguf **out, const void *data, size_t n_bytes, const char *name);
void kvm_gguf_close(kvm_gguf *file);

/* Makes `part` a part of `file`, which will close it: its tensors and bytes count as the file's, its keys do not. The
 * caller has seen that the two share no tensor's name, and have no more than INT32_MAX tensors. */
void kvm_gguf_append(kvm_gguf *file, kvm_gguf *part);

const char *kvm_gguf_name(const kvm_gguf *file); /* the path */
uint64_t kvm_gguf_file_bytes(const kvm_gguf *file);
/* zlib's CRC-32 of all that comes before the tensor data: with the size, it tells one model's file from another's.
 * Appended parts are left out. */
uint32_t kvm_gguf_header_crc32(const kvm_gguf *file);

/* Typed access. Each returns OK and sets *found = false (the value untouched) when the key is absent; FORMAT, naming
 * key, type found and type wanted, when it is there with another type. Integers: any integer type whose value fits
 * the range [low, high], else FORMAT with the limits. Floats: f32 or f64, finite. */
kvmix_status kvm_gguf_get_int(const kvm_gguf *file, const char *key, int64_t low, int64_t high, int64_t *value,
                              bool *found);
kvmix_status kvm_gguf_get_float(const kvm_gguf *file, const char *key, float *value, bool *found);
kvmix_status kvm_gguf_get_bool(const kvm_gguf *file, const char *key, bool *value, bool *found);
kvmix_status kvm_gguf_get_text(const kvm_gguf *file, const char *key, kvm_text *value, bool *found);
kvmix_status kvm_gguf_get_array(const kvm_gguf *file, const char *key, kvm_gguf_type type, kvm_gguf_array *value,
                                bool *found);

/* The strings of a string array, one walk: texts[n] (allocated by the caller). */
void kvm_gguf_array_texts(const kvm_gguf_array *array, kvm_text *texts);

int32_t kvm_gguf_n_tensors(const kvm_gguf *file);
const kvm_gguf_tensor *kvm_gguf_tensor_at(const kvm_gguf *file, int32_t index);
const kvm_gguf_tensor *kvm_gguf_find(const kvm_gguf *file, const char *name); /* NULL when absent; hashed */

#endif
