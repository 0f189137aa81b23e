// The three kinds of task of FfnRun: pack rows of x, multiply by rows of gate and up, by rows of
// down. Weights that the products do not read in place become rows here, panel by panel (panel.h).
#include <algorithm>

#include "expert_gemm/cpu/ffn_run.h"
#include "expert_gemm/cpu/panel.h"
#include "expert_gemm/cpu/sharing.h"

namespace moe_offload {
namespace {

// take(begin, end, next) for one panel after the other; `next`: as many rows are behind it.
template <class F>
void in_panels(int64_t first, int64_t last, int64_t step, F&& take) {
    for (int64_t begin = first; begin < last; begin += step) {
        const int64_t end = std::min(last, begin + step);
        take(begin, end, end < last);
    }
}

// Do few rows read weights that are quantised or transposed where they are?
bool are_read_as_stored(const ProductArgs& a) {
    return a.k_stride || a.format != WeightFormat::kPlain;
}

WeightRows rows_of(const WeightView& matrix, int64_t slot) {
    return {matrix.slot(slot), matrix.slot_scales(slot)};
}

}  // namespace

FfnRun::Reading::Reading(const Kernels& k, const FfnShape& shape, const FfnWeights& weights) {
    const auto item = static_cast<int64_t>(item_size(shape.dtype));
    up_in_place = !needs_panel(weights.up, weights.format, item);
    down_in_place = !needs_panel(weights.down, weights.format, item);
    alternating = is_alternating(weights, shape.hidden, item);
    // A panel has the features of whole tiles, and 64 bytes of a transposed matrix at least.
    up_step =
        up_in_place ? k.row_step : whole_steps(kPanelRows / (alternating ? 2 : 1), k.row_step);
    down_step = down_in_place ? k.row_step : whole_steps(kPanelRows, k.row_step);
}

void FfnRun::pack(const Group& group, int64_t begin, int64_t end, std::byte* buffer) const {
    const int64_t* tokens = tokens_.data() + group.first + begin;
    std::byte* to = buffer + group.x + kernels_.row_offset(begin, group.few, shape_.hidden);
    (group.few ? kernels_.pack_few : kernels_.pack_block)(inputs_.hidden, tokens, end - begin,
                                                          shape_.hidden, to);
}

void FfnRun::set(ProductArgs& a, const Group& group, const WeightView& matrix,
                 const WeightView& bias, WeightFormat format, int64_t begin, int64_t end) const {
    const auto item = static_cast<int64_t>(item_size(shape_.dtype));
    a.rows = group.rows;
    a.hidden = shape_.hidden;
    a.inner = shape_.inner;
    a.format = group.few ? format : WeightFormat::kPlain;
    a.row_stride = matrix.row_stride;
    a.row_step = 1;
    const bool by_columns = group.few && group.rows <= kernels_.few_columns_rows;
    a.k_stride = by_columns && is_transposed(matrix, format, item) ? matrix.k_stride : 0;
    a.group = matrix.group;
    a.bias_stride = bias.row_stride;
    a.begin = begin;
    a.end = end;
}

// `matrices` of them with K columns.
Buffer FfnRun::scratch_of(const ProductArgs& a, const Group& group, int64_t k_size,
                          size_t matrices) const {
    const Kernels& k = kernels_;
    if (!group.few) return make_scratch(k.scratch_bytes(k_size));
    return make_scratch(a.k_stride ? k.few_columns_bytes(group.rows)
                                   : matrices * few_scratch_bytes(a.format, k_size));
}

void FfnRun::gate_up(const FfnWeights& weights, const Reading& how, const Group& group,
                     int64_t first, int64_t last, std::byte* buffer) const {
    const Kernels& k = kernels_;
    GateUpArgs a{};
    set(a, group, weights.up, weights.up_bias, weights.format, first, last);
    const Buffer scratch = scratch_of(a, group, shape_.hidden, 2);
    a.scratch = scratch.data();
    a.x = buffer + group.x;
    a.gate = rows_of(weights.gate, group.slot);
    a.up = rows_of(weights.up, group.slot);
    if (are_read_as_stored(a) && how.alternating) {  // both are rows of one matrix
        a.row_step = 2;
        a.up = a.gate;
        a.up.first = 1;
    }
    a.gate_bias = weights.gate_bias.slot(group.slot);
    a.up_bias = weights.up_bias.slot(group.slot);
    a.activation = shape_.activation;
    a.h = buffer + group.h;
    const auto multiply = group.few ? k.gate_up_few : k.gate_up_many;
    if (how.up_in_place || are_read_as_stored(a)) return multiply(a);
    const Panel panel(k, weights.format, 2 * how.up_step, shape_.hidden,
                      static_cast<int64_t>(item_size(shape_.dtype)));
    a.row_stride = (how.alternating ? 2 : 1) * panel.stride;
    in_panels(first, last, how.up_step, [&](int64_t begin, int64_t end, bool next) {
        if (how.alternating) {
            a.gate = {panel.take(weights.gate, group.slot, 2 * begin, 2 * end, next, 0)};
            a.up = {a.gate.base + panel.stride};
        } else {
            a.up = {panel.take(weights.up, group.slot, begin, end, next, 0)};
            if (shape_.activation.gated)
                a.gate = {panel.take(weights.gate, group.slot, begin, end, next, how.up_step)};
        }
        a.begin = begin;
        a.end = end;
        multiply(a);
    });
}

void FfnRun::down(const FfnWeights& weights, const Reading& how, const Group& group, int64_t first,
                  int64_t last, std::byte* buffer) const {
    const Kernels& k = kernels_;
    DownArgs a{};
    set(a, group, weights.down, weights.down_bias, weights.format, first, last);
    const Buffer scratch = scratch_of(a, group, shape_.inner, 1);
    a.scratch = scratch.data();
    a.h = buffer + group.h;
    a.down = rows_of(weights.down, group.slot);
    a.bias = weights.down_bias.slot(group.slot);
    a.row_weights = row_weights_.data() + group.first;
    a.row_ids = row_ids_.data() + group.first;
    a.y = y_.data();
    const auto multiply = group.few ? k.down_few : k.down_many;
    if (how.down_in_place || are_read_as_stored(a)) return multiply(a);
    const Panel panel(k, weights.format, how.down_step, shape_.inner,
                      static_cast<int64_t>(item_size(shape_.dtype)));
    a.row_stride = panel.stride;
    in_panels(first, last, how.down_step, [&](int64_t begin, int64_t end, bool next) {
        a.down = {panel.take(weights.down, group.slot, begin, end, next, 0)};
        a.begin = begin;
        a.end = end;
        multiply(a);
    });
}

}  // namespace moe_offload
