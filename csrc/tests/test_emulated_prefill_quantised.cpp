// The sm_80 prefill kernels on quantised pages, run on the CPU (csrc/simt): the same bits as on
// pages dequantised to T, which are checked against loops in double.
#include "check.h"
#include "emulated_layer.h"

namespace {

using namespace emulated_layer;

template <class T, class Format>
void check_shape(Shape shape, uint64_t seed, int log2_group = 5) {
    shape.format = Format::kFormat;
    shape.log2_group = log2_group;
    Case<T> c(shape, seed);
    run_prefill<T, Format, 64, 4>(c, 2);
    const auto first = c.out;
    Case<T> plain = c.dequantised();
    run_prefill<T, PlainWeights<T>, 64, 4>(plain, 3);
    CHECK(plain.same_bits(first));
    plain.compute_reference();
    plain.check(shape.name, 1);
    // Taller tiles, another depth, more blocks, another order: the same bits.
    run_prefill<T, Format, 128, 3>(c, 5, 3);
    CHECK(c.same_bits(first));
}

template <class T, class Format>
void equals_dequantised_pages(int k_unit, int gated_unit) {
    check_shape<T, Format>({"gated, K inside a stage", 70, 1, 2, 5 * k_unit, gated_unit}, 17);
    check_shape<T, Format>({"shorter than the stages", 3, 2, 2, k_unit, gated_unit}, 18);
    check_shape<T, Format>({"ungated, biased", 20, 1, 2, 4 * k_unit, 3 * k_unit, false, false, true,
                            Activation::relu2},
                           19);
    check_shape<T, Format>({"gpt-oss: interleaved, biased, clamped", 30, 2, 3, 3 * k_unit,
                            gated_unit, true, true, true, Activation::clamped_swiglu},
                           20);
}

template <class T>
void fp8_equals_dequantised_pages() {
    equals_dequantised_pages<T, Fp8BlockWeights<T>>(16, 128);
    check_shape<T, Fp8BlockWeights<T>>({"several blocks", 9, 1, 2, 272, 256}, 21);
}

void mxfp4_equals_dequantised_pages() { equals_dequantised_pages<bf16, Mxfp4Weights>(32, 96); }

template <class T>
void int4_equals_dequantised_pages() {
    equals_dequantised_pages<T, Int4GroupWeights<T>>(32, 64);
    check_shape<T, Int4GroupWeights<T>>({"groups of 128", 9, 1, 2, 256, 128}, 21, 7);
}

}  // namespace

int main() {
    RUN(fp8_equals_dequantised_pages<bf16>);
    RUN(fp8_equals_dequantised_pages<f16>);
    RUN(mxfp4_equals_dequantised_pages);
    RUN(int4_equals_dequantised_pages<bf16>);
    RUN(int4_equals_dequantised_pages<f16>);
}
