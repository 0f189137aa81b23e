// Bias and the activation between the two projections, in float; rounding happens once, when the
// result is stored. Formulas are torch's: silu, gelu (erf and tanh), relu, relu squared, gpt-oss'
// clamped SwiGLU.
//
// The smooth ones are all x sigmoid(x (c1 + c3 x^2)): silu with c1 = 1; gpt-oss with c1 = alpha;
// tanh gelu because (1 + tanh(u)) / 2 = sigmoid(2u), so c1 = 2 sqrt(2 / pi), c3 = 0.044715 c1. One
// formula without branches keeps an unrolled epilogue of 128 accumulators small: with a switch in
// each, the sm_90a kernel had 400 KB of code.
#pragma once

#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

struct ActivationForm {
    float c1, c3;
    float limit, up_plus;  // gate <= limit, |up| <= limit, then up + up_plus
    Activation kind;

    SIMT_FUNCTION bool smooth() const {
        return kind == Activation::silu || kind == Activation::gelu_tanh ||
               kind == Activation::clamped_swiglu;
    }
};

SIMT_FUNCTION ActivationForm activation_form(const ExpertParams& p) {
    const bool clamped = p.activation == Activation::clamped_swiglu;
    const bool tanh = p.activation == Activation::gelu_tanh;
    return {clamped ? p.alpha
            : tanh  ? 1.5957691f
                    : 1.0f,
            tanh ? 0.071354814f : 0.0f, clamped ? p.limit : 3.4e38f, clamped ? p.offset : 0.0f,
            p.activation};
}

// Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most, far below a 16-bit result's rounding.
SIMT_FUNCTION float erf_of(float x) {
    const float magnitude = x < 0.0f ? -x : x;
    const float t = simt::reciprocal(1.0f + 0.3275911f * magnitude);
    const float series =
        t * (0.254829592f +
             t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float erf = 1.0f - series * simt::fast_exp(-magnitude * magnitude);
    return x < 0.0f ? -erf : erf;
}

template <bool kSmooth>
SIMT_FUNCTION float activate(const ActivationForm& form, float x) {
    if constexpr (kSmooth)
        return x * simt::reciprocal(1.0f + simt::fast_exp(-x * (form.c1 + form.c3 * x * x)));
    if (form.kind == Activation::gelu) return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
    const float positive = x < 0.0f ? 0.0f : x;  // NaN stays
    return form.kind == Activation::relu2 ? positive * positive : positive;
}

template <bool kSmooth>
SIMT_FUNCTION float gate_and_up(const ActivationForm& form, float gate, float up) {
    gate = gate > form.limit ? form.limit : gate;  // so that NaN stays
    up = up > form.limit ? form.limit : up;
    up = up < -form.limit ? -form.limit : up;
    return activate<kSmooth>(form, gate) * (up + form.up_plus);
}

// The same where nothing is unrolled.
SIMT_FUNCTION float activate(const ActivationForm& form, float x) {
    return form.smooth() ? activate<true>(form, x) : activate<false>(form, x);
}
SIMT_FUNCTION float gate_and_up(const ActivationForm& form, float gate, float up) {
    return form.smooth() ? gate_and_up<true>(form, gate, up) : gate_and_up<false>(form, gate, up);
}

// One element of a page's bias section; `offset` -1: there is none.
template <class T>
SIMT_FUNCTION float bias_at(const unsigned char* page, int64_t offset, int row) {
    return offset < 0 ? 0.0f : simt::to_float(reinterpret_cast<const T*>(page + offset)[row]);
}

}  // namespace moe_offload::cuda
