// One warp's part of a decode tile's product, weights from memory to registers to the matrix
// instruction, for matrices stored [rows, k]. decode_transposed.h is the same for [k, rows].
//
// Weights go from memory to registers in 16-byte loads and never see shared memory: which k an
// element is does not matter to a dot product as long as both operands agree. Lane (g, t) = (lane
// / 4, lane % 4) loads k = 8t .. 8t+7 of row g; the instruction wants k pairs {2t, 2t+8} there, so
// its first issue takes words 0 and 1 of the load as those pairs, the second words 2 and 3, and
// the tokens are loaded the same way. Worked example: in the first issue the instruction's k = 2
// (t = 1, first register) is really k = 8, and its k = 10 (second register) is k = 10.
//
// Quantised weights are loaded the same way, so a lane's 16 bytes are k = 16t ... of a step of 64
// (fp8) or 32t ... of a step of 128 (4 bits); eight at a time they become such operands in
// registers (weight_formats.h) and meet the eight values of their token.
//
// In flight: a step is 16 bytes per lane of 32 rows, 2 KiB per warp, and two or three steps are in
// registers. With 128 registers 16 warps fit an SM: 64 to 96 KiB in flight, where 33 KiB saturate
// an H200 (4.3 TB/s x 1 us / 132).
#pragma once

#include "expert_gemm/cuda/decode_tile.h"
#include "expert_gemm/cuda/weight_formats.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

// k of one step of one warp: four lanes' 16 bytes of a row.
TILE_FUNCTION constexpr int decode_step_k(int bits) { return 4 * 128 / bits; }

// Steps of weights in registers. Two token groups spill with three at 128 registers per thread, and
// so does one with quantised weights, which are unpacked beside them; four do not fit 128 at all
// and run with one block of eight warps per SM.
TILE_FUNCTION constexpr int decode_depth(int token_groups, int bits) {
    return token_groups == 2 || (token_groups == 1 && bits < 16) ? 2 : 3;
}

// Eights of k whose token values are in registers; divides the eights of decode_depth steps.
TILE_FUNCTION constexpr int decode_token_slots(int token_groups, int bits) {
    return bits < 16 ? 2 : decode_depth(token_groups, bits);
}

// One warp's steps of the product of 32 weight rows and 8 kTokenGroups tokens.
template <class T, class Format, int kTokenGroups>
class DecodeWarp {
  public:
    // This lane's weight rows: g and g + 8 of the first block, g and g + 8 of the second.
    struct Rows {
        int row[4];
    };
    SIMT_FUNCTION static Rows rows_of(const DecodeTile<false>& tile) {
        Rows rows;
        SIMT_UNROLL for (int i = 0; i < 4; ++i) rows.row[i] = tile.row(simt::lane_id() / 4 + 8 * i);
        return rows;
    }

    SIMT_FUNCTION DecodeWarp(const WeightMatrix& matrix, const Rows& rows, int warp, int num_warps)
        : matrix_(matrix), stride_(num_warps * kStepK), first_(warp * kStepK) {
        SIMT_UNROLL for (int i = 0; i < 4; ++i) rows_[i] =
            uint32_t(rows.row[i]) * uint32_t(matrix.k_size / 8 * Format::kBits);
        SIMT_UNROLL for (int i = 0; i < kScales; ++i) scale_rows_[i] =
            Format::scale_row(matrix, rows.row[i * 4 / kScales]);
        SIMT_UNROLL for (int d = 0; d < kDepth; ++d) load_weights(steps_[d], first_ + d * stride_);
    }

    // tokens[j]: this lane's token of group j (column g), its row in x or inner.
    SIMT_FUNCTION void multiply(const T* const (&tokens)[kTokenGroups],
                                float (&acc)[2][kTokenGroups][4]) {
        const int lane_k = simt::lane_id() % 4 * kLaneK;
        simt::U4 values[kSlots][kTokenGroups];
        SIMT_UNROLL for (int i = 0; i < kSlots; ++i)
            load_tokens(values[i], tokens, first_ + i / kParts * stride_, lane_k + i % kParts * 8);
        SIMT_NO_UNROLL for (int k = first_; k < matrix_.k_size; k += kDepth * stride_) {
            SIMT_UNROLL for (int d = 0; d < kDepth; ++d) {
                if (k + d * stride_ >= matrix_.k_size) break;  // the same for the whole warp
                float sums[2][kTokenGroups][4] = {};
                SIMT_UNROLL for (int part = 0; part < kParts; ++part) {
                    const int eight = d * kParts + part, ahead = eight + kSlots;
                    if constexpr (Format::kScaleSums)
                        compute(steps_[d], part, values[eight % kSlots], sums);
                    else
                        compute(steps_[d], part, values[eight % kSlots], acc);
                    if (part == kParts - 1) {
                        if constexpr (Format::kScaleSums) add_scaled(steps_[d], sums, acc);
                        load_weights(steps_[d], k + (d + kDepth) * stride_);
                    }
                    load_tokens(values[eight % kSlots], tokens, k + ahead / kParts * stride_,
                                lane_k + ahead % kParts * 8);
                }
            }
        }
    }

