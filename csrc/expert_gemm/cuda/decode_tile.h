// Which weight rows a decode block's tile has, for matrices stored [rows, k] and for transposed
// ones, [k, rows] (transformers' gpt-oss).
//
// A tile is 32 rows, in two blocks of the instruction's 16; gated, 16 features' gate rows and then
// their up rows. Transposed it is 64 in four, because a lane's 16 bytes are eight neighbouring rows
// of one k, and eight lanes then read whole 128-byte lines: 32 gate rows and their up rows, or, in
// matrices whose gate and up alternate, those 64 neighbours as they are.
#pragma once

#include "expert_gemm/cuda/params.h"

namespace moe_offload::cuda {

template <bool kTransposed>
struct DecodeTile {
    static constexpr int kRows = kTransposed ? 64 : 32;
    static constexpr int kBlocks = kRows / 16;  // of 16 rows, the instruction's M

    int first_feature, num_features;
    bool gated, interleaved;

    TILE_FUNCTION static DecodeTile make(const ExpertParams& p, bool down, int tile) {
        const bool gated = !down && p.gated;
        const int features = down ? p.hidden : p.inner_size;
        return {tile * (gated ? kRows / 2 : kRows), features, gated, p.interleaved};
    }
    TILE_FUNCTION int features() const { return gated ? kRows / 2 : kRows; }

    // Where the tile has the gate row and the up row of its n-th feature; ungated, gate(n) is n.
    TILE_FUNCTION int gate(int n) const { return alternate() ? 2 * n : n; }
    TILE_FUNCTION int up(int n) const { return alternate() ? 2 * n + 1 : n + kRows / 2; }

    // The matrix's row of the tile's local-th; past the last feature, one that is computed and not
    // stored. Transposed, for multiples of 8 only: with the seven that follow it.
    TILE_FUNCTION int row(int local) const {
        const int run = !kTransposed ? 1 : alternate() ? 4 : 8;  // features read together
        const bool is_up = gated && !alternate() && local >= kRows / 2;
        int feature = first_feature + (alternate() ? local / 2 : is_up ? local - kRows / 2 : local);
        feature = feature < num_features ? feature : num_features - run;
        if (!gated) return feature;
        // Both in int: num_features is F here.
        return interleaved ? 2 * feature + is_up : is_up ? num_features + feature : feature;
    }

    // The block of 16 and the row of the instruction that compute the local-th. Transposed, a
    // lane's word b holds its neighbours 2b and 2b + 1: rows g and g + 8 of block b.
    TILE_FUNCTION static int block(int local) { return kTransposed ? local % 8 / 2 : local / 16; }
    TILE_FUNCTION static int block_row(int local) {
        return kTransposed ? local / 8 + local % 2 * 8 : local % 16;
    }

  private:
    TILE_FUNCTION bool alternate() const { return kTransposed && gated && interleaved; }
};

// Blocks along x of a launch.
template <class Format>
TILE_FUNCTION int decode_feature_tiles(const ExpertParams& p, bool down) {
    const auto tile = DecodeTile<Format::kTransposed>::make(p, down, 0);
    return ceil_div(tile.num_features, tile.features());
}

// Each warp's sums of a tile for 8 token_groups tokens.
template <class Format>
TILE_FUNCTION size_t decode_shared_bytes(int num_warps, int token_groups) {
    return size_t(num_warps) * token_groups * 8 * DecodeTile<Format::kTransposed>::kRows *
           sizeof(float);
}

}  // namespace moe_offload::cuda
