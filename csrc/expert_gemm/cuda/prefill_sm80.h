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

#include "expert_gemm/cuda/activation.h"
#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

constexpr int kPrefillThreads = 256;
constexpr int kPrefillBlockN = 128;  // weight rows
constexpr int kPrefillBlockK = 32;
constexpr int kPrefillRowBytes = kPrefillBlockK * 2;

TILE_FUNCTION constexpr int prefill_stages(int block_m) { return block_m == 64 ? 4 : 3; }

TILE_FUNCTION constexpr int prefill_stage_bytes(int block_m) {
    return (block_m + kPrefillBlockN) * kPrefillRowBytes;
}

TILE_FUNCTION int prefill_feature_tiles(const ExpertParams& p, bool down) {
    if (down) return ceil_div(p.hidden, kPrefillBlockN);
    return ceil_div(p.inner_size, p.gated ? kPrefillBlockN / 2 : kPrefillBlockN);
}

// What a tile multiplies: the same loop serves both projections.
template <class T>
struct PrefillOperands {
    // This thread's rows of the tile: where they start, null where there is none.
    const T* tokens[2];
    const T* weights[2];
    int k_size;
};

// Copies by this thread of one stage: rows thread / 4 + 64 i, chunk thread % 4 of each operand.
template <class T, int kBlockM>
SIMT_FUNCTION void load_stage(const PrefillOperands<T>& from, int k, unsigned char* stage) {
    const int row = simt::thread_id() / 4, chunk = simt::thread_id() % 4;
    const int at = k + chunk * 8;
    SIMT_UNROLL for (int i = 0; i < kBlockM / 64; ++i) {
        const bool inside = from.tokens[i] != nullptr && at < from.k_size;
        simt::cp_async(stage + swizzle64(row + 64 * i, chunk),
                       inside ? from.tokens[i] + at : from.weights[0], inside ? 16 : 0);
    }
    unsigned char* weights = stage + kBlockM * kPrefillRowBytes;
    SIMT_UNROLL for (int i = 0; i < kPrefillBlockN / 64; ++i) {
        const bool inside = at < from.k_size;
        simt::cp_async(weights + swizzle64(row + 64 * i, chunk),
                       inside ? from.weights[i] + at : from.weights[i], inside ? 16 : 0);
    }
}

// A warp's share: kBlockM / 2 rows (in 16s) by 32 weight rows (in 8s).
template <class T, int kBlockM>
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
            SIMT_UNROLL for (int pair = 0; pair < 2; ++pair) simt::ldmatrix_x4(
                b[pair], weights + swizzle64(first_weight() + pair * 16 + lane / 16 * 8 + lane % 8,
                                             half * 2 + lane / 8 % 2));
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
template <class T, int kBlockM, int kStages>
SIMT_FUNCTION void multiply_tile(const PrefillOperands<T>& operands, PrefillWarp<T, kBlockM>& warp,
                                 unsigned char* shared) {
    constexpr int kStageBytes = prefill_stage_bytes(kBlockM);
    const int steps = ceil_div(operands.k_size, kPrefillBlockK);
    SIMT_UNROLL for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps)
            load_stage<T, kBlockM>(operands, s * kPrefillBlockK, shared + s * kStageBytes);
        simt::cp_async_commit();  // also when empty: the count of groups is the count of steps
    }
    int reading = 0, writing = kStages - 1;
    SIMT_NO_UNROLL for (int step = 0; step < steps; ++step) {
        simt::cp_async_wait<kStages - 2>();
        simt::block_sync();  // this stage has landed for all; all are done with the one before
        const int ahead = step + kStages - 1;
        if (ahead < steps)
            load_stage<T, kBlockM>(operands, ahead * kPrefillBlockK,
                                   shared + writing * kStageBytes);
        simt::cp_async_commit();
        warp.multiply(shared + reading * kStageBytes);
        reading = reading + 1 == kStages ? 0 : reading + 1;
        writing = writing + 1 == kStages ? 0 : writing + 1;
    }
    simt::cp_async_wait<0>();
    simt::block_sync();  // the next tile's copies overwrite these stages
}

// The groups of a launch with their pages looked up, for the tile walker.
struct PresentGroups {
    const ExpertParams& p;
    TILE_FUNCTION Group group(int index) const {
        Group group = p.group(index);
        group.page = p.pages.page_of(group);
        return group;
    }
};

