#include "expert_gemm/cpu/ffn_run.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "expert_gemm/cpu/panel.h"
#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"
#include "expert_gemm/route_sort.h"

namespace moe_offload {
namespace {

// Packed x and h of one stage, unless one group needs more: they stay in the caches from one phase
// to the next.
constexpr size_t kStageBytes = size_t{1} << 20;
// Stages whose x and h exist at a time.
constexpr int64_t kStagesHeld = 4;
// Rows whose arithmetic takes as long as reading one weight row: 25 GB/s against 200 GFLOP/s of a
// core (measured on Zen 4) is about 8 bf16 rows. Only balances work between threads.
constexpr int64_t kRowsPerByteTime = 8;
constexpr int64_t kStageChunksPerThread = 4;  // chunks (sharing.h) of each phase of a stage

// For tasks that another thread is at.
void wait_for_zero(const std::atomic<int32_t>& left) {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins)
        if (spins > 100) std::this_thread::yield();
}

void check_groups(const WeightView& matrix, int64_t columns) {
    if (matrix.group < 32 || matrix.group % 32 || columns % matrix.group)
        throw std::invalid_argument(
            "FfnRun: int4_group needs groups in multiples of 32 that divide " +
            std::to_string(columns) + " columns, got " + std::to_string(matrix.group));
}

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
    if (is_int4(weights.format)) {
        check_groups(weights.up, shape.hidden);
        check_groups(weights.down, shape.inner);
        if (gated) check_groups(weights.gate, shape.hidden);
    }
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
               int num_threads, bool rows_apart)
    : shape_(shape),
      inputs_(inputs),
      kernels_(kernels),
      num_threads_(num_threads),
      rows_apart_(rows_apart),
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
    const std::vector<Stage> stages = divide(ready);
    if (stages.empty()) return;
    const auto item = static_cast<int64_t>(item_size(shape_.dtype));
    const int64_t hidden = shape_.hidden, inner = shape_.inner;
    const bool gated = shape_.activation.gated;
    const Reading how(kernels_, shape_, weights);
    const auto count = static_cast<int64_t>(stages.size()), ring = std::min(count, kStagesHeld);
    int64_t cost = 0;  // as in cut()
    size_t nbytes = 0;
    for (const Stage& stage : stages) {
        nbytes = std::max(nbytes, stage.nbytes);
        for (const Group& group : stage.groups) cost += kRowsPerByteTime + group.rows;
    }
    const int64_t work = cost * inner * (gated ? 3 : 2) * hidden * item / kRowsPerByteTime;
    const int threads = work < kWorthSharing ? 1 : num_threads_;
    const Buffer buffer(nbytes * static_cast<size_t>(ring));

    std::vector<Task> tasks;
    // left[3 s + phase]: tasks of that phase of stage s that have not ended
    const auto left = std::make_unique<std::atomic<int32_t>[]>(static_cast<size_t>(3 * count));
    const auto add = [&](int64_t s, Phase phase) {
        const size_t before = tasks.size();
        const auto& groups = stages[static_cast<size_t>(s)].groups;
        if (phase == kPack)
            cut_rows(groups, tasks);
        else if (phase == kGateUp)
            cut(groups, cost, inner, (gated ? 2 : 1) * hidden * item, how.up_step, tasks);
        else
            cut(groups, cost, hidden, inner * item, how.down_step, tasks);
        for (size_t i = before; i < tasks.size(); ++i) {
            tasks[i].stage = static_cast<int32_t>(s);
            tasks[i].phase = phase;
        }
        left[static_cast<size_t>(3 * s + phase)] = static_cast<int32_t>(tasks.size() - before);
    };
    // Tasks are begun in this order, and each waits only for some that come before it: a phase of
    // another stage lies between, so they have nearly always ended.
    //     pack 0 | pack 1, up 0 | pack 2, up 1, down 0 | pack 3, up 2, down 1 | ...
    for (int64_t s = -1; s <= count; ++s) {
        if (s + 1 < count) add(s + 1, kPack);
        if (s >= 0 && s < count) add(s, kGateUp);
        if (s >= 1) add(s - 1, kDown);
    }
    ThreadPool::shared().run(threads, static_cast<int64_t>(tasks.size()), [&](int64_t number) {
        const Task& task = tasks[static_cast<size_t>(number)];
        const int64_t s = task.stage;
        const Group& group = stages[static_cast<size_t>(s)].groups[static_cast<size_t>(task.group)];
        std::byte* at = buffer.data() + static_cast<size_t>(s % ring) * nbytes;
        switch (task.phase) {
            case kPack:
                if (s >= ring) wait_for_zero(left[static_cast<size_t>(3 * (s - ring) + kDown)]);
                pack(group, task.begin, task.end, at);
                break;
            case kGateUp:
                wait_for_zero(left[static_cast<size_t>(3 * s + kPack)]);
                gate_up(weights, how, group, task.begin, task.end, at);
                break;
            case kDown:
                wait_for_zero(left[static_cast<size_t>(3 * s + kGateUp)]);
                down(weights, how, group, task.begin, task.end, at);
                break;
        }
        left[static_cast<size_t>(3 * s + task.phase)].fetch_sub(1, std::memory_order_release);
    });
}

