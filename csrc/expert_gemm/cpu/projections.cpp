#include "expert_gemm/cpu/projections.h"

#include <array>

#include "expert_gemm/cpu/rms_norm.h"
#include "expert_gemm/cpu/rope.h"

namespace moe_offload {

void project(const ProjectionArgs& args, Dtype dtype, const Kernels& kernels, int num_threads) {
    const std::array<LinearOutput, 3> outputs{args.query, args.key, args.value};
    linear(args.input, outputs, dtype, kernels, num_threads);
    const auto finish = [&](const LinearOutput& output, const std::optional<ProjectionNorm>& norm) {
        if (norm)
            rms_norm({output.y, norm->weight, output.y, norm->size, 0,
                      args.input.rows * output.out / norm->size, norm->epsilon, norm->weight_offset,
                      norm->rounds_before_weight},
                     dtype, kernels, 1);
        rotate({static_cast<std::byte*>(output.y), args.input.rows, output.out / args.size,
                args.size, args.cos, args.sin, args.angle_stride, args.rotated},
               dtype);
    };
    finish(args.query, args.query_norm);
    finish(args.key, args.key_norm);
}

}  // namespace moe_offload
