// Weights that are not stored as rows of the dtype the products read, brought there a panel at a
// time: a thread turns the rows it is about to use into scratch that stays in its L2, and runs the
// same kernels on it. Transposed matrices (transpose.h) and quantised ones (dequantise.h).
#pragma once

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

// Columns of a transposed matrix that are turned into rows at a time: one cache line of bf16.
// Rows of a quantised one: few enough for the L2, enough to pay for the tables of fp8 blocks.
constexpr int64_t kPanelRows = 32;

inline bool is_int4(WeightFormat format) {
    return format == WeightFormat::kInt4Group || format == WeightFormat::kInt4GroupF16;
}

// Bytes of one row of codes.
inline int64_t code_row_bytes(WeightFormat format, int64_t k_size) {
    return format == WeightFormat::kMxfp4 || is_int4(format) ? k_size / 2 : k_size;
}

inline bool is_transposed(const WeightView& view, WeightFormat format, int64_t item) {
    return format == WeightFormat::kPlain && view.k_stride != item;
}

// Must this matrix go through panels?
inline bool needs_panel(const WeightView& view, WeightFormat format, int64_t item) {
    return format != WeightFormat::kPlain || is_transposed(view, format, item);
}

// Do gate and up take turns in one matrix, so that a panel holds both?
inline bool is_alternating(const FfnWeights& weights, int64_t hidden, int64_t item) {
    const int64_t apart =
        weights.format == WeightFormat::kPlain ? item : code_row_bytes(weights.format, hidden);
    return weights.gate.base && weights.up.base == weights.gate.base + apart;
}

// Rows of one or two matrices in scratch.
struct Panel {
    Panel(const Kernels& kernels, WeightFormat format, int64_t max_rows, int64_t k_size,
          int64_t item)
        : kernels(kernels), format(format), k_size(k_size), item(item) {
        // An odd number of cache lines: rows do not fall into one set of the L1.
        stride = ((k_size * item + 63) / 64 | 1) * 64;
        rows = Buffer(static_cast<size_t>(max_rows * stride));
    }

    // Rows [begin, end) of the matrix become rows first, first + 1, ... of the scratch; returns
    // where row 0 of the whole matrix would be, so that row n is n * stride further on. `next`: as
    // many rows behind them will be asked for.
    const std::byte* take(const WeightView& matrix, int64_t slot, int64_t begin, int64_t end,
                          bool next, int64_t first) const {
        std::byte* to = rows.data() + first * stride;
        const int64_t count = next ? end - begin : 0;
        if (format == WeightFormat::kPlain)
            kernels.transpose(matrix.slot(slot) + begin * item, matrix.k_stride, end - begin,
                              k_size, count * item, to, stride);
        else
            kernels.dequantise({format, matrix.slot(slot), matrix.slot_scales(slot), k_size, begin,
                                end, count * code_row_bytes(format, k_size), to, stride,
                                matrix.group});
        return to - begin * stride;
    }

    const Kernels& kernels;
    WeightFormat format;
    int64_t k_size, item, stride;
    Buffer rows;
};

}  // namespace moe_offload
