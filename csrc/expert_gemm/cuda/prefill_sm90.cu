// Many tokens on Hopper: wgmma on tiles of 128 (or 64) token rows times 256 weight rows.
//
// Three warpgroups per block, one block per SM. The producer keeps four stages of 48 KiB in flight:
// one bulk tensor copy for the weights, cp.async for token rows, gathered through the routing. Two
// consumers multiply; each warp frees a stage when the product after it has been issued. All walk
// the same tile list, and the producer runs ahead across tiles, so the next tile's first stages are
// there when the epilogue ends.
//
// cp.async writes through the generic proxy, wgmma reads through the async one. So the producer
// waits for its own copies of two stages ago, fences, and only then arrives; the bulk copy's bytes
// arrive by themselves. A stage is full after 128 producers, one expectation and those bytes.
//
// Not yet run on a GPU. The index logic is prefill_sm90.h, tested on the CPU.
#include <cuda.h>

#include <algorithm>

#include "expert_gemm/cuda/check.cuh"
#include "expert_gemm/cuda/epilogue.h"
#include "expert_gemm/cuda/hopper.cuh"
#include "expert_gemm/cuda/launch.h"
#include "expert_gemm/cuda/prefill_sm90.h"
#include "expert_gemm/cuda/present_groups.h"

namespace moe_offload::cuda {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct HopperShared {
    uint32_t stages, full, empty;  // shared addresses

    SIMT_FUNCTION uint32_t full_of(int64_t i) const { return full + 8 * hopper_stage(i); }
    SIMT_FUNCTION uint32_t empty_of(int64_t i) const { return empty + 8 * hopper_stage(i); }
};

template <class T, int kBlockM, bool kDown>
SIMT_FUNCTION void produce(const ExpertParams& p, const CUtensorMap& map, HopperShared at) {
    constexpr int kCopies = hopper_copies(kBlockM);
    const PresentGroups groups{p};
    TileWalker<PresentGroups> walker(groups, p.group_count(), kBlockM,
                                     hopper_feature_tiles(p, kDown));
    const bool gated = !kDown && p.gated;
    const int k_size = kDown ? p.inner_size : p.hidden;
    const int thread = simt::thread_id(), chunk = hopper_copy_chunk(thread);
    const unsigned char* tokens =
        static_cast<const unsigned char*>(kDown ? static_cast<const void*>(p.inner) : p.x);
    int64_t issued = 0;
    SIMT_NO_UNROLL for (int64_t index = simt::block_x();; index += simt::grid_x()) {
        const Tile tile = walker.at(index);
        if (tile.group < 0) break;
        const Group group = groups.group(tile.group);
        uint32_t rows[kCopies];  // in units of 16 bytes from `tokens`: fewer registers
        SIMT_UNROLL for (int i = 0; i < kCopies; ++i) {
            const int row = group.first_row + tile.row_tile * kBlockM + hopper_copy_row(thread, i);
            rows[i] = kNoRow;
            if (row < group.end_row)
                rows[i] =
                    uint32_t(int64_t(kDown ? row : p.route_of_row[row] / p.top_k) * (k_size / 8));
        }
        const int feature_group = hopper_feature_group(tile.feature_tile, gated);
        SIMT_NO_UNROLL for (int k = 0; k < k_size; k += kHopperBlockK, ++issued) {
            const uint32_t stage = at.stages + hopper_stage(issued) * hopper_stage_bytes(kBlockM);
            if (issued >= kHopperStages)
                barrier_wait(at.empty_of(issued), hopper_parity(issued - kHopperStages));
            if (thread == 0) {
                barrier_arrive_expect(at.full_of(issued), kHopperWeightBytes);
                copy_box(stage + hopper_token_bytes(kBlockM), &map, k, feature_group, group.page,
                         at.full_of(issued));
            }
            const bool inside = k + chunk * 8 < k_size;
            SIMT_UNROLL for (int i = 0; i < kCopies; ++i) {
                const bool present = inside && rows[i] != kNoRow;
                const unsigned char* from =
                    present ? tokens + uint64_t(rows[i]) * 16 + k * 2 + chunk * 16 : tokens;
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                                 stage + swizzle128(hopper_copy_row(thread, i), chunk)),
                             "l"(from), "r"(present ? 16 : 0)
                             : "memory");
            }
            simt::cp_async_commit();
            if (issued >= kHopperLag) {
                simt::cp_async_wait<kHopperLag>();
                fence_for_tensor_cores();
                barrier_arrive(at.full_of(issued - kHopperLag));
            }
        }
    }
    simt::cp_async_wait<0>();
    fence_for_tensor_cores();
    for (int64_t i = issued > kHopperLag ? issued - kHopperLag : 0; i < issued; ++i)
        barrier_arrive(at.full_of(i));
}

