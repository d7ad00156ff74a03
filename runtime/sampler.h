/* sampler.h - logits -> token. Penalties, top-k, top-p, min-p, temperature, a seeded draw; llama.cpp's order. */
#ifndef KVM_SAMPLER_H
#define KVM_SAMPLER_H

#include "base.h"

kvmix_status kvm_sampler_open(kvmix_sampler **out, int32_t n_vocab, const kvmix_sampling *params);
void kvm_sampler_close(kvmix_sampler *sampler);
kvmix_status kvm_sampler_accept(kvmix_sampler *sampler, int32_t token);
kvmix_status kvm_sampler_sample(kvmix_sampler *sampler, const float *logits, int32_t *token);

#endif
