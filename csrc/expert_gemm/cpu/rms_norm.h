// y = x / sqrt(mean(x^2) + epsilon) * weight, row by row: RMSNorm (Zhang and Sennrich, 2019).
#pragma once

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

// Rows [args.begin, args.end), shared by threads where they are worth it.
void rms_norm(const NormArgs& args, Dtype dtype, const Kernels& kernels, int num_threads);

}  // namespace moe_offload
