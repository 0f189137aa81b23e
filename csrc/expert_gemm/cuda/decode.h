// Few tokens: a layer's time is that of reading each active expert's weights once, so this kernel
// does nothing else for a living.
//
// Weights are the M operand of mma.m16n8k16 and tokens N, in groups of 8, so one token costs the
// same weight bytes as eight and nothing is padded to 16 or 64. A block owns one expert's tile of
// 32 weight rows (16 gate rows and their 16 up rows, or 32 rows of down; transposed 64, see
// decode_tile.h) for all its tokens. Its warps split K (decode_product.h, decode_transposed.h), and
// sum up in warp order at the end.
//
// Two launches. decode_up: gate, up, activation, rounded once to `inner`. decode_down: down, float
// rows to `partial`; the last block of a feature tile to finish sums each token's rows in rank
// order (combine.h). Who is last does not change what is summed, so results repeat bit for bit.
// Absent experts are skipped; a second pair of launches over the groups that arrived later gives
// bit for bit the same result as one pair over all, because groups never meet before the combine.
#pragma once

#include "expert_gemm/cuda/activation.h"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/decode_product.h"
#include "expert_gemm/cuda/decode_transposed.h"
#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

constexpr int kDecodeMaxWarps = 8;  // they share K

// Leaves every warp's accumulators in shared memory as [warp][block, token group, register][lane].
template <int kBlocks, int kTokenGroups>
SIMT_FUNCTION void share_sums(float* shared, int warp,
                              const float (&acc)[kBlocks][kTokenGroups][4]) {
    float* mine = shared + warp * kBlocks * kTokenGroups * 128 + simt::lane_id();
    SIMT_UNROLL for (int block = 0; block < kBlocks; ++block)
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) SIMT_UNROLL for (int i = 0; i < 4; ++i)
            mine[((block * kTokenGroups + j) * 4 + i) * 32] = acc[block][j][i];
}

// Element (row `local` of the tile, token of 8 kTokenGroups), summed over the warps.
template <class Tile, int kTokenGroups>
SIMT_FUNCTION float sum_of_warps(const float* shared, int num_warps, int local, int token) {
    const int n = Tile::block_row(local);
    const int lane = n % 8 * 4 + token % 8 / 2, i = n / 8 * 2 + token % 2;
    const float* at =
        shared + ((Tile::block(local) * kTokenGroups + token / 8) * 4 + i) * 32 + lane;
    float sum = 0.0f;
    SIMT_NO_UNROLL for (int warp = 0; warp < num_warps; ++warp) sum +=
        at[warp * Tile::kBlocks * kTokenGroups * 128];
    return sum;
}

// Grid (feature tiles, max_groups), num_warps warps. [R, F] of act(x gate^T) * (x up^T).
template <class T, class Format, int kTokenGroups>
SIMT_FUNCTION void decode_up(const ExpertParams& p, int num_warps, unsigned char* raw_shared) {
    using Tile = DecodeTile<Format::kTransposed>;
    using Product = DecodeWarp<T, Format, kTokenGroups>;
    simt::let_next_kernel_start();  // decode_down; it waits before it reads what we write
    if (simt::block_y() >= p.group_count()) return;
    const Group group = p.group(simt::block_y());
    const int32_t page_id = p.pages.page_of(group);
    if (page_id < 0) return;
    const unsigned char* page = p.pages.address(page_id);
    const WeightMatrix matrix = WeightMatrix::make(p, page, false);
    float* shared = reinterpret_cast<float*>(raw_shared);

    const int g = simt::lane_id() / 4, warp = simt::warp_id();
    // Made anew before and after a product, not kept across it: two token groups of quantised
    // weights leave no register for it.
    const auto make_tile = [&] { return Tile::make(p, false, simt::opaque(simt::block_x())); };

    SIMT_NO_UNROLL for (int first = group.first_row; first < group.end_row;
                        first += 8 * kTokenGroups) {
        Product product(matrix, Product::rows_of(make_tile()), warp, num_warps);
        const T* tokens[kTokenGroups];
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
            int row = first + 8 * j + g;
            row = row < group.end_row ? row : group.end_row - 1;  // computed, not stored
            const int token = p.route_of_row[row] / p.top_k;
            tokens[j] = static_cast<const T*>(p.x) + int64_t(token) * p.hidden;
        }
        float acc[Tile::kBlocks][kTokenGroups][4] = {};
        product.multiply(tokens, acc);
        share_sums(shared, warp, acc);
        simt::block_sync();
        const Tile tile = make_tile();
        const GateUpRows gate_up = GateUpRows::make(p.inner_size, p.interleaved);
        const ActivationForm form = activation_form(p);
        const int num_threads = num_warps * simt::kWarpSize;
        const int features = tile.features();
        SIMT_NO_UNROLL for (int i = simt::thread_id(); i < features * 8 * kTokenGroups;
                            i += num_threads) {
            const int n = i % features, token = i / features;
            const int feature = tile.first_feature + n, row = first + token;
            if (feature >= p.inner_size || row >= group.end_row) continue;
            float value = sum_of_warps<Tile, kTokenGroups>(shared, num_warps, tile.gate(n), token);
            if (p.gated) {
                float gate = value;
                float up = sum_of_warps<Tile, kTokenGroups>(shared, num_warps, tile.up(n), token);
                gate += bias_at<T>(page, p.pages.up_bias_offset, gate_up.gate(feature));
                up += bias_at<T>(page, p.pages.up_bias_offset, gate_up.up(feature));
                value = gate_and_up(form, gate, up);
            } else {
                value += bias_at<T>(page, p.pages.up_bias_offset, feature);
                value = activate(form, value);
            }
            static_cast<T*>(p.inner)[int64_t(row) * p.inner_size + feature] =
                simt::from_float<T>(value);
        }
        simt::block_sync();  // the next rows' sums go to the same place
    }
}

