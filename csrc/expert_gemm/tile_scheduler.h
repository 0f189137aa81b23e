// Who computes which tile: pure index arithmetic of the expert kernels, the same on host and
// device, tested exhaustively in csrc/tests/test_tile_scheduler.cpp.
//
// A launch works on groups: an expert that has rows, its rows [first_row, end_row) in the list
// sorted by expert, and its page. A tile is block_m rows of one group times block_n features.
// Persistent blocks take tiles i, i + grid, i + 2 grid, ... of the list that goes through the
// groups in order. Inside a group, bands of kBandTiles row tiles are walked feature tile by
// feature tile, rows innermost: neighbouring blocks then read the same weights while a band's rows
// (8 x 128 rows of 4096 bf16: 8 MiB) stay in L2.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TILE_FUNCTION __host__ __device__ __forceinline__
#else
#define TILE_FUNCTION inline
#endif

namespace moe_offload {

// One row of an int32 [G, 3] tensor.
struct Group {
    int32_t first_row;
    int32_t end_row;
    int32_t page;  // slot, or expert when a slot table is given; negative: absent, skipped
};

struct Tile {
    int group;  // -1: no more tiles
    int row_tile;
    int feature_tile;
};

constexpr int kBandTiles = 8;

TILE_FUNCTION int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The index-th of num_row_tiles x num_feature_tiles tiles of one group.
TILE_FUNCTION Tile raster(int index, int num_row_tiles, int num_feature_tiles) {
    const int band = index / (kBandTiles * num_feature_tiles);
    const int first = band * kBandTiles;
    const int left = num_row_tiles - first;
    const int height = left < kBandTiles ? left : kBandTiles;
    const int inside = index - first * num_feature_tiles;
    return {0, first + inside % height, inside / height};
}

// Walks forward through the tiles of all groups; `index` must not decrease from call to call.
// Reads each group once per walk: some 30 cycles from L1, against thousands for a tile. `Groups`
// has `Group group(int)`, with the page looked up: an absent expert's group has no tiles.
template <class Groups>
class TileWalker {
  public:
    TILE_FUNCTION TileWalker(const Groups& groups, int num_groups, int block_m,
                             int num_feature_tiles)
        : groups_(groups),
          num_groups_(num_groups),
          block_m_(block_m),
          num_feature_tiles_(num_feature_tiles) {}

    TILE_FUNCTION Tile at(int64_t index) {
        while (group_ < num_groups_) {
            const Group group = groups_.group(group_);
            const int row_tiles =
                group.page < 0 ? 0 : ceil_div(group.end_row - group.first_row, block_m_);
            const int64_t tiles = int64_t(row_tiles) * num_feature_tiles_;
            if (index < before_ + tiles) {
                Tile tile = raster(int(index - before_), row_tiles, num_feature_tiles_);
                tile.group = group_;
                return tile;
            }
            before_ += tiles;
            ++group_;
        }
        return {-1, 0, 0};
    }

  private:
    const Groups& groups_;
    int num_groups_;
    int block_m_;
    int num_feature_tiles_;
    int group_ = 0;
    int64_t before_ = 0;  // tiles of the groups before group_
};

// Which rows of a gate_up matrix a feature's gate and up are. Concatenated pages hold gate [F, H]
// then up [F, H]; interleaved ones (gpt-oss) gate and up of a feature in turn.
struct GateUpRows {
    int up_start;
    int step;
    TILE_FUNCTION static GateUpRows make(int inner, bool interleaved) {
        return interleaved ? GateUpRows{1, 2} : GateUpRows{inner, 1};
    }
    TILE_FUNCTION int gate(int feature) const { return feature * step; }
    TILE_FUNCTION int up(int feature) const { return up_start + feature * step; }
};

// A prefill tile's weight rows in shared memory, gated: eight gate rows, the eight up rows of the
// same features, and so on. Then the matrix instruction leaves a feature's gate and up in the
// same thread. Worked example: local rows 0..7 are gate of features 0..7, rows 8..15 their up,
// row 21 is gate of feature 8 + 5 = 13.
TILE_FUNCTION int gated_feature(int local_row) { return local_row / 16 * 8 + local_row % 8; }
TILE_FUNCTION bool gated_is_up(int local_row) { return local_row / 8 % 2 == 1; }

// Rows of 32 16-bit elements (64 bytes, four chunks of 16) in shared memory, chunks permuted so
// that eight rows' chunks of one column fall into eight different bank groups.
TILE_FUNCTION int swizzle64(int row, int chunk) { return row * 64 + (chunk ^ (row / 2 % 4)) * 16; }

// Rows of 128 elements (256 bytes, sixteen chunks), for which the same holds.
TILE_FUNCTION int swizzle256(int row, int chunk) { return row * 256 + (chunk ^ (row % 8)) * 16; }

// Rows of 64 elements (128 bytes, eight chunks): the pattern the bulk copy engine and wgmma call
// 128-byte swizzle, when the tile starts at a multiple of 1024 bytes.
TILE_FUNCTION int swizzle128(int row, int chunk) { return row * 128 + (chunk ^ (row % 8)) * 16; }

}  // namespace moe_offload
