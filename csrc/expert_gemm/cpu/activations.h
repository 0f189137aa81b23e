// Activations on vectors of floats, the same code for every instruction set (see lanes.h).
#pragma once

#include <cmath>

#include "expert_gemm/cpu/lanes.h"
#include "expert_gemm/params.h"

namespace moe_offload {
namespace {

// e^x to about 1.5 ulp for x in [-87, 88], clamped outside. Cody-Waite reduction to
// |r| <= ln(2) / 2, then the Taylor polynomial of degree 7 (its remainder there is 5e-9).
template <typename L>
inline typename L::V exp_lanes(typename L::V x) {
    using V = typename L::V;
    using I = typename L::I;
    x = L::select((I)(x < L::set(-87.0f)), L::set(-87.0f), x);
    x = L::select((I)(x > L::set(88.0f)), L::set(88.0f), x);
    const V magic = L::set(0x1.8p23f);  // adding it rounds to an integer in the low bits
    const V shifted = L::fma(x, L::set(1.44269504088896341f), magic);
    const V n = shifted - magic;
    V r = L::fma(n, L::set(-0.693145751953125f), x);
    r = L::fma(n, L::set(-1.42860682030941723212e-6f), r);
    V p = L::set(1.0f / 5040);
    p = L::fma(p, r, L::set(1.0f / 720));
    p = L::fma(p, r, L::set(1.0f / 120));
    p = L::fma(p, r, L::set(1.0f / 24));
    p = L::fma(p, r, L::set(1.0f / 6));
    p = L::fma(p, r, L::set(0.5f));
    p = L::fma(p, r, L::set(1.0f));
    p = L::fma(p, r, L::set(1.0f));
    return (V)((I)p + (((I)shifted - (I)magic) << 23));  // * 2^n
}

template <typename L>
inline typename L::V sigmoid_times(typename L::V scale, typename L::V x) {
    return scale / (L::set(1.0f) + exp_lanes<L>(L::set(0.0f) - x));
}

template <typename L>
inline typename L::V activate(const ActivationSpec& spec, typename L::V gate, typename L::V up) {
    using V = typename L::V;
    using I = typename L::I;
    const V x = spec.gated ? gate : up;
    const V zero = L::set(0.0f);
    V a = x;
    switch (spec.kind) {
        case Activation::kSilu:
            a = sigmoid_times<L>(x, x);
            break;
        case Activation::kGelu: {  // rare: exactness before speed
            float lanes[L::kWidth];
            L::store(lanes, x);
            for (float& v : lanes) v = 0.5f * v * (1.0f + ::erff(v * 0.70710678118654752f));
            a = L::load(lanes);
            break;
        }
        case Activation::kGeluTanh: {  // x * sigmoid(2 u) = x * (1 + tanh(u)) / 2
            const V cubic = L::fma(x * x, x * L::set(0.044715f), x);
            a = sigmoid_times<L>(x, cubic * L::set(1.5957691216057308f));
            break;
        }
        case Activation::kRelu:
            a = L::select((I)(x < zero), zero, x);
            break;
        case Activation::kRelu2:
            a = L::select((I)(x < zero), zero, x);
            a = a * a;
            break;
        case Activation::kClampedSwiglu: {
            const V high = L::set(spec.limit), low = L::set(-spec.limit);
            const V g = L::select((I)(gate > high), high, gate);
            V u = L::select((I)(up > high), high, up);
            u = L::select((I)(u < low), low, u);
            return (u + L::set(spec.offset)) * sigmoid_times<L>(g, g * L::set(spec.alpha));
        }
    }
    return spec.gated ? a * up : a;
}

}  // namespace
}  // namespace moe_offload
