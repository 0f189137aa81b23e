// Decode and sm_80 prefill on pages stored [k, rows], run on the CPU (csrc/simt). Decode against
// plain loops in double; prefill against itself on the same pages stored [rows, k], bit for bit:
// the operands of its matrix instructions are to be the same.
#include "check.h"
#include "emulated_layer.h"

namespace {

using namespace emulated_layer;

const Shape kShapes[] = {
    {"gpt-oss: interleaved, biased, clamped", 4, 2, 4, 96, 32, true, true, true,
     Activation::clamped_swiglu},
    {"interleaved, K and N off every tile", 5, 2, 3, 72, 40, true, true},
    {"gate rows first, off every tile", 9, 1, 2, 136, 88, true, false, true},
    {"one token, long K", 1, 2, 3, 424, 64, true, true},
    {"routes that are not ours", 7, 3, 4, 64, 16, true, false, false, Activation::gelu,
     none_or_any},
    {"ungated, biased, relu squared", 4, 2, 3, 64, 72, false, false, true, Activation::relu2},
};

template <class T>
void decode_matches_double() {
    for (const Shape& shape : kShapes) {
        Case<T> plain(shape, 7);
        Case<T> c = plain.transposed();
        check_decode<T, TransposedWeights<T>>(c, plain);
    }
}

void decode_without_routes_gives_zeros() {
    Case<bf16> c =
        Case<bf16>({"nowhere", 3, 2, 4, 64, 16, true, true, false, Activation::silu, nowhere}, 1)
            .transposed();
    run_decode<bf16, TransposedWeights<bf16>, 1>(c.params);
    for (bf16 value : c.out) CHECK_EQ(value.bits, 0);
}

void late_arrivals_change_nothing() {
    Case<bf16> c = Case<bf16>({"late", 6, 3, 6, 72, 40, true, true}, 3).transposed();
    check_late_arrivals<TransposedWeights<bf16>>(c, 11);
}

template <class T, int kBlockM>
void prefill_has_the_bits_of_plain_pages() {
    const Shape shapes[] = {
        {"gpt-oss: interleaved, biased, clamped", 30, 2, 3, 64, 32, true, true, true,
         Activation::clamped_swiglu},
        {"interleaved, off every tile", 150, 1, 2, 72, 88, true, true},
        {"gate rows first, off every tile", 70, 1, 2, 104, 88, true, false, true,
         Activation::gelu_tanh},
        {"ungated, biased", 20, 1, 2, 136, 152, false, false, true, Activation::relu2},
    };
    for (const Shape& shape : shapes) {
        Case<T> plain(shape, 17);
        Case<T> c = plain.transposed();
        constexpr int kStages = prefill_stages(kBlockM);
        run_prefill<T, TransposedWeights<T>, kBlockM, kStages>(c, 3, 5);
        run_prefill<T, PlainWeights<T>, kBlockM, kStages>(plain, 2);
        CHECK(c.same_bits(plain.out));
        plain.compute_reference();
        plain.check("plain", 1);
    }
}

void random_shapes() {
    std::mt19937_64 random(2028);
    for (int i = 0; i < 10; ++i) {
        Case<f16> plain(random_shape(random, {20, 3, 6, 20, 12}), random());
        Case<f16> c = plain.transposed();
        run_decode<f16, TransposedWeights<f16>, 2>(c.params, 1 + int(random() % 8), random());
        plain.compute_reference();
        c.want = plain.want;
        c.magnitude = plain.magnitude;
        c.check("random");
    }
}

}  // namespace

int main() {
    RUN(decode_matches_double<bf16>);
    RUN(decode_matches_double<f16>);
    RUN(decode_without_routes_gives_zeros);
    RUN(late_arrivals_change_nothing);
    RUN((prefill_has_the_bits_of_plain_pages<bf16, 64>));
    RUN((prefill_has_the_bits_of_plain_pages<f16, 128>));
    RUN(random_shapes);
}