std::vector<FfnRun::Stage> FfnRun::divide(
    std::span<const std::pair<int32_t, int32_t>> ready) const {
    const size_t most_groups = (ready.size() + kStagesHeld - 1) / kStagesHeld;
    const auto line = [](int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); };
    std::vector<Stage> stages;
    for (const auto& [index, slot] : ready) {
        const auto i = static_cast<size_t>(index);
        const int64_t rows = offsets_[i + 1] - offsets_[i], block = kernels_.block_rows;
        const bool few = rows_apart_ || rows <= kernels_.few_rows;
        const int64_t most = few ? kernels_.few_rows : kPartRows, parts = (rows + most - 1) / most;
        const int64_t part_rows = few ? most : whole_steps((rows + parts - 1) / parts, block);
        for (int64_t begin = 0; begin < rows; begin += part_rows) {
            const int64_t count = std::min(part_rows, rows - begin);
            const size_t x = line(kernels_.packed_bytes(count, few, shape_.hidden));
            const size_t h = line(kernels_.packed_bytes(count, few, shape_.inner));
            if (stages.empty() || stages.back().groups.size() >= most_groups ||
                stages.back().nbytes + x + h > kStageBytes)
                stages.emplace_back();
            Stage& stage = stages.back();
            stage.groups.push_back(
                {offsets_[i] + begin, count, slot, few, stage.nbytes, stage.nbytes + x});
            stage.nbytes += x + h;
        }
    }
    return stages;
}

void FfnRun::cut_rows(std::span<const Group> groups, std::vector<Task>& tasks) const {
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t rows = groups[g].rows, step = groups[g].few ? rows : kernels_.block_rows;
        for (int64_t begin = 0; begin < rows; begin += step)
            tasks.push_back({static_cast<int32_t>(g), static_cast<int32_t>(begin),
                             static_cast<int32_t>(std::min(rows, begin + step))});
    }
}

void FfnRun::cut(std::span<const Group> groups, int64_t cost, int64_t size, int64_t row_bytes,
                 int64_t step, std::vector<Task>& tasks) const {
    int64_t here = 0;
    for (const Group& group : groups) here += kRowsPerByteTime + group.rows;
    // rows of a chunk * (8 + rows of x) is about the same for all chunks
    const int64_t share =
        std::max<int64_t>(1, std::min(cost * size / (num_threads_ * kChunksPerThread),
                                      here * size / (num_threads_ * kStageChunksPerThread)));
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t weight = kRowsPerByteTime + groups[g].rows;
        const int64_t chunk = whole_steps(
            std::max(share / weight, kMinChunkBytes * kRowsPerByteTime / (row_bytes * weight)),
            step);
        for (int64_t begin = 0; begin < size; begin += chunk)
            tasks.push_back({static_cast<int32_t>(g), static_cast<int32_t>(begin),
                             static_cast<int32_t>(std::min(size, begin + chunk))});
    }
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
