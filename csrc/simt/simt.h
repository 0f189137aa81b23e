// The small vocabulary our kernels are written in, so that one source runs twice: compiled by nvcc
// on a GPU (device.h: intrinsics and a few lines of PTX), and on any CPU as emulation (host.h: the
// threads of a block are fibers). Tests run every kernel of the sm_80 class through the second, on
// small shapes, under the address sanitizer; no GPU is needed to know that an index is right.
//
// A kernel is a function `body(const Params&, unsigned char* shared)` marked SIMT_FUNCTION. What a
// thread is, it asks: thread_id(), block_x(), block_y(). Warp operations take the whole warp.
//
//   words      thread_id lane_id warp_id block_x block_y grid_x grid_y | block_sync warp_sync
//              shuffle shuffle_xor ballot match_any | mma ldmatrix_x4 | cp_async cp_async_commit
//              cp_async_wait | load16 load8 load4 load2 load1 store16 store8 store4 | fma2
//              byte_permute | atomic_add thread_fence fast_exp reciprocal wait_for_previous_kernel
//              let_next_kernel_start opaque
//
// What emulation cannot show: speed, and races between blocks beyond their order (blocks run one
// after another, in any order asked for). No kernel here waits for another block.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SIMT_FUNCTION __device__ __forceinline__
#define SIMT_BOTH __host__ __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_NO_UNROLL _Pragma("unroll 1")
#else
#define SIMT_FUNCTION inline
#define SIMT_BOTH inline
#define SIMT_UNROLL
#define SIMT_NO_UNROLL
#endif

namespace simt {

constexpr int kWarpSize = 32;

// Sixteen bytes, the widest access of one thread.
struct alignas(16) U4 {
    uint32_t word[4];
};

// The 16-bit operand types of the matrix instructions, as bits: no CUDA header is needed.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// How long a load's line is worth keeping. Weights are read once per launch and must not push the
// activations, which every block reads, out of L2.
enum class Keep {
    normal,
    streamed,  // read-only, not kept in L1, first to leave L2
    reused,    // read-only, kept in L1 and L2
    coherent,  // written by other blocks of this launch: past L1
};

}  // namespace simt

#if defined(__CUDACC__)
#include "simt/device.h"
#else
#include "simt/host.h"
#endif

namespace simt {

SIMT_FUNCTION int lane_id() { return thread_id() & (kWarpSize - 1); }
SIMT_FUNCTION int warp_id() { return thread_id() / kWarpSize; }

// Two neighbouring values in one register, the lower index in the lower half.
template <class T>
SIMT_FUNCTION uint32_t pack(float low, float high) {
    return uint32_t(from_float<T>(low).bits) | (uint32_t(from_float<T>(high).bits) << 16);
}
template <class T>
SIMT_FUNCTION float unpack_low(uint32_t pair) {
    return to_float(T{uint16_t(pair & 0xffff)});
}
template <class T>
SIMT_FUNCTION float unpack_high(uint32_t pair) {
    return to_float(T{uint16_t(pair >> 16)});
}

}  // namespace simt
