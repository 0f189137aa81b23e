// Many tokens: tiles of the tensor cores' own shape, for sm_80 and everything newer that has
// nothing better (sm_90a has, prefill_sm90.cu).
//
// A block of eight warps computes kBlockM rows times 128 weight rows: two warps along rows, four
// along weights. Both operands come through shared memory by cp.async, kStages deep, 32 k at a time
// (64-byte rows, swizzled so that neither cp.async nor ldmatrix meets a bank twice). Token rows are
// gathered by the copies themselves: x is never permuted in memory. The 128 weight rows of a gated
// projection are 64 features: groups of eight gate rows and their eight up rows, so that the
// instruction leaves both in one thread and the activation needs no exchange.
//
// Blocks are persistent and walk the tile list of tile_scheduler.h. Groups never share a tile, so
// what arrives late is a launch over other groups, with the same bits as one launch over all.
//
// Shared memory: 16 KiB a stage of 128 rows, 12 KiB of 64; 48 KiB of stages let two blocks run on
// an SM of every architecture (sm_86 and sm_89 have 100 KiB), one loading while the other's
// epilogue stores.
#pragma once

#include "expert_gemm/cuda/epilogue.h"
#include "expert_gemm/cuda/params.h"
#include "expert_gemm/cuda/present_groups.h"
#include "expert_gemm/cuda/weight_tile.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

TILE_FUNCTION constexpr int prefill_stages(int block_m) { return block_m == 64 ? 4 : 3; }

TILE_FUNCTION constexpr int prefill_stage_bytes(int block_m) {
    return (block_m + kPrefillBlockN) * kPrefillRowBytes;
}

TILE_FUNCTION int prefill_feature_tiles(const ExpertParams& p, bool down) {
    if (down) return ceil_div(p.hidden, kPrefillBlockN);
    return ceil_div(p.inner_size, p.gated ? kPrefillBlockN / 2 : kPrefillBlockN);
}

// The tokens of a tile: this thread's rows are offsets in units of 16 bytes, half the registers of
// pointers.
struct TokenTile {
    const unsigned char* tokens;
    uint32_t rows[2];  // kNoRow: none
    int k_size;

    // Copies by this thread for one stage: rows thread / 4 + 64 i, chunk thread % 4.
    template <int kBlockM>
    SIMT_FUNCTION void place(int k, unsigned char* stage) const {
        const int row = simt::thread_id() / 4, chunk = simt::thread_id() % 4;
        const int at = k / 8 + chunk;
        const bool inside = at * 8 < k_size;
        SIMT_UNROLL for (int i = 0; i < kBlockM / 64; ++i) {
            const bool present = inside && rows[i] != kNoRow;
            const uint64_t offset = present ? uint64_t(rows[i] + at) * 16 : 0;
            simt::cp_async(stage + swizzle64(row + 64 * i, chunk), tokens + offset,
                           present ? 16 : 0);
        }
    }
};

// A warp's share: kBlockM / 2 rows (in 16s) by 32 weight rows (in 8s).
template <class T, class Format, int kBlockM>
struct PrefillWarp {
    static constexpr int kRowBlocks = kBlockM / 32;
    float acc[kRowBlocks][4][4] = {};

    SIMT_FUNCTION static int first_row() { return simt::warp_id() % 2 * (kBlockM / 2); }
    SIMT_FUNCTION static int first_weight() { return simt::warp_id() / 2 * 32; }

    SIMT_FUNCTION void multiply(const unsigned char* stage) {
        const int lane = simt::lane_id();
        const unsigned char* weights = stage + kBlockM * kPrefillRowBytes;
        SIMT_UNROLL for (int half = 0; half < 2; ++half) {
            uint32_t b[2][4];  // two 8s of weight rows each: (k low, k high), (k low, k high)
            SIMT_UNROLL for (int pair = 0; pair < 2; ++pair) WeightTile<T, Format>::load_operand(
                b[pair], weights, first_weight() + pair * 16, half);
            SIMT_UNROLL for (int i = 0; i < kRowBlocks; ++i) {
                uint32_t a[4];
                simt::ldmatrix_x4(
                    a, stage + swizzle64(first_row() + i * 16 + lane % 16, half * 2 + lane / 16));
                SIMT_UNROLL for (int j = 0; j < 4; ++j) {
                    const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    simt::mma<T>(acc[i][j], a, pair);
                }
            }
        }
    }
};

