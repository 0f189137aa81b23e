#include "expert_gemm/cpu/linear.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"

namespace moe_offload {

void linear(const LinearArgs& args, Dtype dtype, const Kernels& k, int num_threads) {
    if (args.rows < 1) return;
    const bool few = args.rows <= k.few_rows;
    const auto item = static_cast<int64_t>(item_size(dtype));
    const int64_t step = few ? args.rows : k.block_rows;  // rows packed together
    const int64_t part = few ? args.rows : kPartRows / k.block_rows * k.block_rows;
    const int64_t parts = (args.rows + part - 1) / part;
    const int64_t row_bytes = args.in * item;
    const int threads = args.out * row_bytes < kWorthSharing ? 1 : num_threads;

    std::vector<int64_t> row_ids(static_cast<size_t>(args.rows));
    std::iota(row_ids.begin(), row_ids.end(), 0);
    const std::vector<float> ones(static_cast<size_t>(args.rows), 1.0f);
    const Buffer packed(static_cast<size_t>(k.packed_bytes(args.rows, few, args.in)));
    ThreadPool& pool = ThreadPool::shared();
    pool.run(few ? 1 : threads, (args.rows + step - 1) / step, [&](int64_t block) {
        const int64_t first = block * step, count = std::min(step, args.rows - first);
        (few ? k.pack_few : k.pack_block)(args.x, row_ids.data() + first, count, args.in,
                                          packed.data() + k.row_offset(first, few, args.in));
    });

    const int64_t chunk = whole_steps(
        std::max(args.out / (threads * kChunksPerThread), kMinChunkBytes / row_bytes), k.row_step);
    const int64_t chunks = (args.out + chunk - 1) / chunk;
    pool.run(threads, parts * chunks, [&](int64_t task) {
        const int64_t first = task / chunks * part;
        const auto scratch = make_scratch(k, args.in);
        DownArgs a{};
        a.rows = std::min(part, args.rows - first);
        a.hidden = args.out;
        a.inner = args.in;
        a.row_stride = args.row_stride;
        a.bias_stride = item;
        a.begin = task % chunks * chunk;
        a.end = std::min(args.out, a.begin + chunk);
        a.scratch = scratch.get();
        a.h = packed.data() + k.row_offset(first, few, args.in);
        a.down = args.weight;
        a.bias = args.bias;
        a.row_weights = ones.data();
        a.row_ids = row_ids.data() + first;
        a.y = static_cast<std::byte*>(args.y);
        (few ? k.down_few : k.down_many)(a);
    });
}

}  // namespace moe_offload
