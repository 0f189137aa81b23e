// Every tile exactly once, whatever the groups, the tile sizes and the number of blocks.
#include <algorithm>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "expert_gemm/tile_scheduler.h"

namespace {

using namespace moe_offload;
using Key = std::tuple<int, int, int>;

void raster_is_a_permutation_that_keeps_bands() {
    for (int rows = 1; rows <= 20; ++rows)
        for (int features = 1; features <= 9; ++features) {
            std::set<Key> seen;
            Tile before{0, -1, 0};
            for (int i = 0; i < rows * features; ++i) {
                const Tile tile = raster(i, rows, features);
                CHECK(tile.row_tile >= 0 && tile.row_tile < rows);
                CHECK(tile.feature_tile >= 0 && tile.feature_tile < features);
                CHECK(seen.insert({0, tile.row_tile, tile.feature_tile}).second);
                // Rows run first, inside a band; a band is done before the next begins.
                CHECK(tile.row_tile / kBandTiles >= std::max(before.row_tile, 0) / kBandTiles);
                if (i > 0 && tile.feature_tile == before.feature_tile &&
                    tile.row_tile / kBandTiles == before.row_tile / kBandTiles)
                    CHECK_EQ(tile.row_tile, before.row_tile + 1);
                before = tile;
            }
        }
}

struct List {
    const std::vector<Group>& groups;
    Group group(int index) const { return groups[index]; }
};

void walk(const std::vector<Group>& groups, int block_m, int features, int grid) {
    std::set<Key> seen, want;
    const List list{groups};
    for (size_t g = 0; g < groups.size(); ++g)
        for (int row = groups[g].first_row; row < groups[g].end_row && groups[g].page >= 0;
             row += block_m)
            for (int f = 0; f < features; ++f)
                want.insert({int(g), (row - groups[g].first_row) / block_m, f});
    for (int block = 0; block < grid; ++block) {
        TileWalker walker(list, int(groups.size()), block_m, features);
        for (int64_t index = block;; index += grid) {
            const Tile tile = walker.at(index);
            if (tile.group < 0) break;
            CHECK(seen.insert({tile.group, tile.row_tile, tile.feature_tile}).second);
        }
    }
    CHECK(seen == want);
}

void blocks_share_the_tiles() {
    walk({}, 64, 3, 4);
    walk({{0, 0, 0}, {0, 0, 1}}, 64, 3, 4);  // groups without rows
    walk({{0, 1000, 0}}, 64, 5, 3);          // one expert has everything
    std::mt19937 random(1);
    for (int round = 0; round < 300; ++round) {
        std::vector<Group> groups;
        int row = 0;
        for (int g = random() % 12; g > 0; --g) {
            const int rows = random() % 3 ? int(random() % 300) : 0;
            groups.push_back({row, row + rows, random() % 5 ? g : -1});
            row += rows;
        }
        walk(groups, 1 << (3 + random() % 5), 1 + random() % 7, 1 + random() % 40);
    }
}

void gate_and_up_rows_cover_the_matrix() {
    for (bool interleaved : {false, true})
        for (int inner : {8, 24, 96}) {
            const GateUpRows rows = GateUpRows::make(inner, interleaved);
            std::set<int> seen;
            for (int f = 0; f < inner; ++f) {
                seen.insert(rows.gate(f));
                seen.insert(rows.up(f));
            }
            CHECK_EQ(int(seen.size()), 2 * inner);
            CHECK_EQ(*seen.rbegin(), 2 * inner - 1);
        }
    CHECK_EQ(GateUpRows::make(96, true).up(5), 11);
    CHECK_EQ(GateUpRows::make(96, false).up(5), 101);
}

void a_gated_tile_pairs_gate_with_up() {
    CHECK_EQ(gated_feature(21), 13);  // the example in the header
    CHECK(!gated_is_up(21));
    for (int row = 0; row < 256; ++row) {
        const int partner = row ^ 8;
        CHECK_EQ(gated_feature(row), gated_feature(partner));
        CHECK(gated_is_up(row) != gated_is_up(partner));
    }
}

// ldmatrix reads one 16-byte chunk of each of eight rows: they must fall into different groups of
// the 32 banks, that is different addresses modulo 128. So must what one cp.async phase writes.
void swizzles_spread_rows_over_banks() {
    for (int first = 0; first < 128; first += 8) {
        for (int chunk = 0; chunk < 8; ++chunk) {
            std::set<int> banks64, banks128, banks256;
            for (int row = first; row < first + 8; ++row) {
                banks256.insert(swizzle256(row, 8 + chunk) % 128);
                banks64.insert(swizzle64(row, chunk % 4) % 128);
                banks128.insert(swizzle128(row, chunk) % 128);
            }
            CHECK_EQ(int(banks64.size()), 8);
            CHECK_EQ(int(banks128.size()), 8);
            CHECK_EQ(int(banks256.size()), 8);
        }
    }
    std::set<int> all64, all128, all256;
    for (int row = 0; row < 16; ++row)
        for (int chunk = 0; chunk < 8; ++chunk) {
            all256.insert(swizzle256(row, chunk));
            all256.insert(swizzle256(row, 8 + chunk));
            if (chunk < 4) all64.insert(swizzle64(row, chunk));
            all128.insert(swizzle128(row, chunk));
        }
    CHECK_EQ(int(all64.size()), 64);
    CHECK_EQ(int(all128.size()), 128);
    CHECK_EQ(int(all256.size()), 256);
}

}  // namespace

int main() {
    RUN(raster_is_a_permutation_that_keeps_bands);
    RUN(blocks_share_the_tiles);
    RUN(gate_and_up_rows_cover_the_matrix);
    RUN(a_gated_tile_pairs_gate_with_up);
    RUN(swizzles_spread_rows_over_banks);
}
