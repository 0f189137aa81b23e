// The parts of a router that are vector code: logits of a few rows, and what is done to one row of
// them. router.cpp puts them together.
//
// Logits are the few-row products (few_rows.h), left in fp32: an element is summed over k in one
// order, whatever rows it is computed with. Values of one row are fp32 in memory with room for
// whole vectors.
#pragma once

#include "expert_gemm/cpu/activations.h"
#include "expert_gemm/cpu/few_rows.h"
#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

template <class Op, int MR>
void logits_few_rows(const LogitsArgs& a) {
    alignas(64) float c[MR * kChunkStride] = {};
    FewMatrix matrix{};
    matrix.base = a.weight;
    matrix.row_stride = a.row_stride;
    for (int64_t n = a.begin; n < a.end; n += kChunk) {
        const int64_t stop = n + kChunk < a.end ? n + kChunk : a.end, count = stop - n;
        few_product<Op, MR>(static_cast<const typename Op::X*>(a.x), few_stride<Op>(a.hidden),
                            matrix, n, stop, a.end, a.hidden, c);
        for (int64_t m = 0; m < MR; ++m) {
            float* row = c + m * kChunkStride;
            add_bias<Op>(row, a.bias, sizeof(typename Op::T), n, count);
            std::memcpy(a.logits + m * a.logits_stride + n, row,
                        static_cast<size_t>(count) * sizeof(float));
        }
    }
}

template <class Op, int MR = 1>
void logits_few(const LogitsArgs& a) {
    if constexpr (MR < kMostFewRows<Op>)
        if (a.rows > MR) return logits_few<Op, MR + 1>(a);
    logits_few_rows<Op, MR>(a);
}

// to[i] = values[i] in the dtype, and values[i] that widened again.
template <class Op>
void round_values(float* values, int64_t count, void* to) {
    using L = typename Op::L;
    using T = typename Op::T;
    for (int64_t i = 0; i < count; i += L::kWidth) {
        T lanes[L::kWidth];
        L::store(lanes, L::load(values + i));
        L::store(values + i, L::load(lanes));
        const int64_t some = count - i < L::kWidth ? count - i : L::kWidth;
        std::memcpy(static_cast<T*>(to) + i, lanes, static_cast<size_t>(some) * sizeof(T));
    }
}

// e^x for x <= 0, gradual underflow and NaN included: probabilities that differ are not to tie.
template <class L>
inline typename L::V exp_or_nan(typename L::V x) {
    using I = typename L::I;
    const auto half = exp_lanes<L>(x * L::set(0.5f));
    const auto y = L::select((I)(x < L::set(-87.0f)), half * half, exp_lanes<L>(x));
    return L::select((I)(x != x), x, y);
}

template <class L>
void softmax_values(float* values, int64_t count) {
    using V = typename L::V;
    using I = typename L::I;
    const int64_t padded = (count + L::kWidth - 1) / L::kWidth * L::kWidth;
    for (int64_t i = count; i < padded; ++i) values[i] = -__builtin_inff();
    V high = L::load(values);
    for (int64_t i = L::kWidth; i < padded; i += L::kWidth) {
        const V v = L::load(values + i);
        high = L::select((I)(v > high), v, high);
    }
    float lanes[L::kWidth];
    L::store(lanes, high);
    float max = lanes[0];
    for (const float v : lanes) max = v > max ? v : max;  // a NaN makes the sum NaN, below
    V sum = L::set(0.0f);
    for (int64_t i = 0; i < padded; i += L::kWidth) {
        const V e = exp_or_nan<L>(L::load(values + i) - L::set(max));
        L::store(values + i, e);
        sum = sum + e;
    }
    float total[16];
    L::template sums<1>(&sum, total);
    for (int64_t i = 0; i < padded; i += L::kWidth)
        L::store(values + i, L::load(values + i) / L::set(total[0]));
}

template <class L>
void sigmoid_values(float* values, int64_t count) {
    using I = typename L::I;
    for (int64_t i = 0; i < count; i += L::kWidth) {
        const auto x = L::load(values + i);
        auto y = sigmoid_times<L>(L::set(1.0f), x);
        y = L::select((I)(x < L::set(-88.7228394f)), L::set(0.0f), y);  // e^-x is infinite
        L::store(values + i, L::select((I)(x != x), x, y));
    }
}

}  // namespace
}  // namespace moe_offload
