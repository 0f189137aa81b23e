#include "expert_gemm/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"

namespace moe_offload {
namespace {

constexpr int64_t kChunkStep = 64;  // whole blocks (attend.h), but for the last

// Positions of a chunk: as even as possible, so that neither a lone head's chunks nor the last ones
// of many leave a thread without work.
int64_t chunk_positions(int64_t positions) {
    const int64_t chunks = (positions + kAttendChunk - 1) / kAttendChunk;
    const int64_t even = (positions + chunks - 1) / chunks;
    return whole_steps(even, kChunkStep);
}

}  // namespace

void attention(const AttentionArgs& args, Dtype dtype, const Kernels& k, int num_threads) {
    if (args.batch < 1 || args.query_heads < 1) return;
    const auto item = static_cast<int64_t>(item_size(dtype));
    const int64_t groups = args.batch * args.key_heads, heads = args.query_heads / args.key_heads;
    const int64_t chunk = chunk_positions(args.positions);
    const int64_t chunks = (args.positions + chunk - 1) / chunk;
    const int64_t bytes = groups * args.positions * (args.size + args.value_size) * item;
    const int threads = bytes < kWorthSharing ? 1 : num_threads;

    const int64_t out_stride = (args.value_size + 15) / 16 * 16;
    const int64_t part = heads * out_stride;  // floats of a chunk's result
    const Buffer buffer(static_cast<size_t>(groups * chunks) *
                        (static_cast<size_t>(part) * sizeof(float) +
                         static_cast<size_t>(heads) * sizeof(AttendSoftmax)));
    auto* parts = reinterpret_cast<float*>(buffer.data());
    auto* softmaxes = reinterpret_cast<AttendSoftmax*>(parts + groups * chunks * part);
    std::vector<std::atomic<int64_t>> left(static_cast<size_t>(groups));
    for (auto& count : left) count.store(chunks, std::memory_order_relaxed);

    ThreadPool::shared().run(threads, groups * chunks, [&](int64_t task) {
        const int64_t group = task / chunks, first = task % chunks * chunk;
        const int64_t b = group / args.key_heads, g = group % args.key_heads;
        const auto scratch =
            std::make_unique_for_overwrite<std::byte[]>(k.attend_scratch_bytes(heads, args.size));
        AttendArgs a{};
        a.heads = heads;
        a.size = args.size;
        a.value_size = args.value_size;
        a.q = args.q + group * heads * args.size * item;
        a.positions = std::min(chunk, args.positions - first);
        a.keys = args.keys + b * args.key_batch_stride + g * args.key_head_stride +
                 first * args.key_stride;
        a.key_stride = args.key_stride;
        a.values = args.values + b * args.value_batch_stride + g * args.value_head_stride +
                   first * args.value_stride;
        a.value_stride = args.value_stride;
        a.scale = args.scale;
        a.mask = args.mask;
        if (a.mask.base)
            a.mask.base +=
                b * args.mask_batch_stride + g * heads * a.mask.head_stride + first * a.mask.stride;
        a.scratch = scratch.get();
        a.out = parts + task * part;
        a.out_stride = out_stride;
        a.softmax = softmaxes + task * heads;
        k.attend(a);
        if (left[static_cast<size_t>(group)].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        const int64_t start = group * chunks;
        for (int64_t h = 0; h < heads; ++h)
            k.merge_chunks({chunks, args.value_size, parts + start * part + h * out_stride, part,
                            softmaxes + start * heads + h, heads,
                            args.out + (group * heads + h) * args.value_size * item});
    });
}

}  // namespace moe_offload
