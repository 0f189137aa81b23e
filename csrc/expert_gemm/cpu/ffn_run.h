// One call of one layer's routed FFN: which experts have rows, then their products in any portions,
// then the combine.
//
//     FfnRun run(shape, inputs, kernels, num_threads);    sorts rows by expert
//     run.compute(weights, {{index in run.experts(), slot}, ...});   as pages arrive
//     run.finish(out);                                    sums in the order of the router's choices
//
// compute() takes the experts in stages, and these through three phases (pack x, gate and up, down)
// that overlap: one list of tasks, no barrier, and scratch for a few stages however many rows there
// are.
//
// Whether an expert's rows are few is decided by all of them, each element has an order of its own
// (kernels.h), and rows meet only in finish(): so the output does not depend on portions, slots,
// arrival or the number of threads, bit for bit. With `rows_apart` an expert's rows are always
// taken as few, a handful at a time: a row's bits then do not depend on how many others chose its
// expert either, and weights are read once for each handful. Inputs must stay valid until finish()
// returns. One thread at a time uses a run.
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
    FfnRun(const FfnShape& shape, const FfnInputs& inputs, const Kernels& kernels, int num_threads,
           bool rows_apart = false);

    // Distinct experts with rows, ascending; ids outside [0, E) are left out.
    const std::vector<int32_t>& experts() const { return experts_; }

    void compute(const FfnWeights& weights, std::span<const std::pair<int32_t, int32_t>> ready);
    void finish(void* out);  // [T, H] in shape.dtype

  private:
    struct Group {  // an expert's rows, or a part of them
        int64_t first, rows;
        int64_t slot;
        bool few;     // taken as few rows
        size_t x, h;  // where its packed rows begin, bytes
    };
    struct Stage {  // groups that go from phase to phase together
        std::vector<Group> groups;
        size_t nbytes = 0;  // of packed x and h
    };
    enum Phase : int32_t { kPack, kGateUp, kDown };
    struct Task {
        int32_t group;
        int32_t begin, end;  // rows of x to pack, else weight rows
        int32_t stage = 0;
        Phase phase = kPack;
    };
    struct Reading {  // how the weights of a call are read
        Reading(const Kernels& kernels, const FfnShape& shape, const FfnWeights& weights);
        bool up_in_place, down_in_place;  // by any product
        bool alternating;
        int64_t up_step, down_step;  // chunks of weight rows begin at multiples of them
    };

    std::vector<Stage> divide(std::span<const std::pair<int32_t, int32_t>> ready) const;
    void cut_rows(std::span<const Group> groups, std::vector<Task>& tasks) const;
    // Cuts `size` weight rows of every group into tasks of about equal time; `cost` is that of the
    // whole call.
    void cut(std::span<const Group> groups, int64_t cost, int64_t size, int64_t row_bytes,
             int64_t step, std::vector<Task>& tasks) const;

    // Tasks (ffn_tasks.cpp); x and h of the stage are in `buffer`.
    void pack(const Group& group, int64_t begin, int64_t end, std::byte* buffer) const;
    void set(ProductArgs& a, const Group& group, const WeightView& matrix, const WeightView& bias,
             WeightFormat format, int64_t begin, int64_t end) const;
    Buffer scratch_of(const ProductArgs& a, const Group& group, int64_t k_size,
                      size_t matrices) const;
    void gate_up(const FfnWeights& weights, const Reading& how, const Group& group, int64_t first,
                 int64_t last, std::byte* buffer) const;
    void down(const FfnWeights& weights, const Reading& how, const Group& group, int64_t first,
              int64_t last, std::byte* buffer) const;

    FfnShape shape_;
    FfnInputs inputs_;
    const Kernels& kernels_;
    int num_threads_;
    bool rows_apart_;
    int64_t num_rows_ = 0;  // R = T * A

    std::vector<int32_t> experts_;
    std::vector<int64_t> offsets_;  // [experts + 1] into the next three
    std::vector<int64_t> row_ids_;  // t * A + a, by expert, ascending within it
    std::vector<int64_t> tokens_;   // t
    std::vector<float> row_weights_;
    Buffer y_;  // [R, H] weighted rows, at t * A + a
};

}  // namespace moe_offload
