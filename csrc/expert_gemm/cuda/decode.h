// Few tokens: a layer's time is that of reading each active expert's weights once, so this kernel
// does nothing else for a living.
//
// Weights are the M operand of mma.m16n8k16 and tokens N, in groups of 8, so one token costs the
// same weight bytes as eight and nothing is padded to 16 or 64. A block owns one expert's tile of
// 32 weight rows (16 gate rows and their 16 up rows, or 32 rows of down) for all its tokens. Its
// warps split K, and sum up in warp order at the end.
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
//
// Two launches. decode_up: gate, up, activation, rounded once to `inner`. decode_down: down, float
// rows to `partial`; the last block of a feature tile to finish sums each token's rows in rank
// order (combine.h). Who is last does not change what is summed, so results repeat bit for bit.
// Absent experts are skipped; a second pair of launches over the groups that arrived later gives
// bit for bit the same result as one pair over all, because groups never meet before the combine.
#pragma once

#include "expert_gemm/cuda/activation.h"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/params.h"
#include "expert_gemm/cuda/weight_formats.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

constexpr int kDecodeRows = 32;     // weight rows of a block's tile, in two blocks of 16
constexpr int kDecodeMaxWarps = 8;  // they share K

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

TILE_FUNCTION size_t decode_shared_bytes(int num_warps, int token_groups) {
    return size_t(num_warps) * token_groups * 8 * 32 * sizeof(float);
}

TILE_FUNCTION int decode_feature_tiles(const ExpertParams& p, bool down) {
    if (down) return ceil_div(p.hidden, kDecodeRows);
    return ceil_div(p.inner_size, p.gated ? kDecodeRows / 2 : kDecodeRows);
}

// One warp's steps of the product of 32 weight rows and 8 kTokenGroups tokens.
template <class T, class Format, int kTokenGroups>
class DecodeWarp {
  public:
    // `rows` are this lane's weight rows: g and g + 8 of the first 16, g and g + 8 of the second.
    SIMT_FUNCTION DecodeWarp(const WeightMatrix& matrix, const int (&rows)[4], int warp,
                             int num_warps)
        : matrix_(matrix), stride_(num_warps * kStepK), first_(warp * kStepK) {
        SIMT_UNROLL for (int i = 0; i < 4; ++i) rows_[i] =
            matrix.codes + int64_t(rows[i]) * (matrix.k_size / 8 * Format::kBits);
        SIMT_UNROLL for (int i = 0; i < kScales; ++i) scale_rows_[i] =
            Format::scale_row(matrix, rows[i * 4 / kScales]);
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
            simt::load16<simt::Keep::streamed>(rows_[i] + at / 8 * Format::kBits);
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
    const unsigned char* rows_[4];
    uint32_t scale_rows_[kScales ? kScales : 1];
    int stride_, first_;
    Step steps_[kDepth] = {};
};

// Leaves every warp's accumulators in shared memory as [warp][block, token group, register][lane].
template <int kTokenGroups>
SIMT_FUNCTION void share_sums(float* shared, int warp, const float (&acc)[2][kTokenGroups][4]) {
    float* mine = shared + warp * kTokenGroups * 256 + simt::lane_id();
    SIMT_UNROLL for (int block = 0; block < 2; ++block)
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) SIMT_UNROLL for (int i = 0; i < 4; ++i)
            mine[((block * kTokenGroups + j) * 4 + i) * 32] = acc[block][j][i];
}

// Element (feature n of 16, token of 8 kTokenGroups) of one block of 16, summed over the warps.
template <int kTokenGroups>
SIMT_FUNCTION float sum_of_warps(const float* shared, int num_warps, int block, int n, int token) {
    const int lane = n % 8 * 4 + token % 8 / 2, i = n / 8 * 2 + token % 2;
    const float* at = shared + ((block * kTokenGroups + token / 8) * 4 + i) * 32 + lane;
    float sum = 0.0f;
    SIMT_NO_UNROLL for (int warp = 0; warp < num_warps; ++warp) sum +=
        at[warp * kTokenGroups * 256];
    return sum;
}

