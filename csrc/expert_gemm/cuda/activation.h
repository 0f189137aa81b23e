// Bias and the activation between the two projections, in float; rounding happens once, when its
// result is stored. Formulas are torch's: silu, gelu (erf and tanh), relu, relu squared, gpt-oss'
// clamped SwiGLU.
#pragma once

#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

SIMT_FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + simt::fast_exp(-x)); }

// tanh by one exponential: exact to float rounding away from 0, where x dominates its own error.
SIMT_FUNCTION float tanh_by_exp(float x) { return 1.0f - 2.0f / (1.0f + simt::fast_exp(2.0f * x)); }

SIMT_FUNCTION float activate(Activation kind, float x) {
    switch (kind) {
        case Activation::silu:
            return x * sigmoid(x);
        case Activation::gelu:
            return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanh_by_exp(0.79788456f * (x + 0.044715f * x * x * x)));
        case Activation::relu:
            return x > 0.0f ? x : 0.0f;
        case Activation::relu2:
            return x > 0.0f ? x * x : 0.0f;
        default:
            return x;
    }
}

SIMT_FUNCTION float gate_and_up(const ExpertParams& p, float gate, float up) {
    if (p.activation == Activation::clamped_swiglu) {
        gate = gate < p.limit ? gate : p.limit;
        up = up < -p.limit ? -p.limit : (up > p.limit ? p.limit : up);
        return gate * sigmoid(p.alpha * gate) * (up + 1.0f);
    }
    return activate(p.activation, gate) * up;
}

// One element of a page's bias section; `offset` -1: there is none.
template <class T>
SIMT_FUNCTION float bias_at(const unsigned char* page, int64_t offset, int row) {
    return offset < 0 ? 0.0f : simt::to_float(reinterpret_cast<const T*>(page + offset)[row]);
}

}  // namespace moe_offload::cuda
