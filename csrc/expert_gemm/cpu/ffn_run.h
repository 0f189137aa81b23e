// One call of one layer's routed FFN: which experts have rows, then their products in any portions,
// then the combine.
//
//     FfnRun run(shape, inputs, kernels, num_threads);    sorts rows by expert
//     run.compute(weights, {{index in run.experts(), slot}, ...});   as pages arrive
//     run.finish(out);                                    sums in the order of the router's choices
//
// An expert's rows are always computed together, each element in an order of its own (kernels.h),
// and rows meet only in finish(): so the output does not depend on portions, slots, arrival or the
// number of threads, bit for bit. Inputs must stay valid until finish() returns. One thread at a
// time uses a run.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/params.h"

namespace moe_offload {

class FfnRun {
  public:
    FfnRun(const FfnShape& shape, const FfnInputs& inputs, const Kernels& kernels, int num_threads);

    // Distinct experts with rows, ascending; ids outside [0, E) are left out.
    const std::vector<int32_t>& experts() const { return experts_; }

    void compute(const FfnWeights& weights, std::span<const std::pair<int32_t, int32_t>> ready);
    void finish(void* out);  // [T, H] in shape.dtype

  private:
    struct Group {  // an expert whose rows are computed now
        int64_t first, rows;
        int64_t slot;
        size_t x, h;  // where its packed rows begin, bytes
    };
    struct Task {
        int32_t group;
        int32_t begin, end;
    };

    void compute_batch(const FfnWeights& weights, std::span<const Group> groups, size_t x_bytes,
                       size_t h_bytes);
    // Cuts `size` weight rows of every group into tasks of about equal time, at multiples of
    // `step`.
    std::vector<Task> cut(std::span<const Group> groups, int64_t size, int64_t row_bytes,
                          int64_t step) const;
    int threads_for(std::span<const Group> groups, int64_t row_bytes) const;

    FfnShape shape_;
    FfnInputs inputs_;
    const Kernels& kernels_;
    int num_threads_;
    int64_t num_rows_ = 0;  // R = T * A

    std::vector<int32_t> experts_;
    std::vector<int64_t> offsets_;  // [experts + 1] into the next three
    std::vector<int64_t> row_ids_;  // t * A + a, by expert, ascending within it
    std::vector<int64_t> tokens_;   // t
    std::vector<float> row_weights_;
    Buffer y_;  // [R, H] weighted rows, at t * A + a
};

}  // namespace moe_offload
