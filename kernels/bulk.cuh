// Copies that the hardware makes while threads do something else, and what tells when they are
// there: sm_90 and later. PTX manual: mbarrier, cp.async.bulk, cp.async.mbarrier.arrive.
#pragma once

#include "portable.cuh"

// In shared memory. A phase ends when so many threads have arrived and all bytes they expected are
// there; phases alternate between parity 0 and 1.
typedef u64 Phase;

#if defined(MOESHM_SIMT)

DEVICE void init_phase(Phase* phase, int n_arrivals) { simt_init_phase(phase, n_arrivals); }

DEVICE void publish_phases() {}

DEVICE void arrive(Phase* phase) { simt_arrive(phase, 0); }

DEVICE void arrive_expecting(Phase* phase, u32 n_bytes) { simt_arrive(phase, n_bytes); }

DEVICE void arrive_after_copies(Phase* phase) { simt_arrive_after_copies(phase); }

DEVICE void wait_for_phase(Phase* phase, u32 parity) { simt_wait_for_phase(phase, parity); }

DEVICE void copy_bulk(void* shared, const void* global, u32 n_bytes, Phase* phase) {
    simt_copy_bulk(shared, global, n_bytes, phase);
}

#else

DEVICE u32 shared_address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

// Once, by one thread, before a barrier of the block.
DEVICE void init_phase(Phase* phase, int n_arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(phase)), "r"(n_arrivals)
                 : "memory");
}

// What was initialised is seen by the copies.
DEVICE void publish_phases() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void arrive(Phase* phase) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(phase)) : "memory");
}

// Arrives, and so many bytes belong to this phase as well.
DEVICE void arrive_expecting(Phase* phase, u32 n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(phase)),
                 "r"(n_bytes)
                 : "memory");
}

// Arrives once what this thread copied by `copy_async` is there.
DEVICE void arrive_after_copies(Phase* phase) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(phase))
                 : "memory");
}

// Returns when the phase of that parity has ended.
DEVICE void wait_for_phase(Phase* phase, u32 parity) {
    u32 is_over = 0;
    while (!is_over)
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.shared.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}"
            : "=r"(is_over)
            : "r"(shared_address(phase)), "r"(parity)
            : "memory");
}

// n_bytes, a multiple of 16, to and from multiples of 16.
DEVICE void copy_bulk(void* shared, const void* global, u32 n_bytes, Phase* phase) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(n_bytes), "r"(shared_address(phase))
                 : "memory");
}

#endif