// Grid (feature tiles, max_groups), num_warps warps. [R, F] of act(x gate^T) * (x up^T).
template <class T, class Format, int kTokenGroups>
SIMT_FUNCTION void decode_up(const ExpertParams& p, int num_warps, unsigned char* raw_shared) {
    simt::let_next_kernel_start();  // decode_down; it waits before it reads what we write
    if (simt::block_y() >= p.group_count()) return;
    const Group group = p.group(simt::block_y());
    const int32_t page_id = p.pages.page_of(group);
    if (page_id < 0) return;
    const unsigned char* page = p.pages.address(page_id);
    const WeightMatrix matrix = WeightMatrix::make(p, page, false);
    float* shared = reinterpret_cast<float*>(raw_shared);

    const int tile_features = p.gated ? 16 : 32;
    const int first_feature = simt::block_x() * tile_features;
    const int last_feature = p.inner_size - 1;
    const GateUpRows gate_up = GateUpRows::make(p.inner_size, p.interleaved);
    const ActivationForm form = activation_form(p);
    const int g = simt::lane_id() / 4, warp = simt::warp_id();
    int rows[4];
    SIMT_UNROLL for (int i = 0; i < 4; ++i) {
        int feature = first_feature + g + i % 2 * 8 + (p.gated ? 0 : i / 2 * 16);
        feature = feature < last_feature ? feature : last_feature;  // computed, not stored
        rows[i] = !p.gated ? feature : i / 2 ? gate_up.up(feature) : gate_up.gate(feature);
    }

    SIMT_NO_UNROLL for (int first = group.first_row; first < group.end_row;
                        first += 8 * kTokenGroups) {
        DecodeWarp<T, Format, kTokenGroups> product(matrix, rows, warp, num_warps);
        const T* tokens[kTokenGroups];
        SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
            int row = first + 8 * j + g;
            row = row < group.end_row ? row : group.end_row - 1;  // computed, not stored
            const int token = p.route_of_row[row] / p.top_k;
            tokens[j] = static_cast<const T*>(p.x) + int64_t(token) * p.hidden;
        }
        float acc[2][kTokenGroups][4] = {};
        product.multiply(tokens, acc);
        share_sums<kTokenGroups>(shared, warp, acc);
        simt::block_sync();
        const int num_threads = num_warps * simt::kWarpSize;
        SIMT_NO_UNROLL for (int i = simt::thread_id(); i < tile_features * 8 * kTokenGroups;
                            i += num_threads) {
            const int n = i % tile_features, token = i / tile_features;
            const int feature = first_feature + n, row = first + token;
            if (feature > last_feature || row >= group.end_row) continue;
            float value;
            if (p.gated) {
                float gate = sum_of_warps<kTokenGroups>(shared, num_warps, 0, n, token);
                float up = sum_of_warps<kTokenGroups>(shared, num_warps, 1, n, token);
                gate += bias_at<T>(page, p.pages.up_bias_offset, gate_up.gate(feature));
                up += bias_at<T>(page, p.pages.up_bias_offset, gate_up.up(feature));
                value = gate_and_up(form, gate, up);
            } else {
                value = sum_of_warps<kTokenGroups>(shared, num_warps, n / 16, n % 16, token);
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
    const int num_groups = p.group_count(), total_groups = p.total_count();
    const int first_feature = simt::block_x() * kDecodeRows;
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
        int rows[4];
        SIMT_UNROLL for (int i = 0; i < 4; ++i) {
            rows[i] = first_feature + g + 8 * i;
            rows[i] = rows[i] < p.hidden ? rows[i] : p.hidden - 1;
        }
        SIMT_NO_UNROLL for (int first = group.first_row; first < group.end_row;
                            first += 8 * kTokenGroups) {
            DecodeWarp<T, Format, kTokenGroups> product(matrix, rows, warp, num_warps);
            simt::wait_for_previous_kernel();
            const T* tokens[kTokenGroups];
            SIMT_UNROLL for (int j = 0; j < kTokenGroups; ++j) {
                int row = first + 8 * j + g;
                row = row < group.end_row ? row : group.end_row - 1;
                tokens[j] = static_cast<const T*>(p.inner) + int64_t(row) * p.inner_size;
            }
            float acc[2][kTokenGroups][4] = {};
            product.multiply(tokens, acc);
            share_sums<kTokenGroups>(shared, warp, acc);
            simt::block_sync();
            SIMT_NO_UNROLL for (int i = simt::thread_id(); i < kDecodeRows * 8 * kTokenGroups;
                                i += num_threads) {
                const int n = i % kDecodeRows, token = i / kDecodeRows;
                const int feature = first_feature + n, row = first + token;
                if (feature >= p.hidden || row >= group.end_row) continue;
                float value = sum_of_warps<kTokenGroups>(shared, num_warps, n / 16, n % 16, token);
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
    SIMT_NO_UNROLL for (int i = simt::thread_id(); i < p.num_tokens * (kDecodeRows / 4);
                        i += num_threads) {
        const int feature = first_feature + i % (kDecodeRows / 4) * 4;
        if (feature < p.hidden) combine4<T>(p, i / (kDecodeRows / 4), feature);
    }
}

}  // namespace moe_offload::cuda
