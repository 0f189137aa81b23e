#include "expert_gemm/cpu/rms_norm.h"

#include <algorithm>

#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"

namespace moe_offload {

void rms_norm(const NormArgs& args, Dtype dtype, const Kernels& kernels, int num_threads) {
    const int64_t row_bytes =
        std::max<int64_t>(1, args.size) * static_cast<int64_t>(item_size(dtype));
    const int64_t step = std::max<int64_t>(1, kMinChunkBytes / row_bytes);
    const int64_t rows = args.end - args.begin;
    const int threads = rows * row_bytes < kWorthSharing ? 1 : num_threads;
    ThreadPool::shared().run(threads, (rows + step - 1) / step, [&](int64_t task) {
        NormArgs some = args;
        some.begin = args.begin + task * step;
        some.end = std::min(args.end, some.begin + step);
        kernels.norm(some);
    });
}

}  // namespace moe_offload
