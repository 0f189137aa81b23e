#include "expert_gemm/cpu/ffn_run.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "expert_gemm/cpu/panel.h"
#include "expert_gemm/cpu/thread_pool.h"
#include "expert_gemm/route_sort.h"

namespace moe_offload {
namespace {

// Packed x and h of one batch of experts; more rows than fit go into the next batch.
constexpr size_t kBatchBytes = size_t{64} << 20;
// Waking a thread pays from about this much work on, in bytes read (about 20 us).
constexpr int64_t kWorthSharing = 256 << 10;
// Rows whose arithmetic takes as long as reading one weight row: 25 GB/s against 200 GFLOP/s of a
// core (measured on Zen 4) is about 8 bf16 rows. Only balances work between threads.
constexpr int64_t kRowsPerByteTime = 8;
// A thread keeps a chunk to itself, so chunks bound the imbalance; below 64 KiB they cost more.
constexpr int64_t kChunksPerThread = 32, kMinChunkBytes = 64 << 10;

void check_strides(const FfnWeights& weights, const FfnShape& shape) {
    const auto item = static_cast<int64_t>(item_size(shape.dtype));
    const bool gated = shape.activation.gated;
    const bool alternating = is_alternating(weights, shape.hidden, item);
    if (gated && (weights.gate.row_stride != weights.up.row_stride ||
                  weights.gate.k_stride != weights.up.k_stride))
        throw std::invalid_argument("FfnRun: gate and up must have the same strides");
    if (weights.format == WeightFormat::kPlain) {
        const auto bad = [&](const WeightView& view, int64_t apart) {
            return is_transposed(view, weights.format, item) && view.row_stride != apart;
        };
        if (bad(weights.up, alternating ? 2 * item : item) || bad(weights.down, item))
            throw std::invalid_argument(
                "FfnRun: a transposed matrix must have its columns one element apart, or two where "
                "gate and up alternate");
        return;
    }
    if (weights.format == WeightFormat::kMxfp4 && (shape.hidden % 32 || shape.inner % 32))
        throw std::invalid_argument("FfnRun: mxfp4 needs sizes in multiples of 32");
    const int64_t up_bytes = code_row_bytes(weights.format, shape.hidden);
    if (!weights.up.scales || !weights.down.scales || (gated && !weights.gate.scales) ||
        weights.up.row_stride != (alternating ? 2 : 1) * up_bytes ||
        weights.down.row_stride != code_row_bytes(weights.format, shape.inner))
        throw std::invalid_argument(
            "FfnRun: a quantised matrix needs scales, and its rows to lie without gaps, or in turn "
            "where gate and up alternate");
}

float weight_at(const FfnInputs& inputs, int64_t i) {
    if (inputs.weights_dtype == Dtype::kF32)
        return static_cast<const float*>(inputs.topk_weights)[i];
    const uint16_t bits = static_cast<const uint16_t*>(inputs.topk_weights)[i];
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    if (inputs.weights_dtype == Dtype::kF16) {
        const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
        std::memcpy(&value, &magnitude, 4);
        value *= 0x1p112f;
        std::memcpy(&wide, &value, 4);
        wide = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : wide) | sign;
    }
    std::memcpy(&value, &wide, 4);
    return value;
}

}  // namespace

FfnRun::FfnRun(const FfnShape& shape, const FfnInputs& inputs, const Kernels& kernels,
               int num_threads)
    : shape_(shape),
      inputs_(inputs),
      kernels_(kernels),
      num_threads_(num_threads),
      num_rows_(inputs.num_tokens * inputs.top_k) {
    if (num_rows_ > INT32_MAX)
        throw std::invalid_argument("FfnRun: expected fewer than 2^31 routes, got " +
                                    std::to_string(num_rows_));
    const auto num_routes = static_cast<int32_t>(num_rows_);
    const auto size = static_cast<size_t>(num_routes);
    std::vector<int32_t> route_of_row(size), row_of_route(size), active(size);
    std::vector<int32_t> offsets(static_cast<size_t>(shape.num_experts) + 1);
    int32_t num_active = 0;
    const RouteMaps maps{route_of_row.data(), row_of_route.data(), offsets.data(), active.data(),
                         &num_active};
    const auto num_experts = static_cast<int32_t>(shape.num_experts);
    if (inputs.ids_are_int64)
        sort_routes(static_cast<const int64_t*>(inputs.topk_ids), num_routes, num_experts, maps);
    else
        sort_routes(static_cast<const int32_t*>(inputs.topk_ids), num_routes, num_experts, maps);
    experts_.assign(active.begin(), active.begin() + num_active);
    offsets_.push_back(0);
    for (const int32_t expert : experts_)
        offsets_.push_back(offsets[static_cast<size_t>(expert) + 1]);
    const int64_t num_ours = offsets_.back();
    row_ids_.assign(route_of_row.begin(), route_of_row.begin() + num_ours);
    for (const int64_t route : row_ids_) {
        tokens_.push_back(route / inputs.top_k);
        row_weights_.push_back(weight_at(inputs, route));
    }
    if (num_ours > 0)
        y_ = Buffer(static_cast<size_t>(num_rows_ * shape.hidden) * item_size(shape.dtype));
}

