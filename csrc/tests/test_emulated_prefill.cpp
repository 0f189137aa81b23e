// The sm_80 prefill kernels and the combine, run on the CPU (csrc/simt), against loops in double.
#include "check.h"
#include "emulated_layer.h"

namespace {

using namespace emulated_layer;

int skewed(int route, uint64_t random) { return route % 3 ? 2 : int(random % 4); }

const Shape kShapes[] = {
    {"one token", 1, 2, 3, 32, 16},
    {"two row tiles, off every tile", 150, 1, 2, 72, 88},
    {"skewed", 40, 2, 4, 64, 72, true, false, false, Activation::gelu_tanh, skewed},
    {"routes that are not ours", 20, 3, 4, 40, 16, true, false, false, Activation::silu,
     none_or_any},
    {"gpt-oss: interleaved, biased, clamped", 30, 2, 3, 64, 32, true, true, true,
     Activation::clamped_swiglu},
    {"ungated, biased", 20, 1, 2, 136, 152, false, false, true, Activation::relu2},
};

template <class T>
void matches_double_on_every_shape() {
    for (const Shape& shape : kShapes) {
        Case<T> c(shape, 17);
        run_prefill<T, PlainWeights<T>, 64, 4>(c, 2);
        const auto first = c.out;
        c.compute_reference();
        c.check("64 rows", 1);
        // Taller tiles, another depth, more blocks, another order: the same bits, because each
        // element's sum over k is the same sequence.
        run_prefill<T, PlainWeights<T>, 128, 3>(c, 5, 3);
        CHECK(c.same_bits(first));
    }
}

void no_routes_give_zeros() {
    Case<bf16> c({"nowhere", 9, 2, 4, 64, 16, true, false, false, Activation::silu, nowhere}, 1);
    run_prefill<bf16, PlainWeights<bf16>, 64, 3>(c, 2);
    for (bf16 value : c.out) CHECK_EQ(value.bits, 0);
}

void late_arrivals_change_nothing() {
    Case<bf16> c({"late", 70, 2, 4, 64, 40}, 3);
    run_prefill<bf16, PlainWeights<bf16>, 64, 3>(c, 3);
    const auto together = c.out;
    for (int split = 0; split < 16; split += 3) {
        c.poison();
        ExpertParams p = c.params;
        p.partial = c.partial16.data();
        // Whoever is absent is skipped by the first launch, and the second has the others' pages
        // taken away: a group is computed exactly where its page is.
        auto slot_of = c.slot_of;
        p.pages.slot_of = slot_of.data();
        for (int pass = 0; pass < 2; ++pass) {
            for (int e = 0; e < 4; ++e) slot_of[e] = (split >> e & 1) == pass ? c.slot_of[e] : -1;
            run_prefill_gemms<bf16, PlainWeights<bf16>, 64, 3>(p, 3, split);
        }
        run_combine<bf16>(p);
        CHECK(c.same_bits(together));
    }
}

void random_shapes() {
    std::mt19937_64 random(2027);
    for (int i = 0; i < 6; ++i) {
        Case<f16> c(random_shape(random, {90, 2, 4, 12, 18}), random());
        run_prefill<f16, PlainWeights<f16>, 64, 3>(c, 1 + int(random() % 4), random());
        c.compute_reference();
        c.check("random", 1);
    }
}

}  // namespace

int main() {
    RUN(matches_double_on_every_shape<bf16>);
    RUN(matches_double_on_every_shape<f16>);
    RUN(no_routes_give_zeros);
    RUN(late_arrivals_change_nothing);
    RUN(random_shapes);
}
