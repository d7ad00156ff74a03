/* encode_cli.c - encodes pages of a KV type and decodes them again; for test_ref.py.
 *
 * encode_cli TYPE k|v D <values >bytes     each f32 [d][128] of stdin gives its codes and scales as they lie in a page,
 *                                          then f32 as decoded, K [d][128], V [128][d]; native byte order
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvtype.h"

static float x[KVM_HEAD_DIM_MAX * KVM_PAGE], decoded[KVM_HEAD_DIM_MAX * KVM_PAGE];
static uint8_t codes[KVM_HEAD_DIM_MAX * KVM_PAGE];
static uint16_t page[KVM_HEAD_DIM_MAX * KVM_PAGE]; /* of at most 8 bits a code, so half of this is left for scales */

int main(int argc, char **argv) {
    kvm_kvtype type;
    int32_t d = argc == 4 ? atoi(argv[3]) : 0;
    if (d < KVM_LANES || d > KVM_HEAD_DIM_MAX || d % KVM_LANES != 0 ||
        !kvm_kvtype_from_name(argv[1], strlen(argv[1]), &type) || type == KVM_KVTYPE_F16) {
        fprintf(stderr, "usage: encode_cli TYPE k|v D <values >bytes\n");
        return 2;
    }
    kvm_side side = argv[2][0] == 'k' ? KVM_SIDE_K : KVM_SIDE_V;
    size_t n = (size_t)(d * KVM_PAGE), n_groups = (size_t)(d / kvm_group_of(d));
    size_t scales = (size_t)kvm_page_layout_of(type, side, d, false).scales / 2;
    while (fread(x, sizeof *x, n, stdin) == n) {
        kvm_encode(type, side, x, d, codes, page + scales);
        kvm_planes_pack(type, side, codes, d, (uint8_t *)page);
        kvm_decode_page(type, side, (uint8_t *)page, d, decoded);
        if (fwrite(page, 2, scales + n_groups * KVM_PAGE, stdout) != scales + n_groups * KVM_PAGE) return 1;
        if (fwrite(decoded, sizeof *decoded, n, stdout) != n) return 1;
    }
    return ferror(stdin) != 0;
}