void FfnRun::compute(const FfnWeights& weights,
                     std::span<const std::pair<int32_t, int32_t>> ready) {
    check_strides(weights, shape_);
    if (weights.format != WeightFormat::kPlain && !kernels_.dequantise)
        throw std::invalid_argument("FfnRun: quantised weights are computed in bfloat16 only");
    std::vector<Group> groups;
    size_t x = 0, h = 0;
    const auto line = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    for (const auto& [index, slot] : ready) {
        const auto i = static_cast<size_t>(index);
        const int64_t first = offsets_[i], rows = offsets_[i + 1] - first;
        if (x + h > kBatchBytes) {
            compute_batch(weights, groups, x, h);
            groups.clear();
            x = h = 0;
        }
        groups.push_back({first, rows, slot, x, h});
        x += line(static_cast<size_t>(kernels_.packed_bytes(rows, shape_.hidden)));
        h += line(static_cast<size_t>(kernels_.packed_bytes(rows, shape_.inner)));
    }
    if (!groups.empty()) compute_batch(weights, groups, x, h);
}

int FfnRun::threads_for(std::span<const Group> groups, int64_t row_bytes) const {
    int64_t cost = 0;
    for (const Group& group : groups)
        cost += (kRowsPerByteTime + group.rows) * shape_.inner * row_bytes / kRowsPerByteTime;
    return cost < kWorthSharing ? 1 : num_threads_;
}

std::vector<FfnRun::Task> FfnRun::cut(std::span<const Group> groups, int64_t size,
                                      int64_t row_bytes, int64_t step) const {
    int64_t total = 0;
    for (const Group& group : groups) total += kRowsPerByteTime + group.rows;
    // rows of a chunk * (8 + rows of x) is about the same for all chunks
    const int64_t share = std::max<int64_t>(1, total * size / (num_threads_ * kChunksPerThread));
    std::vector<Task> tasks;
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t weight = kRowsPerByteTime + groups[g].rows;
        int64_t chunk =
            std::max(share / weight, kMinChunkBytes * kRowsPerByteTime / (row_bytes * weight));
        chunk = std::max(step, (chunk + step - 1) / step * step);
        for (int64_t begin = 0; begin < size; begin += chunk)
            tasks.push_back({static_cast<int32_t>(g), static_cast<int32_t>(begin),
                             static_cast<int32_t>(std::min(size, begin + chunk))});
    }
    return tasks;
}

