// From accumulators to memory in both prefill kernels: bias, activation, one rounding, 4-byte
// stores. Both instructions (mma.m16n8k16, wgmma.m64) leave a thread two neighbouring columns of
// each block of eight weight rows, so one function serves both.
#pragma once

#include "expert_gemm/cuda/activation.h"
#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

// One thread's share of one row. Block j of kBlocks holds weight rows first_weight + 8j ... of the
// tile; `value(j, c)` is (a reference to) the accumulator of its column t2 + c. Features from
// `first_feature` on. Biases are added in a pass of their own: pages that have none skip it whole.
// `alternate` (a constant where it cannot be): weight rows are gate and up of a feature in turn, so
// the thread's two columns are one feature.
template <class T, int kBlocks, bool kDown, bool kSmooth, class Value>
SIMT_FUNCTION void store_row(const ExpertParams& p, const ActivationForm& form,
                             const unsigned char* page, T* out_row, int first_feature,
                             int first_weight, int t2, bool alternate, Value&& value) {
    const int num_features = kDown ? p.hidden : p.inner_size;
    const int64_t bias = kDown ? p.pages.down_bias_offset : p.pages.up_bias_offset;
    if (!kDown && alternate) {
        SIMT_UNROLL for (int j = 0; j < kBlocks; ++j) {
            const int feature = first_feature + (first_weight + j * 8 + t2) / 2;
            if (feature >= num_features) continue;
            const float gate = value(j, 0) + bias_at<T>(page, bias, 2 * feature);
            const float up = value(j, 1) + bias_at<T>(page, bias, 2 * feature + 1);
            out_row[feature] = simt::from_float<T>(gate_and_up<kSmooth>(form, gate, up));
        }
    } else if (!kDown && p.gated) {
        if (bias >= 0) {
            const GateUpRows rows = GateUpRows::make(p.inner_size, p.interleaved);
            SIMT_UNROLL for (int j = 0; j < kBlocks; j += 2) {
                const int feature = first_feature + gated_feature(first_weight + j * 8) + t2;
                if (feature >= num_features) continue;
                SIMT_UNROLL for (int c = 0; c < 2; ++c) {
                    value(j, c) += bias_at<T>(page, bias, rows.gate(feature + c));
                    value(j + 1, c) += bias_at<T>(page, bias, rows.up(feature + c));
                }
            }
        }
        SIMT_UNROLL for (int j = 0; j < kBlocks; j += 2) {
            const int feature = first_feature + gated_feature(first_weight + j * 8) + t2;
            if (feature >= num_features) continue;
            simt::store4(out_row + feature,
                         simt::pack<T>(gate_and_up<kSmooth>(form, value(j, 0), value(j + 1, 0)),
                                       gate_and_up<kSmooth>(form, value(j, 1), value(j + 1, 1))));
        }
    } else {
        SIMT_UNROLL for (int j = 0; j < kBlocks; ++j) {
            const int feature = first_feature + first_weight + j * 8 + t2;
            if (feature >= num_features) continue;
            float y[2] = {value(j, 0), value(j, 1)};
            SIMT_UNROLL for (int c = 0; c < 2; ++c) {
                if (bias >= 0) y[c] += bias_at<T>(page, bias, feature + c);
                if constexpr (!kDown) y[c] = activate<kSmooth>(form, y[c]);
            }
            simt::store4(out_row + feature, simt::pack<T>(y[0], y[1]));
        }
    }
}

// `rows(smooth)` once, with the kind of activation known at compile time inside the unrolled loops.
template <bool kValue>
struct Smooth {
    static constexpr bool value = kValue;
};
template <bool kDown, class Rows>
SIMT_FUNCTION void with_smooth(const ActivationForm& form, Rows&& rows) {
    if (kDown || form.smooth())
        rows(Smooth<true>{});
    else
        rows(Smooth<false>{});
}

}  // namespace moe_offload::cuda
