// The launchers of launch.h without a GPU: the kernels' own source, run on the CPU by csrc/simt.
//
// Linked with the real bindings.cpp this is a `moe_offload._cuda` whose pointers are host memory,
// so the Python side of the kernels, the bindings, and paging with them are tested to the last bit
// where no GPU is (tests/emulated_cuda.py builds it). Grids are as small as they may be, blocks run
// one after the other; the stream is not looked at, everything is done when a launcher returns.
#include <algorithm>

#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/decode.h"
#include "expert_gemm/cuda/launch.h"
#include "expert_gemm/cuda/prefill_sm80.h"

namespace moe_offload::cuda {
namespace {

constexpr int kBlocks = 2;  // of persistent kernels: two, so that tiles are shared out
constexpr int kCombineThreads = 256;

template <class T, int kTokenGroups>
void decode(const ExpertParams& p, const DecodeVariant& v) {
    const int groups = std::max(1, p.max_groups);
    simt::launch(
        {.grid_x = decode_feature_tiles(p, false),
         .grid_y = groups,
         .threads = 32 * v.up_warps,
         .shared_bytes = decode_shared_bytes(v.up_warps, kTokenGroups)},
        [&](unsigned char* s) { decode_up<T, PlainWeights<T>, kTokenGroups>(p, v.up_warps, s); });
    simt::launch({.grid_x = decode_feature_tiles(p, true),
                  .grid_y = groups,
                  .threads = 32 * v.down_warps,
                  .shared_bytes = decode_shared_bytes(v.down_warps, kTokenGroups)},
                 [&](unsigned char* s) {
                     decode_down<T, PlainWeights<T>, kTokenGroups>(p, v.down_warps, s);
                 });
}

template <class T>
void decode(const ExpertParams& p, const DecodeVariant& v) {
    if (v.token_groups == 1)
        decode<T, 1>(p, v);
    else if (v.token_groups == 2)
        decode<T, 2>(p, v);
    else
        decode<T, 4>(p, v);
}

template <class T, int kBlockM>
void prefill_both(const ExpertParams& p) {
    constexpr int kStages = prefill_stages(kBlockM);
    const simt::Launch config{.grid_x = kBlocks,
                              .threads = kPrefillThreads,
                              .shared_bytes = kStages * prefill_stage_bytes(kBlockM)};
    simt::launch(config, [&](unsigned char* s) {
        prefill<T, PlainWeights<T>, kBlockM, kStages, false>(p, s);
    });
    simt::launch(config, [&](unsigned char* s) {
        prefill<T, PlainWeights<T>, kBlockM, kStages, true>(p, s);
    });
}

template <class T>
void combine(const ExpertParams& p) {
    const int blocks = ceil_div(p.num_tokens * (p.hidden / 8), kCombineThreads);
    simt::launch({.grid_x = blocks, .threads = kCombineThreads},
                 [&](unsigned char*) { combine_rows<T>(p, kCombineThreads); });
}

// Quantised pages are emulated by test_emulated_*.cpp; here they would double the time to compile.
void plain_only(const ExpertParams& p) {
    if (p.pages.format != WeightFormat::plain) throw CudaError("quantised: not emulated here");
}

}  // namespace

void launch_decode(const ExpertParams& p, const DecodeVariant& v, bool, Stream) {
    if (p.num_tokens == 0) return;
    plain_only(p);
    if (p.dtype == DType::bf16)
        decode<simt::bf16>(p, v);
    else
        decode<simt::f16>(p, v);
}

void launch_prefill(const ExpertParams& p, int block_m, Stream) {
    if (p.num_tokens == 0 || p.max_groups == 0) return;
    plain_only(p);
    if (p.dtype == DType::bf16)
        block_m == 64 ? prefill_both<simt::bf16, 64>(p) : prefill_both<simt::bf16, 128>(p);
    else
        block_m == 64 ? prefill_both<simt::f16, 64>(p) : prefill_both<simt::f16, 128>(p);
}

void launch_prefill_sm90(const ExpertParams&, int64_t, int, Stream) {
    throw CudaError("prefill_sm90: TMA and wgmma are not emulated");
}

void launch_combine(const ExpertParams& p, Stream) {
    if (p.num_tokens == 0) return;
    if (p.dtype == DType::bf16)
        combine<simt::bf16>(p);
    else
        combine<simt::f16>(p);
}

}  // namespace moe_offload::cuda
