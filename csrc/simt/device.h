// The vocabulary of simt.h on a GPU, sm_80 and newer: each word is an intrinsic or one PTX
// instruction. Memory orders and fragment layouts are those of the PTX ISA manual; host.h models
// them and csrc/tests/test_simt.cpp checks the model against a plain matrix product.
#pragma once

namespace simt {

SIMT_FUNCTION int thread_id() { return int(threadIdx.x); }
SIMT_FUNCTION int block_x() { return int(blockIdx.x); }
SIMT_FUNCTION int block_y() { return int(blockIdx.y); }
SIMT_FUNCTION int grid_x() { return int(gridDim.x); }
SIMT_FUNCTION int grid_y() { return int(gridDim.y); }

// The same number, as one the compiler knows nothing of: what is computed from it a second time is
// computed, not kept in registers since the first.
SIMT_FUNCTION int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

SIMT_FUNCTION void block_sync() { __syncthreads(); }
SIMT_FUNCTION void warp_sync() { __syncwarp(); }

template <class V>
SIMT_FUNCTION V shuffle(V value, int source_lane) {
    return __shfl_sync(0xffffffffu, value, source_lane);
}
template <class V>
SIMT_FUNCTION V shuffle_xor(V value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
SIMT_FUNCTION uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
SIMT_FUNCTION uint32_t match_any(uint32_t value) { return __match_any_sync(0xffffffffu, value); }

template <class T>
SIMT_FUNCTION T from_float(float value);
template <>
SIMT_FUNCTION bf16 from_float<bf16>(float value) {
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    return out;
}
template <>
SIMT_FUNCTION f16 from_float<f16>(float value) {
    f16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    return out;
}
SIMT_FUNCTION float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
SIMT_FUNCTION float to_float(f16 value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
    return out;
}

// a * b + c of both halves, rounded once; subnormals count. sm_80 has no plain bf16 product.
template <class T>
SIMT_FUNCTION uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
SIMT_FUNCTION uint32_t fma2<bf16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}
template <>
SIMT_FUNCTION uint32_t fma2<f16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// Four of the eight bytes of (high, low), chosen by the four lower nibbles, each 0 to 7.
SIMT_FUNCTION uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t choice) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(choice));
    return out;
}

SIMT_FUNCTION float fast_exp(float x) { return __expf(x); }
// Off by one unit in the last place; 0 for infinity.
SIMT_FUNCTION float reciprocal(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

template <class T>
SIMT_FUNCTION void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define SIMT_MMA(T, name)                                                                      \
    template <>                                                                                \
    SIMT_FUNCTION void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                             \
            ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                       \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                   \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));               \
    }
SIMT_MMA(bf16, "bf16")
SIMT_MMA(f16, "f16")
#undef SIMT_MMA

SIMT_FUNCTION uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

SIMT_FUNCTION void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
SIMT_FUNCTION void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// `source_bytes` of 16, the rest zeros; 0 reads nothing (the address must still be a valid one).
SIMT_FUNCTION void cp_async(void* shared, const void* global, int source_bytes) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(global), "r"(source_bytes)
        : "memory");
}
SIMT_FUNCTION void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewestGroupsLeft>
SIMT_FUNCTION void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNewestGroupsLeft) : "memory");
}

template <Keep kKeep>
SIMT_FUNCTION U4 load16(const void* pointer) {
    U4 v;
    if constexpr (kKeep == Keep::streamed) {
        uint64_t policy;  // not volatile: made once per kernel
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                     : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                     : "l"(pointer), "l"(policy));
    } else if constexpr (kKeep == Keep::reused) {
        asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                     : "l"(pointer));
    } else if constexpr (kKeep == Keep::coherent) {
        asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                     : "l"(pointer)
                     : "memory");
    } else {
        asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                     : "l"(pointer)
                     : "memory");
    }
    return v;
}
// Small read-only loads of what several warps, or the next step, read: kept in L1.
template <Keep kKeep>  // normal or reused
SIMT_FUNCTION void load8(const void* pointer, uint32_t& low, uint32_t& high) {
    if constexpr (kKeep == Keep::reused) {
        asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(low), "=r"(high) : "l"(pointer));
    } else {
        asm volatile("ld.global.v2.u32 {%0,%1}, [%2];"
                     : "=r"(low), "=r"(high)
                     : "l"(pointer)
                     : "memory");
    }
}
SIMT_FUNCTION uint32_t load4(const void* pointer) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(pointer));
    return v;
}
SIMT_FUNCTION uint32_t load2(const void* pointer) {
    uint16_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(pointer));
    return v;
}
SIMT_FUNCTION uint32_t load1(const void* pointer) {
    uint32_t v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(pointer));
    return v;
}
SIMT_FUNCTION void store16(void* pointer, U4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

SIMT_FUNCTION void store8(void* pointer, uint32_t low, uint32_t high) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(pointer), "r"(low), "r"(high) : "memory");
}
SIMT_FUNCTION void store4(void* pointer, uint32_t v) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}

SIMT_FUNCTION int atomic_add(int* counter, int value) { return atomicAdd(counter, value); }
SIMT_FUNCTION void thread_fence() { __threadfence(); }

// Programmatic dependent launch: on sm_90 and newer a kernel launched with the attribute starts
// while the one before it drains, and may touch nothing that one writes until it has waited.
SIMT_FUNCTION void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SIMT_FUNCTION void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace simt
