// The decode kernels on quantised pages, run on the CPU (csrc/simt), against plain loops in double
// over what the formats say the weights are.
#include "check.h"
#include "emulated_layer.h"

namespace {

using namespace emulated_layer;

template <class T, class Format>
void check_shape(Shape shape, uint64_t seed, int log2_group = 5) {
    shape.format = Format::kFormat;
    shape.log2_group = log2_group;
    Case<T> c(shape, seed);
    check_decode<T, Format>(c, c);
}

// H and F in eighths of what a format asks of them at least, so that K ends inside a step.
template <class T, class Format>
void matches_double(int k_unit, int gated_unit) {
    const int h = 5 * k_unit, f = gated_unit;
    check_shape<T, Format>({"gated", 5, 2, 3, h, f}, 7);
    check_shape<T, Format>({"one token, long K", 1, 1, 2, 37 * k_unit, f}, 8);
    check_shape<T, Format>({"nine tokens to one expert", 9, 1, 1, 3 * k_unit, f}, 9);
    check_shape<T, Format>(
        {"ungated, biased", 4, 2, 3, h, 3 * k_unit, false, false, true, Activation::relu2}, 10);
    check_shape<T, Format>({"gpt-oss: interleaved, biased, clamped", 3, 2, 3, h, f, true, true,
                            true, Activation::clamped_swiglu},
                           11);
}

template <class T>
void fp8_matches_double() {
    matches_double<T, Fp8BlockWeights<T>>(16, 128);
    check_shape<T, Fp8BlockWeights<T>>({"several blocks", 2, 1, 2, 272, 256}, 12);
}

template <class T>
void int4_matches_double() {
    matches_double<T, Int4GroupWeights<T>>(32, 64);
    check_shape<T, Int4GroupWeights<T>>({"groups of 128", 2, 1, 2, 384, 128}, 12, 7);
}

void mxfp4_matches_double() { matches_double<bf16, Mxfp4Weights>(32, 64); }

// A wrong scale, code or format must show: the reference sees the page as it was.
template <class Format>
void a_changed_page_shows(size_t offset_in_page, int64_t Pages::* section) {
    Shape shape{"changed", 1, 1, 1, 160, 128};
    shape.format = Format::kFormat;
    Case<bf16> c(shape, 3);
    run_decode<bf16, Format, 1>(c.params, 1);
    const auto before = c.out;
    c.slab[c.slot_of[0] * c.params.pages.slot_stride + c.params.pages.*section + offset_in_page] ^=
        1;
    c.poison();
    run_decode<bf16, Format, 1>(c.params, 1);
    CHECK(!c.same_bits(before));
}

void every_section_counts() {
    // The upper byte of the scale's fraction; any bit of the others.
    a_changed_page_shows<Fp8BlockWeights<bf16>>(2, &Pages::up_scale_offset);
    a_changed_page_shows<Fp8BlockWeights<bf16>>(2, &Pages::down_scale_offset);
    a_changed_page_shows<Mxfp4Weights>(0, &Pages::up_scale_offset);
    a_changed_page_shows<Mxfp4Weights>(0, &Pages::down_scale_offset);
    a_changed_page_shows<Int4GroupWeights<bf16>>(1, &Pages::up_scale_offset);
    a_changed_page_shows<Int4GroupWeights<bf16>>(1, &Pages::down_scale_offset);
}

// A NaN in a page reaches every token of its expert, and none of the others.
void a_nan_code_is_not_lost() {
    Shape shape{"NaN", 6, 1, 2, 128, 128};
    shape.format = WeightFormat::fp8_block;
    Case<bf16> c(shape, 5);
    const auto& pages = c.params.pages;
    c.slab[c.slot_of[1] * pages.slot_stride + pages.down_offset + 40 * 128 + 77] = 0x7f;
    run_decode<bf16, Fp8BlockWeights<bf16>, 1>(c.params, 2);
    for (int token = 0; token < 6; ++token)
        for (int n = 0; n < 128; ++n) {
            const float value = simt::to_float(c.out[token * 128 + n]);
            CHECK_EQ(std::isnan(value), c.ids[token] == 1 && n == 40);
        }
}

}  // namespace

int main() {
    RUN(fp8_matches_double<bf16>);
    RUN(fp8_matches_double<f16>);
    RUN(mxfp4_matches_double);
    RUN(int4_matches_double<bf16>);
    RUN(int4_matches_double<f16>);
    RUN(every_section_counts);
    RUN(a_nan_code_is_not_lost);
}
