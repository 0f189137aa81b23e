// The routed FFN of few rows: their products with gate and up, and with down (few_rows.h, for
// quantised weights few_quantised.h, for transposed ones few_columns.h), and what follows each.
#pragma once

#include "expert_gemm/cpu/activations.h"
#include "expert_gemm/cpu/few_columns.h"
#include "expert_gemm/cpu/few_quantised.h"
#include "expert_gemm/cpu/few_rows.h"
#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {
namespace {

struct Plain {
    template <class Op, int MR>
    static constexpr FewProduct<Op> product = &few_product<Op, MR>;
};
template <WeightFormat Format>
struct Quantised {
    template <class Op, int MR>
    static constexpr FewProduct<Op> product = quantised_product<Op, MR, Format>();
};

template <class Op, class Matrix, int MR = 1>
inline FewProduct<Op> of_rows(int64_t rows) {
    if constexpr (MR < kMostFewRows<Op>)
        if (rows > MR) return of_rows<Op, Matrix, MR + 1>(rows);
    return Matrix::template product<Op, MR>;
}

// The product of `rows` rows of x; quantised matrices mean bf16.
template <class Op>
inline FewProduct<Op> few_product_of(WeightFormat format, int64_t rows) {
    if constexpr (__is_same(typename Op::T, BF16)) {
        switch (format) {
            case WeightFormat::kMxfp4:
                return of_rows<Op, Quantised<WeightFormat::kMxfp4>>(rows);
            case WeightFormat::kFp8Block:
                return of_rows<Op, Quantised<WeightFormat::kFp8Block>>(rows);
            case WeightFormat::kFp8BlockBF16:
                return of_rows<Op, Quantised<WeightFormat::kFp8BlockBF16>>(rows);
            case WeightFormat::kInt4Group:
                return of_rows<Op, Quantised<WeightFormat::kInt4Group>>(rows);
            case WeightFormat::kInt4GroupF16:
                return of_rows<Op, Quantised<WeightFormat::kInt4GroupF16>>(rows);
            case WeightFormat::kPlain:
                break;
        }
    }
    return of_rows<Op, Plain>(rows);
}

// `scratch`: a matrix's part of ProductArgs::scratch.
inline FewMatrix few_matrix(const ProductArgs& a, const WeightRows& rows, std::byte* scratch) {
    return {rows.base,
            a.row_stride,
            rows.scales,
            rows.first,
            a.row_step,
            a.group,
            reinterpret_cast<BF16*>(scratch)};
}

// h of features [f, f + count) from their products, ldc apart from row to row. Whole vectors of
// them are read.
template <class Op>
inline void finish_gate_up(const GateUpArgs& a, int64_t f, int64_t count, float* gate, float* up,
                           int64_t ldc) {
    using L = typename Op::L;
    using X = typename Op::X;
    const int64_t h_stride = few_stride<Op>(a.inner);
    alignas(64) X rounded[kChunkStride];
    for (int64_t m = 0; m < a.rows; ++m) {
        float *g = gate + m * ldc, *u = up + m * ldc;
        add_bias<Op>(g, a.gate_bias, a.bias_stride, f, count);
        add_bias<Op>(u, a.up_bias, a.bias_stride, f, count);
        X* h = static_cast<X*>(a.h) + m * h_stride;
        for (int64_t begin = 0; begin < count; begin += kChunk) {
            const int64_t some = count - begin < kChunk ? count - begin : kChunk;
            for (int64_t n = 0; n < some; n += L::kWidth)
                Op::store_h(rounded + n, activate<L>(a.activation, L::load(g + begin + n),
                                                     L::load(u + begin + n)));
            if constexpr (has_places<Op>)
                for (int64_t i = 0; i < some; ++i) h[Op::place(f + begin + i)] = rounded[i];
            else
                std::memcpy(h + f + begin, rounded, static_cast<size_t>(some) * sizeof(X));
        }
        if (f + count != a.inner) continue;
        for (int64_t i = a.inner; i < h_stride; ++i) {  // the last vector of K is read whole
            if constexpr (has_places<Op>)
                h[Op::place(i)] = 0.0f;
            else
                h[i] = X{};
        }
    }
}

// y of columns [n, n + count), likewise.
template <class Op>
inline void finish_down(const DownArgs& a, int64_t n, int64_t count, float* c, int64_t ldc) {
    using L = typename Op::L;
    using T = typename Op::T;
    alignas(64) T rounded[kChunkStride];
    for (int64_t m = 0; m < a.rows; ++m) {
        float* row = c + m * ldc;
        add_bias<Op>(row, a.bias, a.bias_stride, n, count);
        const typename L::V weight = L::set(a.row_weights[m]);
        T* y = reinterpret_cast<T*>(a.y) + a.row_ids[m] * a.hidden + n;
        for (int64_t begin = 0; begin < count; begin += kChunk) {
            const int64_t some = count - begin < kChunk ? count - begin : kChunk;
            for (int64_t i = 0; i < some; i += L::kWidth)
                L::store(rounded + i, L::load(row + begin + i) * weight);
            std::memcpy(y + begin, rounded, static_cast<size_t>(some) * sizeof(T));
        }
    }
}

// Floats of ProductArgs::scratch beside the sums: products of whole blocks of two matrices.
template <class Op>
inline int64_t column_stride(int64_t rows) {
    return FewColumns<Op>::at_a_time(rows) + FewColumns<Op>::kBlock;
}

template <class Op>
size_t few_columns_bytes(int64_t rows) {
    const int64_t floats = FewColumns<Op>::sums(rows) + 3 * rows * column_stride<Op>(rows);
    return static_cast<size_t>(floats) * sizeof(float);
}

// Transposed matrices.
template <class Op>
void gate_up_columns(const GateUpArgs& a) {
    using X = typename Op::X;
    constexpr int64_t kItem = sizeof(typename Op::T);
    const int64_t stride = column_stride<Op>(a.rows);
    auto* const scratch = reinterpret_cast<float*>(a.scratch);
    const FewColumns<Op> columns{static_cast<const X*>(a.x),
                                 a.rows,
                                 few_stride<Op>(a.hidden),
                                 a.k_stride,
                                 a.hidden,
                                 scratch};
    float* const both = scratch + FewColumns<Op>::sums(a.rows);
    float *const gate = both + a.rows * stride, *const up = gate + a.rows * stride;
    const bool in_turn = a.row_step == 2;  // gate and up
    const int64_t step = FewColumns<Op>::at_a_time(a.rows) / a.row_step;
    for (int64_t f = a.begin; f < a.end; f += step) {
        const int64_t count = f + step < a.end ? step : a.end - f;
        const bool last = f + count == a.end;
        const auto at = [&](const WeightRows& matrix) {
            return matrix.base + f * a.row_step * kItem;
        };
        const int64_t further = count * a.row_step * kItem;
        if (in_turn) {
            columns.multiply(at(a.gate), 2 * count, last ? nullptr : at(a.gate) + further, both,
                             stride);
            for (int64_t m = 0; m < a.rows; ++m)
                for (int64_t n = 0; n < count; ++n) {
                    gate[m * stride + n] = both[m * stride + 2 * n];
                    up[m * stride + n] = both[m * stride + 2 * n + 1];
                }
        } else {
            if (a.gate.base) columns.multiply(at(a.gate), count, at(a.up), gate, stride);
            const WeightRows& first = a.gate.base ? a.gate : a.up;
            columns.multiply(at(a.up), count, last ? nullptr : at(first) + further, up, stride);
        }
        finish_gate_up<Op>(a, f, count, gate, up, stride);
    }
}

template <class Op>
void down_columns(const DownArgs& a) {
    using X = typename Op::X;
    constexpr int64_t kItem = sizeof(typename Op::T);
    const int64_t stride = column_stride<Op>(a.rows), step = FewColumns<Op>::at_a_time(a.rows);
    auto* const scratch = reinterpret_cast<float*>(a.scratch);
    const FewColumns<Op> columns{
        static_cast<const X*>(a.h), a.rows, few_stride<Op>(a.inner), a.k_stride, a.inner, scratch};
    float* const c = scratch + FewColumns<Op>::sums(a.rows);
    for (int64_t n = a.begin; n < a.end; n += step) {
        const int64_t count = n + step < a.end ? step : a.end - n;
        const std::byte* at = a.down.base + n * kItem;
        columns.multiply(at, count, n + count == a.end ? nullptr : at + count * kItem, c, stride);
        finish_down<Op>(a, n, count, c, stride);
    }
}

template <class Op>
void gate_up_few(const GateUpArgs& a) {
    if (a.k_stride) return gate_up_columns<Op>(a);
    const int64_t x_stride = few_stride<Op>(a.hidden);
    const auto* x = static_cast<const typename Op::X*>(a.x);
    const auto product = few_product_of<Op>(a.format, a.rows);
    FewMatrix gates = few_matrix(a, a.gate, a.scratch);
    FewMatrix ups = few_matrix(a, a.up, a.scratch + few_scratch_bytes(a.format, a.hidden));
    constexpr int64_t kOutputs = kMostFewRows<Op> * kChunkStride;
    alignas(64) float gate[kOutputs] = {}, up[kOutputs] = {};
    for (int64_t f = a.begin; f < a.end; f += kChunk) {
        const int64_t stop = f + kChunk < a.end ? f + kChunk : a.end;
        for (int64_t n = f; n < stop; n += 24) {  // gate and up advance together
            const int64_t end = n + 24 < stop ? n + 24 : stop;
            if (gates.base) product(x, x_stride, gates, n, end, a.end, a.hidden, gate + (n - f));
            product(x, x_stride, ups, n, end, a.end, a.hidden, up + (n - f));
        }
        finish_gate_up<Op>(a, f, stop - f, gate, up, kChunkStride);
    }
}

template <class Op>
void down_few(const DownArgs& a) {
    if (a.k_stride) return down_columns<Op>(a);
    const auto product = few_product_of<Op>(a.format, a.rows);
    FewMatrix matrix = few_matrix(a, a.down, a.scratch);
    alignas(64) float c[kMostFewRows<Op> * kChunkStride] = {};
    for (int64_t n = a.begin; n < a.end; n += kChunk) {
        const int64_t stop = n + kChunk < a.end ? n + kChunk : a.end;
        product(static_cast<const typename Op::X*>(a.h), few_stride<Op>(a.inner), matrix, n, stop,
                a.end, a.inner, c);
        finish_down<Op>(a, n, stop - n, c, kChunkStride);
    }
}

}  // namespace
}  // namespace moe_offload
