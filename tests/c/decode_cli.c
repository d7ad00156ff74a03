/* decode_cli.c - decodes blocks of a weight format; for test_dtype.py.
 *
 * decode_cli TYPE <blocks >values     all of stdin, which is whole blocks; f32 values, native byte order
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"

static uint8_t blocks[1 << 20]; /* what one step reads */
static float values[6 << 20];   /* no format has six values a byte */

int main(int argc, char **argv) {
    for (int32_t type = 0; argc == 2 && type < KVM_DTYPE_COUNT; type++) {
        const kvm_dtype_info *info = &kvm_dtypes[type];
        if (strcmp(info->name, argv[1]) != 0) continue;
        size_t block_bytes = (size_t)info->block_bytes, per_step = sizeof blocks / block_bytes, n;
        while ((n = fread(blocks, block_bytes, per_step, stdin)) > 0) {
            size_t n_values = n * (size_t)info->block_values;
            info->decode(blocks, values, (int64_t)n_values);
            if (fwrite(values, sizeof *values, n_values, stdout) != n_values) return 1;
        }
        return ferror(stdin) != 0;
    }
    fprintf(stderr, "usage: decode_cli TYPE <blocks >values\n");
    return 2;
}
