// Root mean square normalisation of rows: two passes over a row that is in the L1 by the second.
//
// A row's squares are added in fp32 in one order, four vectors of sums, whatever thread it falls
// to: bits depend on the instruction set and the dtype only.
#pragma once

#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

template <class Op>
void norm_rows(const NormArgs& a) {
    using L = typename Op::L;
    using T = typename Op::T;
    constexpr int64_t kWidth = L::kWidth;
    const T* weight = static_cast<const T*>(a.weight);
    const int64_t whole = a.size / kWidth * kWidth, rest = a.size - whole;
    T tail[kWidth] = {}, weight_tail[kWidth] = {};
    std::memcpy(weight_tail, weight + whole, static_cast<size_t>(rest) * sizeof(T));
    const typename L::V offset = L::set(a.weight_offset);
    for (int64_t row = a.begin; row < a.end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.size;
        T* y = static_cast<T*>(a.y) + row * a.size;
        typename L::V sums[4];
        for (auto& sum : sums) sum = L::set(0.0f);
        int64_t i = 0;
        for (; i + 4 * kWidth <= whole; i += 4 * kWidth)
            for (int64_t j = 0; j < 4; ++j) {
                const typename L::V v = L::load(x + i + j * kWidth);
                sums[j] = L::fma(v, v, sums[j]);
            }
        for (; i < whole; i += kWidth) {
            const typename L::V v = L::load(x + i);
            sums[0] = L::fma(v, v, sums[0]);
        }
        std::memcpy(tail, x + whole, static_cast<size_t>(rest) * sizeof(T));
        const typename L::V last = L::load(tail);
        sums[1] = L::fma(last, last, sums[1]);
        sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        float total[16];
        L::template sums<1>(sums, total);
        const float mean = total[0] / static_cast<float>(a.size);
        const typename L::V scale = L::set(1.0f / __builtin_sqrtf(mean + a.epsilon));
        const auto scaled = [&](typename L::V v, typename L::V w) {
            v = v * scale;
            if (a.rounds_before_weight) v = round_to<L, T>(v);
            return v * (w + offset);
        };
        for (i = 0; i < whole; i += kWidth)
            L::store(y + i, scaled(L::load(x + i), L::load(weight + i)));
        T out[kWidth];
        L::store(out, scaled(last, L::load(weight_tail)));
        std::memcpy(y + whole, out, static_cast<size_t>(rest) * sizeof(T));
    }
}

}  // namespace
}  // namespace moe_offload
