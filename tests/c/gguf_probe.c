/* gguf_probe.c - opens a GGUF file and touches everything the reader hands out; for test_gguf_hostile.py.
 *
 * gguf_probe mmap|read PATH [KEY...]     prints "ok" (exit 0) or "STATUS: sentence" (exit 1)
 *
 * The keys named are asked for through every accessor, the strings of their arrays are walked, and every byte of them
 * and of every tensor is read, so that a sanitizer sees any that lies outside the file.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf.h"

static volatile uint8_t sink;

static void touch(const void *data, size_t n) {
    const uint8_t *bytes = data;
    uint8_t sum = 0;
    for (size_t i = 0; i < n; i++) sum ^= bytes[i];
    sink = sum;
}

/* Asks for the key as each type of element; false when it is there and nothing fits. */
static bool touch_array(const kvm_gguf *file, const char *key) {
    static const size_t n_bytes[KVM_GGUF_TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    kvm_gguf_array array;
    bool found;
    for (int type = 0; type < KVM_GGUF_TYPE_COUNT; type++) {
        if (kvm_gguf_get_array(file, key, (kvm_gguf_type)type, &array, &found) != KVMIX_OK || !found) continue;
        touch(array.data, array.n * n_bytes[type]);
        if (type != KVM_GGUF_STRING) return true;
        kvm_text *texts = malloc((array.n + 1) * sizeof *texts);
        if (texts == NULL) return false;
        kvm_gguf_array_texts(&array, texts);
        for (uint64_t i = 0; i < array.n; i++) touch(texts[i].data, texts[i].n_bytes);
        free(texts);
        return true;
    }
    return false;
}

static kvmix_status touch_key(const kvm_gguf *file, const char *key) {
    int64_t integer;
    float number;
    bool flag, found;
    kvm_text text;
    if (touch_array(file, key)) return KVMIX_OK;
    if (kvm_gguf_get_text(file, key, &text, &found) == KVMIX_OK) {
        if (found) touch(text.data, text.n_bytes);
        return KVMIX_OK;
    }
    if (kvm_gguf_get_bool(file, key, &flag, &found) == KVMIX_OK) return KVMIX_OK;
    if (kvm_gguf_get_float(file, key, &number, &found) == KVMIX_OK) return KVMIX_OK;
    return kvm_gguf_get_int(file, key, INT64_MIN, INT64_MAX, &integer, &found);
}

static kvmix_status touch_file(const kvm_gguf *file, char **keys, int n_keys) {
    for (int32_t i = 0; i < kvm_gguf_n_tensors(file); i++) {
        const kvm_gguf_tensor *tensor = kvm_gguf_tensor_at(file, i);
        char name[65];
        snprintf(name, sizeof name, "%.*s", (int)tensor->name.n_bytes, tensor->name.data);
        if (kvm_gguf_find(file, name) != tensor)
            return kvm_fail(KVMIX_STATE, "tensor %s is not found by its own name", name);
        touch(tensor->data, tensor->n_bytes);
    }
    for (int i = 0; i < n_keys; i++) KVM_TRY(touch_key(file, keys[i]));
    return KVMIX_OK;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: gguf_probe mmap|read PATH [KEY...]\n");
        return 2;
    }
    kvm_gguf *file;
    kvmix_status status = kvm_gguf_open(&file, argv[2], strcmp(argv[1], "mmap") == 0);
    if (status == KVMIX_OK) status = touch_file(file, argv + 3, argc - 3);
    if (status == KVMIX_OK) printf("ok\n");
    else printf("%s: %s\n", kvmix_status_name(status), kvmix_last_error());
    kvm_gguf_close(file);
    return status != KVMIX_OK;
}
