// Dense layers by the CPU kernels, on every instruction set of this machine: against a sum in
// double, from memory that ends where the matrices end (the sanitizers' part), over any threads.
#include <cmath>
#include <vector>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/linear.h"

using namespace moe_offload;

namespace {

struct Matrix {
    std::vector<std::byte> bytes;
    std::vector<float> values;

    Matrix(Dtype dtype, int64_t count, uint32_t seed) : bytes(draw(dtype, count, 2.0f, seed)) {
        for (size_t i = 0; i < bytes.size(); i += item_size(dtype))
            values.push_back(widen(dtype, bytes.data() + i));
    }
};

std::vector<std::byte> run(const Kernels& kernels, Dtype dtype, int64_t rows, int64_t in,
                           int64_t out, const Matrix& x, const Matrix& w, const Matrix* bias,
                           int threads) {
    const auto item = static_cast<int64_t>(item_size(dtype));
    std::vector<std::byte> y(static_cast<size_t>(rows * out * item), std::byte{0xff});  // NaN
    const LinearOutput output{out, w.bytes.data(), in * item, bias ? bias->bytes.data() : nullptr,
                              y.data()};
    linear({x.bytes.data(), rows, in}, {&output, 1}, dtype, kernels, threads);
    return y;
}

void every_instruction_set_multiplies() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx,
                              Isa::kAmxEmulated}) {
            const Kernels* kernels = kernels_for(isa, dtype);
            if (!kernels) continue;
            // one row, few, many; blocks, parts of 480 rows and of 256 k that do not come out even
            for (const int64_t rows : {1, 2, 7, 8, 9, 49, 500})
                for (const auto& [in, out] :
                     {std::pair<int64_t, int64_t>{37, 51}, {64, 200}, {517, 29}}) {
                    if (rows > 100 && in != 37) continue;
                    const auto seed = static_cast<uint32_t>(rows * 1000 + in);
                    const Matrix x(dtype, rows * in, seed), w(dtype, out * in, seed + 1);
                    const Matrix bias(dtype, out, seed + 2);
                    for (const bool with_bias : {false, true}) {
                        const Matrix* b = with_bias ? &bias : nullptr;
                        const auto y = run(*kernels, dtype, rows, in, out, x, w, b, 2);
                        CHECK(y == run(*kernels, dtype, rows, in, out, x, w, b, 1));
                        // multiples of 1/64 up to 2: sums of such products are exact in fp32, and
                        // only the last rounding differs
                        const double ulp = dtype == Dtype::kF32    ? 0.0
                                           : dtype == Dtype::kBF16 ? 0x1p-8
                                                                   : 0x1p-11;
                        for (int64_t m = 0; m < rows; ++m)
                            for (int64_t n = 0; n < out; ++n) {
                                double sum = with_bias ? bias.values[static_cast<size_t>(n)] : 0.0;
                                for (int64_t k = 0; k < in; ++k)
                                    sum += static_cast<double>(
                                               x.values[static_cast<size_t>(m * in + k)]) *
                                           static_cast<double>(
                                               w.values[static_cast<size_t>(n * in + k)]);
                                const double got =
                                    widen(dtype, y.data() + static_cast<size_t>(m * out + n) *
                                                                item_size(dtype));
                                CHECK(std::abs(got - sum) <= ulp * std::abs(sum));
                            }
                    }
                }
        }
}

void few_rows_do_not_depend_on_their_neighbours() {
    const Kernels& kernels = *best_kernels(Dtype::kBF16);
    constexpr int64_t kIn = 300, kOut = 70;
    const Matrix x(Dtype::kBF16, 8 * kIn, 1), w(Dtype::kBF16, kOut * kIn, 2);
    const auto all = run(kernels, Dtype::kBF16, 8, kIn, kOut, x, w, nullptr, 1);
    const auto first = run(kernels, Dtype::kBF16, 1, kIn, kOut, x, w, nullptr, 1);
    CHECK(std::equal(first.begin(), first.end(), all.begin()));
}

void no_rows_are_no_work() {
    const Kernels& kernels = *best_kernels(Dtype::kF32);
    const Matrix x(Dtype::kF32, 0, 1), w(Dtype::kF32, 12, 2);
    CHECK(run(kernels, Dtype::kF32, 0, 3, 4, x, w, nullptr, 2).empty());
}

}  // namespace

int main() {
    RUN(every_instruction_set_multiplies);
    RUN(few_rows_do_not_depend_on_their_neighbours);
    RUN(no_rows_are_no_work);
}
