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

template <class T, class Format, int kTokenGroups>
void decode(const ExpertParams& p, const DecodeVariant& v) {
    const int groups = std::max(1, p.max_groups);
    simt::launch({.grid_x = decode_feature_tiles<Format>(p, false),
                  .grid_y = groups,
                  .threads = 32 * v.up_warps,
                  .shared_bytes = decode_shared_bytes<Format>(v.up_warps, kTokenGroups)},
                 [&](unsigned char* s) { decode_up<T, Format, kTokenGroups>(p, v.up_warps, s); });
    simt::launch(
        {.grid_x = decode_feature_tiles<Format>(p, true),
         .grid_y = groups,
         .threads = 32 * v.down_warps,
         .shared_bytes = decode_shared_bytes<Format>(v.down_warps, kTokenGroups)},
        [&](unsigned char* s) { decode_down<T, Format, kTokenGroups>(p, v.down_warps, s); });
}

template <class T, class Format>
void decode(const ExpertParams& p, const DecodeVariant& v) {
    if (v.token_groups == 1)
        decode<T, Format, 1>(p, v);
    else if (v.token_groups == 2)
        decode<T, Format, 2>(p, v);
    else
        decode<T, Format, 4>(p, v);
}

template <class T, class Format, int kBlockM>
void prefill_both(const ExpertParams& p) {
    constexpr int kStages = prefill_stages(kBlockM);
    const simt::Launch config{.grid_x = kBlocks,
                              .threads = kPrefillThreads,
                              .shared_bytes = kStages * prefill_stage_bytes(kBlockM)};
    simt::launch(config,
                 [&](unsigned char* s) { prefill<T, Format, kBlockM, kStages, false>(p, s); });
    simt::launch(config,
                 [&](unsigned char* s) { prefill<T, Format, kBlockM, kStages, true>(p, s); });
}

template <class T>
void combine(const ExpertParams& p) {
    const int blocks = ceil_div(p.num_tokens * (p.hidden / 8), kCombineThreads);
    simt::launch({.grid_x = blocks, .threads = kCombineThreads},
                 [&](unsigned char*) { combine_rows<T>(p, kCombineThreads); });
}

// Calls `run(T, Format)` with values of the types that this launch is for.
template <class Run>
void with_format(const ExpertParams& p, Run&& run) {
    using bf16 = simt::bf16;
    using f16 = simt::f16;
    const bool is_bf16 = p.dtype == DType::bf16;
    if (p.pages.format == WeightFormat::plain && p.pages.transposed)
        return is_bf16 ? run(bf16{}, TransposedWeights<bf16>{})
                       : run(f16{}, TransposedWeights<f16>{});
    if (p.pages.format == WeightFormat::plain)
        return is_bf16 ? run(bf16{}, PlainWeights<bf16>{}) : run(f16{}, PlainWeights<f16>{});
    // fp16 with these is emulated by test_emulated_*.cpp; here it would take longer to compile.
    if (!is_bf16) throw CudaError("quantised with fp16: not emulated here");
    if (p.pages.format == WeightFormat::fp8_block) return run(bf16{}, Fp8BlockWeights<bf16>{});
    if (p.pages.format == WeightFormat::mxfp4) return run(bf16{}, Mxfp4Weights{});
    return run(bf16{}, Int4GroupWeights<bf16>{});
}

}  // namespace

void launch_decode(const ExpertParams& p, const DecodeVariant& v, bool, Stream) {
    if (p.num_tokens == 0) return;
    with_format(p, [&](auto t, auto format) { decode<decltype(t), decltype(format)>(p, v); });
}

void launch_prefill(const ExpertParams& p, int block_m, Stream) {
    if (p.num_tokens == 0 || p.max_groups == 0) return;
    with_format(p, [&](auto t, auto format) {
        using T = decltype(t);
        using Format = decltype(format);
        block_m == 64 ? prefill_both<T, Format, 64>(p) : prefill_both<T, Format, 128>(p);
    });
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