template <class T, int kBlockM, bool kDown>
SIMT_FUNCTION void consume(const ExpertParams& p, HopperShared at) {
    constexpr int kN = hopper_consumer_n(kBlockM);
    const PresentGroups groups{p};
    TileWalker<PresentGroups> walker(groups, p.group_count(), kBlockM,
                                     hopper_feature_tiles(p, kDown));
    const bool gated = !kDown && p.gated;
    const int num_features = kDown ? p.hidden : p.inner_size;
    const int tile_features = gated ? kHopperBlockN / 2 : kHopperBlockN;
    const int k_size = kDown ? p.inner_size : p.hidden;
    T* out = static_cast<T*>(kDown ? p.partial : p.inner);
    const int consumer = simt::thread_id() / 128 - 1, thread = simt::thread_id() % 128;
    const int first_weight = hopper_first_weight(kBlockM, consumer);
    const uint32_t a_offset = hopper_first_row(kBlockM, consumer) * kHopperRowBytes;
    const uint32_t b_offset = hopper_token_bytes(kBlockM) + first_weight * kHopperRowBytes;
    int64_t used = 0;
    SIMT_NO_UNROLL for (int64_t index = simt::block_x();; index += simt::grid_x()) {
        const Tile tile = walker.at(index);
        if (tile.group < 0) return;
        const Group group = groups.group(tile.group);
        float acc[kN / 2];
        SIMT_NO_UNROLL for (int k = 0; k < k_size; k += kHopperBlockK, ++used) {
            barrier_wait(at.full_of(used), hopper_parity(used));
            const uint32_t stage = at.stages + hopper_stage(used) * hopper_stage_bytes(kBlockM);
            const uint64_t a = wgmma_descriptor(stage + a_offset);
            const uint64_t b = wgmma_descriptor(stage + b_offset);
            wgmma_fence();
            SIMT_UNROLL for (int i = 0; i < kHopperBlockK / 16; ++i) wgmma<T, kN>(
                acc, a + i * kDescriptorNext16K, b + i * kDescriptorNext16K, k > 0 || i > 0);
            wgmma_commit();
            if (k > 0) {  // the product before this one is done: its stage is free
                wgmma_wait<1>();
                if (simt::lane_id() == 0) barrier_arrive(at.empty_of(used - 1));
            }
        }
        wgmma_wait<0>();
        if (simt::lane_id() == 0) barrier_arrive(at.empty_of(used - 1));

        const unsigned char* page = p.pages.address(group.page);
        const int first_feature = tile.feature_tile * tile_features;
        const ActivationForm form = activation_form(p);
        with_smooth<kDown>(form, [&](auto smooth) {
            SIMT_UNROLL for (int half = 0; half < 2; ++half) {
                const int row = group.first_row + tile.row_tile * kBlockM +
                                hopper_first_row(kBlockM, consumer) +
                                accumulator_row(thread, 2 * half);
                if (row >= group.end_row) continue;
                store_row<T, kN / 8, kDown, decltype(smooth)::value>(
                    p, form, page, out + int64_t(row) * num_features, first_feature, first_weight,
                    accumulator_column(thread, 0), false,
                    [&](int j, int c) -> float& { return acc[j * 4 + 2 * half + c]; });
            }
        });
    }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <class T, int kBlockM, bool kDown>
__global__ void __launch_bounds__(kHopperThreads, 1)
    prefill_sm90_kernel(const __grid_constant__ ExpertParams params,
                        const __grid_constant__ CUtensorMap weights) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char raw_shared[];
    // The swizzle is a function of address bits: stages begin at multiples of 1024.
    const uint32_t base = (simt::shared_address(raw_shared) + 1023) / 1024 * 1024;
    HopperShared at;
    at.stages = base;
    at.full = base + kHopperStages * hopper_stage_bytes(kBlockM);
    at.empty = at.full + 8 * kHopperStages;
    if (simt::thread_id() == 0) {
        for (int i = 0; i < kHopperStages; ++i) {
            barrier_init(at.full + 8 * i, kHopperProducers + 1);
            barrier_init(at.empty + 8 * i, 8);  // consumer warps
        }
        barrier_init_fence();
    }
    simt::block_sync();
    if (simt::thread_id() < kHopperProducers) {
        fewer_registers<56>();
        produce<T, kBlockM, kDown>(params, weights, at);
    } else {
        more_registers<224>();
        consume<T, kBlockM, kDown>(params, at);
    }
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found at run time: nothing links to libcuda.
EncodeTiled find_encoder(const ExpertParams& p) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)", p);
    if (found != cudaDriverEntryPointSuccess || !address)
        throw CudaError(
            "moe_offload._cuda: the driver has no cuTensorMapEncodeTiled; the sm_90a "
            "prefill needs a CUDA 12 driver or newer");
    return reinterpret_cast<EncodeTiled>(address);
}

