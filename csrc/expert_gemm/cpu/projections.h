// Queries, keys and values of decoded tokens in one call: three linear layers of one input, norms
// of their results where a model has them, and rotary position embeddings.
//
// Each step's bits are those of the same step by itself (linear.h, rms_norm.h, rope.h).
#pragma once

#include <optional>

#include "expert_gemm/cpu/linear.h"

namespace moe_offload {

struct ProjectionNorm {
    const std::byte* weight;  // [size]
    int64_t size;             // of what is normed together: a head, or all of a row
    float epsilon, weight_offset;
    bool rounds_before_weight;
};

struct ProjectionArgs {
    LinearInput input;
    LinearOutput query, key, value;  // `out` is heads times `size`
    int64_t size;                    // of a head of queries and keys
    std::optional<ProjectionNorm> query_norm, key_norm;
    const std::byte* cos;  // as in RopeArgs
    const std::byte* sin;
    int64_t angle_stride;
    int64_t rotated;
};

void project(const ProjectionArgs& args, Dtype dtype, const Kernels& kernels, int num_threads);

}  // namespace moe_offload
