// wgmma, mbarriers and bulk tensor copies of sm_90a: one PTX instruction per function. There is no
// host version: prefill_sm90.h holds what a CPU can check.
#pragma once

#include <cstdint>

#include "simt/simt.h"

namespace moe_offload::cuda {

SIMT_FUNCTION void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes the initialisation visible to the copy engine, before anything uses the barriers.
SIMT_FUNCTION void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
SIMT_FUNCTION void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
SIMT_FUNCTION void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Waits for the phase of this parity to complete. try_wait sleeps for a while by itself.
SIMT_FUNCTION void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Generic writes to shared memory (cp.async's too, once waited for) before the tensor cores' reads.
SIMT_FUNCTION void fence_for_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One box of a five-dimensional tensor to shared memory; its bytes count towards the barrier.
SIMT_FUNCTION void copy_box(uint32_t to, const void* tensor_map, int c0, int c3, int c4,
                            uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(tensor_map), "r"(c0), "r"(0), "r"(c3), "r"(c4), "r"(barrier)
        : "memory");
}

template <int kRegisters>
SIMT_FUNCTION void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SIMT_FUNCTION void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

SIMT_FUNCTION void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SIMT_FUNCTION void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
SIMT_FUNCTION void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}

// c [64, kN] += (or =, when not `accumulate`) a [64, 16] b [kN, 16]^T, operands by descriptor.
template <class T, int kN>
SIMT_FUNCTION void wgmma(float (&c)[kN / 2], uint64_t a, uint64_t b, int accumulate);

// clang-format off
#define ACC4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define ACC16(i) ACC4(i), ACC4(i + 4), ACC4(i + 8), ACC4(i + 12)
#define ACC64(i) ACC16(i), ACC16(i + 16), ACC16(i + 32), ACC16(i + 48)
#define WGMMA_128(T, type)                                                                         \
    template <>                                                                                   \
    SIMT_FUNCTION void wgmma<T, 128>(float (&c)[64], uint64_t a, uint64_t b, int accumulate) {      \
        asm volatile(                                                                             \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                       \
            "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                     \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
            "}, %64, %65, p, 1, 1, 0, 0;\n}"                                                 \
            : ACC64(0) : "l"(a), "l"(b), "r"(accumulate));                                          \
    }
WGMMA_128(simt::bf16, "bf16")
WGMMA_128(simt::f16, "f16")
#define WGMMA_256(T, type)                                                                         \
    template <>                                                                                   \
    SIMT_FUNCTION void wgmma<T, 256>(float (&c)[128], uint64_t a, uint64_t b, int accumulate) {      \
        asm volatile(                                                                             \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                       \
            "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                     \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
            "}, %128, %129, p, 1, 1, 0, 0;\n}"                                                 \
            : ACC64(0), ACC64(64) : "l"(a), "l"(b), "r"(accumulate));                                          \
    }
WGMMA_256(simt::bf16, "bf16")
WGMMA_256(simt::f16, "f16")
// clang-format on
#undef ACC4
#undef ACC16
#undef ACC64
#undef WGMMA_128
#undef WGMMA_256

}  // namespace moe_offload::cuda