CUtensorMap encode(const ExpertParams& p, bool down, int64_t num_slots) {
    static const EncodeTiled encoder = find_encoder(p);
    const WeightTensor t = weight_tensor(p, down, num_slots);
    const cuuint32_t unit_strides[5] = {1, 1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result = encoder(
        &map,
        p.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        5, const_cast<unsigned char*>(t.base), reinterpret_cast<const cuuint64_t*>(t.sizes),
        reinterpret_cast<const cuuint64_t*>(t.strides), t.box, unit_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw CudaError("moe_offload._cuda: cuTensorMapEncodeTiled refused the slab (error " +
                        std::to_string(int(result)) + "): H " + std::to_string(p.hidden) + ", F " +
                        std::to_string(p.inner_size) + ", slot stride " +
                        std::to_string(p.pages.slot_stride) + ", slots " +
                        std::to_string(num_slots));
    return map;
}

template <class T, int kBlockM, bool kDown>
void launch(const ExpertParams& p, int64_t num_slots, int num_sms, Stream stream) {
    const int64_t row_tiles = int64_t(p.num_tokens) * p.top_k / kBlockM + p.max_groups;
    const int64_t tiles = row_tiles * hopper_feature_tiles(p, kDown);
    const unsigned blocks = unsigned(std::min<int64_t>(tiles, num_sms));
    constexpr int kShared = hopper_shared_bytes(kBlockM);
    const char* what = kDown ? "prefill down (sm_90a)" : "prefill up (sm_90a)";
    allow_shared(prefill_sm90_kernel<T, kBlockM, kDown>, kShared, what, p);
    const CUtensorMap map = encode(p, kDown, num_slots);
    prefill_sm90_kernel<T, kBlockM, kDown>
        <<<blocks, kHopperThreads, kShared, static_cast<cudaStream_t>(stream)>>>(p, map);
    check(cudaGetLastError(), what, p);
}

template <class T>
void launch(const ExpertParams& p, int64_t num_slots, int block_m, int num_sms, Stream stream) {
    if (block_m == 64) {
        launch<T, 64, false>(p, num_slots, num_sms, stream);
        launch<T, 64, true>(p, num_slots, num_sms, stream);
    } else {
        launch<T, 128, false>(p, num_slots, num_sms, stream);
        launch<T, 128, true>(p, num_slots, num_sms, stream);
    }
}

}  // namespace

void launch_prefill_sm90(const ExpertParams& p, int64_t num_slots, int block_m, Stream stream) {
    if (p.num_tokens == 0 || p.max_groups == 0) return;
    int device = 0, num_sms = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", p);
    check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute", p);
    if (p.dtype == DType::bf16)
        launch<simt::bf16>(p, num_slots, block_m, num_sms, stream);
    else
        launch<simt::f16>(p, num_slots, block_m, num_sms, stream);
}

}  // namespace moe_offload::cuda
