/* engine.c - see engine.h. */
#include "engine.h"

kvmix_status kvm_engine_forward(const kvm_backend_ops *ops, kvm_backend *backend, const kvm_net *net,
                                const kvm_plan *plans, atomic_int *cancel) {
    KVM_TRY(ops->embed(backend, &plans[0]));
    for (int32_t i = 0; i < net->n_layer; i++) {
        if (atomic_exchange(cancel, 0)) return kvm_fail(KVMIX_CANCELLED, "cancelled in layer %d of %d", i, net->n_layer);
        const kvm_plan *plan = &plans[net->layers[i].group];
        KVM_TRY(ops->attn_in(backend, i, plan));
        KVM_TRY(ops->pack(backend, i, plan));
        KVM_TRY(ops->attend(backend, i, plan));
        KVM_TRY(ops->attn_out(backend, i, plan));
        KVM_TRY(ops->ffn(backend, i, plan));
    }
    return ops->head(backend, &plans[0]);
}