// Up and activation into `inner` [R, F], or (kDown) down into `partial` [R, H], both of T.
template <class T, int kBlockM, int kStages, bool kDown>
SIMT_FUNCTION void prefill(const ExpertParams& p, unsigned char* shared) {
    const PresentGroups groups{p};
    TileWalker<PresentGroups> walker(groups, p.group_count(), kBlockM,
                                     prefill_feature_tiles(p, kDown));
    const bool gated = !kDown && p.gated;
    const int num_features = kDown ? p.hidden : p.inner_size;
    const int tile_features = gated ? kPrefillBlockN / 2 : kPrefillBlockN;
    const GateUpRows gate_up = GateUpRows::make(p.inner_size, p.interleaved);
    const int64_t weights_offset = kDown ? p.pages.down_offset : p.pages.up_offset;
    const int64_t bias_offset = kDown ? p.pages.down_bias_offset : p.pages.up_bias_offset;
    T* out = static_cast<T*>(kDown ? p.partial : p.inner);

    SIMT_NO_UNROLL for (int64_t index = simt::block_x();; index += simt::grid_x()) {
        const Tile tile = walker.at(index);
        if (tile.group < 0) return;
        const Group group = groups.group(tile.group);
        const unsigned char* page = p.pages.address(group.page);
        const T* weights = reinterpret_cast<const T*>(page + weights_offset);
        const int first_row = group.first_row + tile.row_tile * kBlockM;
        const int first_feature = tile.feature_tile * tile_features;

        PrefillOperands<T> operands;
        operands.k_size = kDown ? p.inner_size : p.hidden;
        SIMT_UNROLL for (int i = 0; i < 2; ++i) {
            const int local = simt::thread_id() / 4 + 64 * i;
            const int row = first_row + local;
            operands.tokens[i] = nullptr;
            if (local < kBlockM && row < group.end_row)
                operands.tokens[i] =
                    kDown ? static_cast<const T*>(p.inner) + int64_t(row) * p.inner_size
                          : static_cast<const T*>(p.x) +
                                int64_t(p.route_of_row[row] / p.top_k) * p.hidden;
            int feature = first_feature + (gated ? gated_feature(local) : local);
            feature = feature < num_features ? feature : num_features - 1;  // not stored
            const int weight_row = !gated               ? feature
                                   : gated_is_up(local) ? gate_up.up(feature)
                                                        : gate_up.gate(feature);
            operands.weights[i] = weights + int64_t(weight_row) * operands.k_size;
        }
        PrefillWarp<T, kBlockM> warp;
        multiply_tile<T, kBlockM, kStages>(operands, warp, shared);

        const int g = simt::lane_id() / 4, t2 = simt::lane_id() % 4 * 2;
        SIMT_UNROLL for (int i = 0; i < warp.kRowBlocks; ++i)
            SIMT_UNROLL for (int half = 0; half < 2; ++half) {
            const int row = first_row + warp.first_row() + i * 16 + half * 8 + g;
            if (row >= group.end_row) continue;
            T* out_row = out + int64_t(row) * num_features;
            if (gated) {
                SIMT_UNROLL for (int j = 0; j < 4; j += 2) {
                    const int feature =
                        first_feature + gated_feature(warp.first_weight() + j * 8) + t2;
                    if (feature >= num_features) continue;
                    float value[2];
                    SIMT_UNROLL for (int c = 0; c < 2; ++c) value[c] =
                        gate_and_up(p,
                                    warp.acc[i][j][half * 2 + c] +
                                        bias_at<T>(page, bias_offset, gate_up.gate(feature + c)),
                                    warp.acc[i][j + 1][half * 2 + c] +
                                        bias_at<T>(page, bias_offset, gate_up.up(feature + c)));
                    simt::store4(out_row + feature, simt::pack<T>(value[0], value[1]));
                }
            } else {
                SIMT_UNROLL for (int j = 0; j < 4; ++j) {
                    const int feature = first_feature + warp.first_weight() + j * 8 + t2;
                    if (feature >= num_features) continue;
                    float value[2];
                    SIMT_UNROLL for (int c = 0; c < 2; ++c) {
                        value[c] = warp.acc[i][j][half * 2 + c] +
                                   bias_at<T>(page, bias_offset, feature + c);
                        if (!kDown) value[c] = activate(p.activation, value[c]);
                    }
                    simt::store4(out_row + feature, simt::pack<T>(value[0], value[1]));
                }
            }
        }
    }
}

}  // namespace moe_offload::cuda
