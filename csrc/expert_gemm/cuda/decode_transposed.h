// One warp's part of a decode tile's product for plain matrices stored [k, rows], as transformers'
// gpt-oss has them in bf16: 16 bytes are eight neighbouring rows of one k.
//
// Lane (g, t) loads its eight rows, 8g .. 8g+7 of the tile's 64, for k = 4t .. 4t+3 of a step of
// 16: eight lanes together whole lines of 128 bytes. The instruction wants pairs of k in a
// register, so words of two loads change halves: one byte permute per register, 16 beside the 2 KiB
// of a step, where the main loop has about 100 instructions. Word b of the loads gives rows 2b and
// 2b + 1, which become rows g and g + 8 of the instruction's block b (DecodeTile::block). Which k
// an element is does not matter as long as both operands agree: tokens are loaded as k = 4t .. 4t+3
// too, in 8 bytes.
//
// Worked example: lane (1, 2), first block: of rows 8 and 9 it has k = 8, 9, 10, 11. Its registers
// are row 8's (k 8, k 9), row 9's, row 8's (k 10, k 11), row 9's.
#pragma once

#include "expert_gemm/cuda/decode_product.h"
#include "expert_gemm/cuda/decode_tile.h"
#include "expert_gemm/cuda/weight_formats.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

// Steps of 2 KiB in registers. Three for two token groups spill 12 bytes on sm_120.
TILE_FUNCTION constexpr int decode_transposed_depth(int token_groups) {
    return token_groups == 4 ? 4 : token_groups == 2 ? 2 : 3;
}

template <class T, int kTokenGroups>
class DecodeWarp<T, TransposedWeights<T>, kTokenGroups> {
    using Tile = DecodeTile<true>;
    static constexpr int kStepK = 16;
    static constexpr int kLaneK = 4;
    static constexpr int kDepth = decode_transposed_depth(kTokenGroups);
    struct Step {
        simt::U4 weights[kLaneK];  // of one k each
        uint32_t tokens[kTokenGroups][2];
    };

  public:
    struct Rows {
        int first;  // this lane's eight rows
    };
    SIMT_FUNCTION static Rows rows_of(const Tile& tile) {
        return {tile.row(simt::lane_id() / 4 * 8)};
    }

    SIMT_FUNCTION DecodeWarp(const WeightMatrix& matrix, const Rows& rows, int warp, int num_warps)
        : rows_(matrix.codes + int64_t(rows.first) * 2),
          k_bytes_(matrix.rows * 2),
          k_size_(matrix.k_size),
          stride_(num_warps * kStepK),
          first_(warp * kStepK) {
        SIMT_UNROLL for (int d = 0; d < kDepth; ++d) load_weights(steps_[d], first_ + d * stride_);
    }

    SIMT_FUNCTION void multiply(const T* const (&tokens)[kTokenGroups],
                                float (&acc)[Tile::kBlocks][kTokenGroups][4]) {
        SIMT_UNROLL for (int d = 0; d < kDepth; ++d)
            load_tokens(steps_[d], tokens, first_ + d * stride_);
        SIMT_NO_UNROLL for (int k = first_; k < k_size_; k += kDepth * stride_) {
            SIMT_UNROLL for (int d = 0; d < kDepth; ++d) {
                if (k + d * stride_ >= k_size_) break;  // the same for the whole warp
                compute(steps_[d], acc);
                load_weights(steps_[d], k + (d + kDepth) * stride_);
                load_tokens(steps_[d], tokens, k + (d + kDepth) * stride_);
            }
        }
    }

  private:
    // In the step that K ends in, lanes past the end bring zeros for the tokens, times other
    // weights of the same rows.
    SIMT_FUNCTION void load_weights(Step& step, int k) const {
        if (k >= k_size_) return;  // the same for the whole warp
        const int mine = k + simt::lane_id() % 4 * kLaneK;
        const int at = mine < k_size_ ? mine : k_size_ - kLaneK;
        const unsigned char* from = rows_ + int64_t(at) * k_bytes_;
        SIMT_UNROLL for (int i = 0; i < kLaneK; ++i) step.weights[i] =
            simt::load16<simt::Keep::streamed>(from + int64_t(i) * k_bytes_);
    }
    SIMT_FUNCTION void load_tokens(Step& step, const T* const (&tokens)[kTokenGroups],
                                   int k) const {
        if (k >= k_size_) return;
        const int at = k + simt::lane_id() % 4 * kLaneK;
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
            step.tokens[j][0] = step.tokens[j][1] = 0;
            if (at < k_size_)
                simt::load8<simt::Keep::normal>(tokens[j] + at, step.tokens[j][0],
                                                step.tokens[j][1]);
        }
    }
    SIMT_FUNCTION static void compute(const Step& step,
                                      float (&acc)[Tile::kBlocks][kTokenGroups][4]) {
        constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
        SIMT_UNROLL for (int block = 0; block < Tile::kBlocks; ++block) {
            uint32_t word[kLaneK];
            SIMT_UNROLL for (int i = 0; i < kLaneK; ++i) word[i] = step.weights[i].word[block];
            const uint32_t a[4] = {simt::byte_permute(word[0], word[1], kLowHalves),
                                   simt::byte_permute(word[0], word[1], kHighHalves),
                                   simt::byte_permute(word[2], word[3], kLowHalves),
                                   simt::byte_permute(word[2], word[3], kHighHalves)};
            SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j)
                simt::mma<T>(acc[block][j], a, step.tokens[j]);
        }
    }

    const unsigned char* rows_;
    int k_bytes_;  // from one k to the next
    int k_size_;
    int stride_, first_;
    Step steps_[kDepth] = {};
};

}  // namespace moe_offload::cuda