// Grid (feature tiles, max_groups), num_warps warps. Rows of inner down^T to `partial`, and the
// last block of each feature tile combines. Launched to start before decode_up has ended: what
// precedes wait_for_previous_kernel reads only weights and what the routing wrote.
template <class T, class Format, int kTokenGroups>
SIMT_FUNCTION void decode_down(const ExpertParams& p, int num_warps, unsigned char* raw_shared) {
    using Tile = DecodeTile<Format::kTransposed>;
    using Product = DecodeWarp<T, Format, kTokenGroups>;
    const int num_groups = p.group_count(), total_groups = p.total_count();
    const Tile tile = Tile::make(p, true, simt::block_x());
    const int num_threads = num_warps * simt::kWarpSize;
    bool last = total_groups == 0 && simt::block_y() == 0;  // no rows at all: zeros
    if (!last) {
        const Group group =
            simt::block_y() < num_groups ? p.group(simt::block_y()) : Group{0, 0, -1};
        const int32_t page_id = p.pages.page_of(group);
        if (page_id < 0) {
            simt::wait_for_previous_kernel();  // or this kernel could end before the one before
            return;
        }
        const unsigned char* page = p.pages.address(page_id);
        const WeightMatrix matrix = WeightMatrix::make(p, page, true);
        float* shared = reinterpret_cast<float*>(raw_shared);

        const int g = simt::lane_id() / 4, warp = simt::warp_id();
        const auto rows = Product::rows_of(tile);
        SIMT_NO_UNROLL for (int first = group.first_row; first < group.end_row;
                            first += 8 * kTokenGroups) {
            Product product(matrix, rows, warp, num_warps);
            simt::wait_for_previous_kernel();
            const T* tokens[kTokenGroups];
            SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
                int row = first + 8 * j + g;
                row = row < group.end_row ? row : group.end_row - 1;
                tokens[j] = static_cast<const T*>(p.inner) + int64_t(row) * p.inner_size;
            }
            float acc[Tile::kBlocks][kTokenGroups][4] = {};
            product.multiply(tokens, acc);
            share_sums(shared, warp, acc);
            simt::block_sync();
            SIMT_NO_UNROLL for (int i = simt::thread_id(); i < Tile::kRows * 8 * kTokenGroups;
                                i += num_threads) {
                const int n = i % Tile::kRows, token = i / Tile::kRows;
                const int feature = tile.first_feature + n, row = first + token;
                if (feature >= p.hidden || row >= group.end_row) continue;
                float value = sum_of_warps<Tile, kTokenGroups>(shared, num_warps, n, token);
                value += bias_at<T>(page, p.pages.down_bias_offset, feature);
                static_cast<float*>(p.partial)[int64_t(row) * p.hidden + feature] = value;
            }
            simt::block_sync();
        }
        // Our rows are visible to all before our ticket is; whoever draws the last one reads after.
        simt::thread_fence();
        simt::block_sync();
        int* is_last = reinterpret_cast<int*>(raw_shared);
        if (simt::thread_id() == 0) {
            const int before = simt::atomic_add(&p.tickets[simt::block_x()], 1);
            *is_last = before == total_groups - 1;
            if (*is_last) p.tickets[simt::block_x()] = 0;  // for the next layer
        }
        simt::block_sync();
        last = *is_last != 0;
        simt::thread_fence();
    }
    if (!last) return;
    simt::wait_for_previous_kernel();
    constexpr int kFours = Tile::kRows / 4;
    SIMT_NO_UNROLL for (int i = simt::thread_id(); i < p.num_tokens * kFours; i += num_threads) {
        const int feature = tile.first_feature + i % kFours * 4;
        if (feature < p.hidden) combine4<T>(p, i / kFours, feature);
    }
}

}  // namespace moe_offload::cuda
