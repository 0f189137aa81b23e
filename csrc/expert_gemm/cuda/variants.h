// Which variant of a kernel a layer runs, by table. The choice depends on sizes alone, never on
// what is resident or on time: a layer computes the same bits offloaded and resident.
//
// Evidence so far is arithmetic (docs/cuda_kernels.md); no GPU has run these kernels yet.
#pragma once

#include "expert_gemm/tile_scheduler.h"

namespace moe_offload::cuda {

struct DecodeVariant {
    int token_groups;  // of 8 tokens per pass over an expert's weights
    int up_warps;      // sharing K = H
    int down_warps;    // sharing K = F
};

// Steps of k are dealt to the warps; each needs a few more than it keeps in flight. Splitting K
// inside the block is what fills the machine: one token of Qwen3-30B has 8 x 48 tiles of gate and
// up for 132 SMs, three blocks each, 24 warps of 6 KiB. Quantised steps are two or four times as
// long in k and two are in flight, so two are asked for.
TILE_FUNCTION int decode_warps(int k_size, int bits, bool transposed) {
    const int step_k = transposed ? 16 : 4 * 128 / bits;  // of decode_product.h and its transposed
    const int steps = ceil_div(k_size, step_k);
    const int enough_for = steps / (bits < 16 ? 2 : 4);
    return enough_for >= 8 ? 8 : enough_for >= 4 ? 4 : enough_for >= 2 ? 2 : 1;
}

// A pass reads an expert's weights once for 8 token_groups tokens; a second pass finds them in L2.
// Up to 8 tokens no expert has more than 8 rows. Above, the widest pass that most experts fill:
// registers of a wider one cost loads in flight.
TILE_FUNCTION DecodeVariant choose_decode(int num_tokens, int top_k, int num_experts, int hidden,
                                          int inner_size, int bits, bool transposed = false) {
    const int rows_per_expert = ceil_div(num_tokens * top_k, num_experts);
    const int groups = num_tokens <= 8 ? 1 : num_tokens <= 16 || rows_per_expert <= 6 ? 2 : 4;
    return {groups, decode_warps(hidden, bits, transposed),
            decode_warps(inner_size, bits, transposed)};
}

// Above this many rows per expert the tensor cores' rate matters and prefill's tiles take over:
// its 64-row tile reads weights once per 64 rows, and a decode pass of 32 rows would read twice.
TILE_FUNCTION bool use_decode(int num_tokens, int top_k, int num_experts) {
    return num_tokens <= 8 || ceil_div(num_tokens * top_k, num_experts) <= 24;
}

// Tile rows of the prefill kernels: half-empty tiles waste arithmetic, small ones weight traffic.
TILE_FUNCTION int choose_block_m(int num_tokens, int top_k, int num_experts) {
    return ceil_div(num_tokens * top_k, num_experts) <= 64 ? 64 : 128;
}

}  // namespace moe_offload::cuda