  private:
    static constexpr int kParts = 16 / Format::kBits;  // eights of k in 16 bytes
    static constexpr int kLaneK = 8 * kParts;
    static constexpr int kStepK = decode_step_k(Format::kBits);
    static constexpr int kDepth = decode_depth(kTokenGroups, Format::kBits);
    static constexpr int kSlots = decode_token_slots(kTokenGroups, Format::kBits);
    static constexpr int kScales = Format::kRowsPerScale ? 4 / Format::kRowsPerScale : 0;
    static_assert(kDepth * kParts % kSlots == 0);
    struct Step {
        simt::U4 weights[4];
        uint32_t scales[kScales ? kScales : 1];
    };

    // Steps past the end are neither loaded nor computed. In a step that K ends in, lanes past the
    // end bring zeros for the tokens, times the last weights of the same row.
    SIMT_FUNCTION void load_weights(Step& step, int k) const {
        if (k >= matrix_.k_size) return;  // the same for the whole warp
        const int mine = k + simt::lane_id() % 4 * kLaneK;
        const int at = mine < matrix_.k_size ? mine : matrix_.k_size - kLaneK;
        SIMT_UNROLL for (int i = 0; i < 4; ++i) step.weights[i] =
            simt::load16<simt::Keep::streamed>(matrix_.codes +
                                               (rows_[i] + uint32_t(at) / 8 * Format::kBits));
        SIMT_UNROLL for (int i = 0; i < kScales; ++i) step.scales[i] =
            Format::load_scale(matrix_, scale_rows_[i], at);
    }
    SIMT_FUNCTION void load_tokens(simt::U4 (&values)[kTokenGroups],
                                   const T* const (&tokens)[kTokenGroups], int k,
                                   int lane_k) const {
        if (k >= matrix_.k_size) return;
        const int at = k + lane_k;
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) values[j] =
            at < matrix_.k_size ? simt::load16<simt::Keep::normal>(tokens[j] + at) : simt::U4{};
    }
    SIMT_FUNCTION static void compute(const Step& step, int part,
                                      const simt::U4 (&values)[kTokenGroups],
                                      float (&acc)[2][kTokenGroups][4]) {
        simt::U4 weights[4];
        SIMT_UNROLL for (int i = 0; i < 4; ++i) weights[i] =
            Format::unpack(step.weights[i], part, step.scales[kScales ? i * kScales / 4 : 0]);
        SIMT_UNROLL for (int issue = 0; issue < 4; issue += 2)
            SIMT_UNROLL for (int block = 0; block < 2; ++block) {
            const simt::U4& low = weights[2 * block];
            const simt::U4& high = weights[2 * block + 1];
            const uint32_t a[4] = {low.word[issue], high.word[issue], low.word[issue + 1],
                                   high.word[issue + 1]};
            SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
                const simt::U4& x = values[j];
                const uint32_t b[2] = {x.word[issue], x.word[issue + 1]};
                simt::mma<T>(acc[block][j], a, b);
            }
        }
    }
    SIMT_FUNCTION static void add_scaled(const Step& step, const float (&sums)[2][kTokenGroups][4],
                                         float (&acc)[2][kTokenGroups][4]) {
        SIMT_UNROLL for (int block = 0; block < 2; ++block) {
            const float scale = Format::scale_of(step.scales[block]);
            SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j)
                SIMT_UNROLL for (int i = 0; i < 4; ++i) acc[block][j][i] +=
                scale * sums[block][j][i];
        }
    }

    WeightMatrix matrix_;
    uint32_t rows_[4];  // bytes from matrix_.codes
    uint32_t scale_rows_[kScales ? kScales : 1];
    int stride_, first_;
    Step steps_[kDepth] = {};
};

}  // namespace moe_offload::cuda