// The whole product of one tile. Every thread of the block calls it.
template <class T, class Format, int kBlockM, int kStages>
SIMT_FUNCTION void multiply_tile(const TokenTile& tokens, const WeightTile<T, Format>& weights,
                                 PrefillWarp<T, Format, kBlockM>& warp, unsigned char* shared) {
    constexpr int kStageBytes = prefill_stage_bytes(kBlockM);
    constexpr int kWeightsAt = kBlockM * kPrefillRowBytes;
    using Fetched = typename WeightTile<T, Format>::Fetched;
    const int steps = ceil_div(tokens.k_size, kPrefillBlockK);
    Fetched first[kStages - 1];
    SIMT_UNROLL for (int s = 0; s < kStages - 1; ++s) first[s] = weights.fetch(s * kPrefillBlockK);
    Fetched next = weights.fetch((kStages - 1) * kPrefillBlockK);
    SIMT_UNROLL for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) {
            tokens.place<kBlockM>(s * kPrefillBlockK, shared + s * kStageBytes);
            weights.place(first[s], s * kPrefillBlockK, shared + s * kStageBytes + kWeightsAt);
        }
        simt::cp_async_commit();  // also when empty: the count of groups is the count of steps
    }
    int reading = 0;
    SIMT_NO_UNROLL for (int step = 0; step < steps; ++step) {
        simt::cp_async_wait<kStages - 2>();
        simt::block_sync();  // this stage has landed for all; all are done with the one before
        const int ahead = step + kStages - 1;
        if (ahead < steps) {
            const int writing = (reading == 0 ? kStages : reading) - 1;
            const int k = ahead * kPrefillBlockK;
            tokens.place<kBlockM>(k, shared + writing * kStageBytes);
            weights.place(next, k, shared + writing * kStageBytes + kWeightsAt);
            next = weights.fetch(k + kPrefillBlockK);
        }
        simt::cp_async_commit();
        warp.multiply(shared + reading * kStageBytes);
        reading = reading + 1 == kStages ? 0 : reading + 1;
    }
    simt::cp_async_wait<0>();
    simt::block_sync();  // the next tile's copies overwrite these stages
}

// Up and activation into `inner` [R, F], or (kDown) down into `partial` [R, H], both of T.
template <class T, class Format, int kBlockM, int kStages, bool kDown>
SIMT_FUNCTION void prefill(const ExpertParams& p, unsigned char* shared) {
    const PresentGroups groups{p};
    TileWalker<PresentGroups> walker(groups, p.group_count(), kBlockM,
                                     prefill_feature_tiles(p, kDown));
    const bool gated = !kDown && p.gated;
    const bool alternate = Format::kTransposed && gated && p.interleaved;
    const int num_features = kDown ? p.hidden : p.inner_size;
    const int tile_features = gated ? kPrefillBlockN / 2 : kPrefillBlockN;
    const GateUpRows gate_up = GateUpRows::make(p.inner_size, p.interleaved);
    T* out = static_cast<T*>(kDown ? p.partial : p.inner);

    SIMT_NO_UNROLL for (int64_t index = simt::block_x();; index += simt::grid_x()) {
        const Tile tile = walker.at(index);
        if (tile.group < 0) return;
        const Group group = groups.group(tile.group);
        const unsigned char* page = p.pages.address(group.page);
        const int first_row = group.first_row + tile.row_tile * kBlockM;
        const int first_feature = tile.feature_tile * tile_features;

        TokenTile tokens;
        tokens.tokens = static_cast<const unsigned char*>(kDown ? p.inner : p.x);
        tokens.k_size = kDown ? p.inner_size : p.hidden;
        SIMT_UNROLL for (int i = 0; i < 2; ++i) {
            const int local = simt::thread_id() / 4 + 64 * i;
            const int row = first_row + local;
            tokens.rows[i] = kNoRow;
            if (local < kBlockM && row < group.end_row)
                tokens.rows[i] =
                    uint32_t(kDown ? row : p.route_of_row[row] / p.top_k) * (tokens.k_size / 8);
        }
        const WeightTile<T, Format> weights(WeightMatrix::make(p, page, kDown), [&](int local) {
            if (alternate) {  // eight neighbours: gate and up of four features
                const int feature = first_feature + local / 2;
                return 2 * (feature < num_features ? feature : num_features - 4);
            }
            constexpr int kRun = Format::kTransposed ? 8 : 1;  // features read together
            int feature = first_feature + (gated ? gated_feature(local) : local);
            feature = feature < num_features ? feature : num_features - kRun;  // not stored
            return !gated               ? feature
                   : gated_is_up(local) ? gate_up.up(feature)
                                        : gate_up.gate(feature);
        });
        PrefillWarp<T, Format, kBlockM> warp;
        multiply_tile<T, Format, kBlockM, kStages>(tokens, weights, warp, shared);

        const int g = simt::lane_id() / 4, t2 = simt::lane_id() % 4 * 2;
        const ActivationForm form = activation_form(p);
        with_smooth<kDown>(form, [&](auto smooth) {
            SIMT_UNROLL for (int i = 0; i < warp.kRowBlocks; ++i)
                SIMT_UNROLL for (int half = 0; half < 2; ++half) {
                const int row = first_row + warp.first_row() + i * 16 + half * 8 + g;
                if (row >= group.end_row) continue;
                store_row<T, 4, kDown, decltype(smooth)::value>(
                    p, form, page, out + int64_t(row) * num_features, first_feature,
                    warp.first_weight(), t2, alternate,
                    [&](int j, int c) -> float& { return warp.acc[i][j][half * 2 + c]; });
            }
        });
    }
}

}  // namespace moe_offload::cuda
