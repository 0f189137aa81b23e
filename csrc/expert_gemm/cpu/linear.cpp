#include "expert_gemm/cpu/linear.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"

namespace moe_offload {

void linear(const LinearInput& input, std::span<const LinearOutput> outputs, Dtype dtype,
            const Kernels& k, int num_threads) {
    const int64_t rows = input.rows, in = input.in;
    if (rows < 1) return;
    const bool few = rows <= k.few_rows;
    const auto item = static_cast<int64_t>(item_size(dtype));
    const int64_t step = few ? rows : k.block_rows;  // rows packed together
    const int64_t part = few ? rows : kPartRows / k.block_rows * k.block_rows;
    const int64_t parts = (rows + part - 1) / part;
    const int64_t row_bytes = in * item;
    int64_t all = 0;
    for (const LinearOutput& output : outputs) all += output.out;
    const int threads = all * row_bytes < kWorthSharing ? 1 : num_threads;

    std::vector<int64_t> row_ids(static_cast<size_t>(rows));
    std::iota(row_ids.begin(), row_ids.end(), 0);
    const std::vector<float> ones(static_cast<size_t>(rows), 1.0f);
    const Buffer packed(static_cast<size_t>(k.packed_bytes(rows, few, in)));
    ThreadPool& pool = ThreadPool::shared();
    pool.run(few ? 1 : threads, (rows + step - 1) / step, [&](int64_t block) {
        const int64_t first = block * step, count = std::min(step, rows - first);
        (few ? k.pack_few : k.pack_block)(input.x, row_ids.data() + first, count, in,
                                          packed.data() + k.row_offset(first, few, in));
    });

    const int64_t chunk = whole_steps(
        std::max(all / (threads * kChunksPerThread), kMinChunkBytes / row_bytes), k.row_step);
    struct Task {
        size_t output;
        int64_t part, begin;
    };
    std::vector<Task> tasks;
    for (size_t i = 0; i < outputs.size(); ++i)
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t begin = 0; begin < outputs[i].out; begin += chunk)
                tasks.push_back({i, p, begin});
    pool.run(threads, static_cast<int64_t>(tasks.size()), [&](int64_t number) {
        const Task& task = tasks[static_cast<size_t>(number)];
        const LinearOutput& output = outputs[task.output];
        const int64_t first = task.part * part;
        const auto scratch = make_scratch(few ? 0 : k.scratch_bytes(in));
        DownArgs a{};
        a.rows = std::min(part, rows - first);
        a.hidden = output.out;
        a.inner = in;
        a.row_stride = output.row_stride;
        a.bias_stride = item;
        a.begin = task.begin;
        a.end = std::min(output.out, task.begin + chunk);
        a.scratch = scratch.data();
        a.h = packed.data() + k.row_offset(first, few, in);
        a.down.base = output.weight;
        a.bias = output.bias;
        a.row_weights = ones.data();
        a.row_ids = row_ids.data() + first;
        a.y = static_cast<std::byte*>(output.y);
        (few ? k.down_few : k.down_many)(a);
    });
}

}  // namespace moe_offload
