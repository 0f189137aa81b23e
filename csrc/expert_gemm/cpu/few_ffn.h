// The routed FFN of few rows: their products with gate and up, and with down (few_rows.h, and
// few_quantised.h for weights that are), and what follows each.
#pragma once

#include "expert_gemm/cpu/activations.h"
#include "expert_gemm/cpu/few_quantised.h"
#include "expert_gemm/cpu/few_rows.h"
#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {
namespace {

struct Plain {
    template <class Op, int MR>
    static constexpr FewProduct<Op> product = &few_product<Op, MR>;
};
template <class Rows>
struct ScaledRows {
    template <class Op, int MR>
    static constexpr FewProduct<Op> product = &few_product_quantised<Op, MR, Rows>;
};
template <class Scale>
struct ScaledBlocks {
    template <class Op, int MR>
    static constexpr FewProduct<Op> product = &few_product_fp8<Op, MR, Scale>;
};

template <class Op, class Matrix>
inline FewProduct<Op> of_rows(int64_t rows) {
    static constexpr FewProduct<Op> kByRows[kMostFewRows] = {
        Matrix::template product<Op, 1>, Matrix::template product<Op, 2>,
        Matrix::template product<Op, 3>, Matrix::template product<Op, 4>,
        Matrix::template product<Op, 5>, Matrix::template product<Op, 6>,
        Matrix::template product<Op, 7>, Matrix::template product<Op, 8>};
    return kByRows[rows - 1];
}

// The product of `rows` rows of x; quantised matrices mean bf16.
template <class Op>
inline FewProduct<Op> few_product_of(WeightFormat format, int64_t rows) {
    if constexpr (__is_same(typename Op::T, BF16)) {
        switch (format) {
            case WeightFormat::kMxfp4:
                return of_rows<Op, ScaledRows<Mxfp4Rows>>(rows);
            case WeightFormat::kFp8Block:
                return of_rows<Op, ScaledBlocks<float>>(rows);
            case WeightFormat::kFp8BlockBF16:
                return of_rows<Op, ScaledBlocks<BF16>>(rows);
            case WeightFormat::kInt4Group:
                return of_rows<Op, ScaledRows<Int4Rows<BF16>>>(rows);
            case WeightFormat::kInt4GroupF16:
                return of_rows<Op, ScaledRows<Int4Rows<F16>>>(rows);
            case WeightFormat::kPlain:
                break;
        }
    }
    return of_rows<Op, Plain>(rows);
}

// `scratch`: a matrix's part of ProductArgs::scratch.
inline FewMatrix few_matrix(const ProductArgs& a, const WeightRows& rows, std::byte* scratch) {
    return {rows.base,  a.row_stride, a.in_cache, rows.scales,
            rows.first, a.row_step,   a.group,    reinterpret_cast<BF16*>(scratch)};
}

template <class Op>
inline void add_bias(float* c, const std::byte* bias, int64_t stride, int64_t begin,
                     int64_t count) {
    if (!bias) return;
    for (int64_t n = 0; n < count; ++n)
        c[n] += widen(*reinterpret_cast<const typename Op::T*>(bias + (begin + n) * stride));
}

template <class Op>
void gate_up_few(const GateUpArgs& a) {
    using L = typename Op::L;
    using X = typename Op::X;
    const int64_t x_stride = few_stride<Op>(a.hidden), h_stride = few_stride<Op>(a.inner);
    const X* x = static_cast<const X*>(a.x);
    const auto product = few_product_of<Op>(a.format, a.rows);
    FewMatrix gates = few_matrix(a, a.gate, a.scratch);
    FewMatrix ups = few_matrix(a, a.up, a.scratch + few_scratch_bytes(a.format, a.hidden));
    alignas(64) float gate[kMostFewRows * kChunkStride] = {}, up[kMostFewRows * kChunkStride] = {};
    alignas(64) X rounded[kChunkStride];
    for (int64_t f = a.begin; f < a.end; f += kChunk) {
        const int64_t stop = f + kChunk < a.end ? f + kChunk : a.end, count = stop - f;
        for (int64_t n = f; n < stop; n += 24) {  // gate and up advance together
            const int64_t end = n + 24 < stop ? n + 24 : stop;
            if (gates.base) product(x, x_stride, gates, n, end, a.end, a.hidden, gate + (n - f));
            product(x, x_stride, ups, n, end, a.end, a.hidden, up + (n - f));
        }
        for (int64_t m = 0; m < a.rows; ++m) {
            float *g = gate + m * kChunkStride, *u = up + m * kChunkStride;
            add_bias<Op>(g, a.gate_bias, a.bias_stride, f, count);
            add_bias<Op>(u, a.up_bias, a.bias_stride, f, count);
            for (int64_t n = 0; n < count; n += L::kWidth)
                Op::store_h(rounded + n, activate<L>(a.activation, L::load(g + n), L::load(u + n)));
            X* h = static_cast<X*>(a.h) + m * h_stride;
            std::memcpy(h + f, rounded, static_cast<size_t>(count) * sizeof(X));
            if (stop == a.inner)  // the last vector of K is read whole
                std::memset(h + stop, 0, static_cast<size_t>(h_stride - stop) * sizeof(X));
        }
    }
}

template <class Op>
void down_few(const DownArgs& a) {
    using L = typename Op::L;
    using T = typename Op::T;
    const auto product = few_product_of<Op>(a.format, a.rows);
    FewMatrix matrix = few_matrix(a, a.down, a.scratch);
    alignas(64) float c[kMostFewRows * kChunkStride] = {};
    alignas(64) T rounded[kChunkStride];
    for (int64_t n = a.begin; n < a.end; n += kChunk) {
        const int64_t stop = n + kChunk < a.end ? n + kChunk : a.end, count = stop - n;
        product(static_cast<const typename Op::X*>(a.h), few_stride<Op>(a.inner), matrix, n, stop,
                a.end, a.inner, c);
        for (int64_t m = 0; m < a.rows; ++m) {
            float* row = c + m * kChunkStride;
            add_bias<Op>(row, a.bias, a.bias_stride, n, count);
            const typename L::V weight = L::set(a.row_weights[m]);
            for (int64_t i = 0; i < count; i += L::kWidth)
                L::store(rounded + i, L::load(row + i) * weight);
            std::byte* y = a.y + (a.row_ids[m] * a.hidden + n) * static_cast<int64_t>(sizeof(T));
            std::memcpy(y, rounded, static_cast<size_t>(count) * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace moe_offload
