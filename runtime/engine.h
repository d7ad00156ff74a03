/* engine.h - the forward pass: the stages of backend.h in order, written once. */
#ifndef KVM_ENGINE_H
#define KVM_ENGINE_H

#include <stdatomic.h>

#include "backend.h"

/* Runs the batch of plans[n_group] through the model; the logits wait in the backend. CANCELLED, with the flag
 * lowered, as soon as *cancel is found raised before a layer. */
kvmix_status kvm_engine_forward(const kvm_backend_ops *ops, kvm_backend *backend, const kvm_net *net,
                                const kvm_plan *plans, atomic_int *cancel);

#endif
