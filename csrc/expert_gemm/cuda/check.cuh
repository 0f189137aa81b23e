// CUDA calls with their error code looked at, once, in one form.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "expert_gemm/cuda/launch.h"

namespace moe_offload::cuda {

inline void check(cudaError_t error, const char* what, const ExpertParams& p) {
    if (error == cudaSuccess) return;
    throw CudaError(std::string("moe_offload._cuda: ") + what +
                    " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error) +
                    " (T " + std::to_string(p.num_tokens) + ", A " + std::to_string(p.top_k) +
                    ", H " + std::to_string(p.hidden) + ", F " + std::to_string(p.inner_size) +
                    ", groups " + std::to_string(p.max_groups) + ")");
}

// Blocks that need more than the default 48 KiB must say so before their first launch.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes, const char* what, const ExpertParams& p) {
    if (bytes <= 48 * 1024) return;
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
          what, p);
}

template <class Kernel>
void start(Kernel kernel, dim3 grid, int threads, size_t shared, bool dependent, Stream stream,
           const char* what, const ExpertParams& p) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, p), what, p);
}

}  // namespace moe_offload::cuda
