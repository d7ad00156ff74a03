/* gguf_split.h - a model in several GGUF files, opened by the name of the first.
 *
 * Part i of n, counted from 1, is named ...-0000i-of-0000n.gguf and says so: split.no (from 0) and split.count. The
 * first part has the model's keys, and split.tensors.count, the number of tensors in all of them.
 */
#ifndef KVM_GGUF_SPLIT_H
#define KVM_GGUF_SPLIT_H

#include "gguf.h"

/* kvm_gguf_open, and for the first part of a split model all others too: their tensors are found as those of *out.
 * Besides kvm_gguf_open's failures, of any part: FORMAT, where the parts do not make one model. */
kvmix_status kvm_gguf_split_open(kvm_gguf **out, const char *path, bool use_mmap);

#endif