void FfnRun::compute_batch(const FfnWeights& weights, std::span<const Group> groups, size_t x_bytes,
                           size_t h_bytes) {
    ThreadPool& pool = ThreadPool::shared();
    const Kernels& k = kernels_;
    const int64_t hidden = shape_.hidden, inner = shape_.inner;
    const auto item = static_cast<int64_t>(item_size(shape_.dtype));
    const bool gated = shape_.activation.gated;
    const int threads = threads_for(groups, (gated ? 3 : 2) * hidden * item);
    const Buffer x(x_bytes + 64), h(h_bytes + 64);
    const size_t scratch_bytes = k.scratch_bytes(std::max(hidden, inner));
    // Uninitialised: only conversion of 16-bit weights on other paths than bf16's uses it.
    const auto make_scratch = [&] {
        return scratch_bytes ? std::make_unique_for_overwrite<std::byte[]>(scratch_bytes) : nullptr;
    };

    std::vector<Task> blocks;  // of x to pack; begin and end are rows
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t rows = groups[g].rows, step = rows <= k.few_rows ? rows : k.block_rows;
        for (int64_t begin = 0; begin < rows; begin += step)
            blocks.push_back({static_cast<int32_t>(g), static_cast<int32_t>(begin),
                              static_cast<int32_t>(std::min(rows, begin + step))});
    }
    pool.run(threads, static_cast<int64_t>(blocks.size()), [&](int64_t task) {
        const Task& block = blocks[static_cast<size_t>(task)];
        const Group& group = groups[static_cast<size_t>(block.group)];
        const bool few = group.rows <= k.few_rows;
        const int64_t* tokens = tokens_.data() + group.first + block.begin;
        std::byte* to = x.data() + group.x + k.row_offset(block.begin, few, hidden);
        (few ? k.pack_few : k.pack_block)(inputs_.hidden, tokens, block.end - block.begin, hidden,
                                          to);
    });

    // A panel has the features of whole tiles, and 64 bytes of a transposed matrix at least.
    const WeightFormat format = weights.format;
    const bool up_in_place = !needs_panel(weights.up, format, item);
    const bool down_in_place = !needs_panel(weights.down, format, item);
    const bool alternating = is_alternating(weights, hidden, item);
    const int64_t up_panel = std::max(k.row_step, kPanelRows / (alternating ? 2 : 1));
    const int64_t down_panel = std::max(k.row_step, kPanelRows);

    const std::vector<Task> up_tasks =
        cut(groups, inner, (gated ? 2 : 1) * hidden * item, up_in_place ? k.row_step : up_panel);
    pool.run(threads, static_cast<int64_t>(up_tasks.size()), [&](int64_t task) {
        const Task& part = up_tasks[static_cast<size_t>(task)];
        const Group& group = groups[static_cast<size_t>(part.group)];
        const auto scratch = make_scratch();
        GateUpArgs a{};
        a.x = x.data() + group.x;
        a.rows = group.rows;
        a.hidden = hidden;
        a.inner = inner;
        a.gate = weights.gate.slot(group.slot);
        a.up = weights.up.slot(group.slot);
        a.row_stride = weights.up.row_stride;
        a.in_cache = !up_in_place;
        a.gate_bias = weights.gate_bias.slot(group.slot);
        a.up_bias = weights.up_bias.slot(group.slot);
        a.bias_stride = weights.up_bias.row_stride;
        a.activation = shape_.activation;
        a.begin = part.begin;
        a.end = part.end;
        a.h = h.data() + group.h;
        a.scratch = scratch.get();
        const auto multiply = group.rows <= k.few_rows ? k.gate_up_few : k.gate_up_many;
        if (up_in_place) return multiply(a);
        const Panel panel(k, format, 2 * up_panel, hidden, item);
        a.row_stride = (alternating ? 2 : 1) * panel.stride;
        for (int64_t begin = part.begin; begin < part.end; begin += up_panel) {
            const int64_t end = std::min<int64_t>(part.end, begin + up_panel);
            const bool next = end < part.end;
            if (alternating) {
                a.gate = panel.take(weights.gate, group.slot, 2 * begin, 2 * end, next, 0);
                a.up = a.gate + panel.stride;
            } else {
                a.up = panel.take(weights.up, group.slot, begin, end, next, 0);
                if (gated)
                    a.gate = panel.take(weights.gate, group.slot, begin, end, next, up_panel);
            }
            a.begin = begin;
            a.end = end;
            multiply(a);
        }
    });

    const std::vector<Task> down_tasks =
        cut(groups, hidden, inner * item, down_in_place ? k.row_step : down_panel);
    pool.run(threads, static_cast<int64_t>(down_tasks.size()), [&](int64_t task) {
        const Task& part = down_tasks[static_cast<size_t>(task)];
        const Group& group = groups[static_cast<size_t>(part.group)];
        const auto scratch = make_scratch();
        DownArgs a{};
        a.h = h.data() + group.h;
        a.rows = group.rows;
        a.hidden = hidden;
        a.inner = inner;
        a.down = weights.down.slot(group.slot);
        a.row_stride = weights.down.row_stride;
        a.in_cache = !down_in_place;
        a.bias = weights.down_bias.slot(group.slot);
        a.bias_stride = weights.down_bias.row_stride;
        a.begin = part.begin;
        a.end = part.end;
        a.row_weights = row_weights_.data() + group.first;
        a.row_ids = row_ids_.data() + group.first;
        a.y = y_.data();
        a.scratch = scratch.get();
        const auto multiply = group.rows <= k.few_rows ? k.down_few : k.down_many;
        if (down_in_place) return multiply(a);
        const Panel panel(k, format, down_panel, inner, item);
        a.row_stride = panel.stride;
        for (int64_t begin = part.begin; begin < part.end; begin += down_panel) {
            const int64_t end = std::min<int64_t>(part.end, begin + down_panel);
            a.down = panel.take(weights.down, group.slot, begin, end, end < part.end, 0);
            a.begin = begin;
            a.end = end;
            multiply(a);
        }
    });
}

void FfnRun::finish(void* out) {
    const int64_t top_k = inputs_.top_k, hidden = shape_.hidden;
    const auto item = static_cast<int64_t>(item_size(shape_.dtype));
    const auto use = std::make_unique<bool[]>(static_cast<size_t>(std::max<int64_t>(1, num_rows_)));
    for (const int64_t row : row_ids_) use[static_cast<size_t>(row)] = true;
    const auto combine = [&](int64_t token) {
        const int64_t row = token * top_k;
        std::byte* to = static_cast<std::byte*>(out) + token * hidden * item;
        kernels_.combine(y_.data() + row * hidden * item, hidden, use.get() + row, top_k, hidden,
                         to);
    };
    const int threads = num_rows_ * hidden * item < kWorthSharing ? 1 : num_threads_;
    constexpr int64_t kTokens = 16;
    const int64_t num_tasks = (inputs_.num_tokens + kTokens - 1) / kTokens;
    ThreadPool::shared().run(threads, num_tasks, [&](int64_t task) {
        const int64_t end = std::min(inputs_.num_tokens, (task + 1) * kTokens);
        for (int64_t token = task * kTokens; token < end; ++token) combine(token);
    });
}

}  // namespace moe_offload
