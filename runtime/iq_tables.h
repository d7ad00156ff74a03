/* iq_tables.h - the levels and grids of ggml's IQ formats and of MXFP4; iq_tables.c is written by a script.
 *
 * A level is a small integer that a scale multiplies, and has an index of 4 bits. IQ4 and MXFP4 store the indexes. The
 * others store entries of a grid, that is of a list of the groups of indexes that may occur: four indexes, a byte each,
 * in IQ3; eight in IQ1 and IQ2, a nibble each - index i in the low nibble of byte i, index i + 4 in the high one. Bit 3
 * of an index is clear in a grid: a block has it apart. Of IQ2 and IQ3 it negates the level; of IQ1, whose levels are
 * eighths, it says which way they are shifted.
 */
#ifndef KVM_IQ_TABLES_H
#define KVM_IQ_TABLES_H

#include <stdint.h>

extern const int8_t kvm_levels_iq1[16], kvm_levels_iq2[16], kvm_levels_iq3_xxs[16], kvm_levels_iq3_s[16];
extern const int8_t kvm_levels_iq4[16], kvm_levels_mxfp4[16];

extern const uint32_t kvm_grid_iq1_s[2048]; /* of IQ1_M too */
extern const uint32_t kvm_grid_iq2_xxs[256], kvm_grid_iq2_xs[512], kvm_grid_iq2_s[1024];
extern const uint32_t kvm_grid_iq3_xxs[256], kvm_grid_iq3_s[512];

#endif
