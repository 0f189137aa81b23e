// RMSNorm on every instruction set of this machine: against double, from memory that ends where the
// rows end (the sanitizers' part), over any threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/rms_norm.h"

using namespace moe_offload;

namespace {

constexpr float kEpsilon = 1e-5f;

std::vector<std::byte> run(const Kernels& kernels, Dtype dtype, const std::vector<std::byte>& x,
                           const std::vector<std::byte>& weight, int threads) {
    std::vector<std::byte> y(x.size(), std::byte{0xff});  // NaN
    const auto size = static_cast<int64_t>(weight.size() / item_size(dtype));
    const auto rows = static_cast<int64_t>(x.size() / weight.size());
    rms_norm({x.data(), weight.data(), y.data(), size, 0, rows, kEpsilon, 1.0f, false}, dtype,
             kernels, threads);
    return y;
}

void every_instruction_set_normalises() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
            const Kernels* kernels = kernels_for(isa, dtype);
            if (!kernels) continue;
            for (const auto& [rows, size] :
                 {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {2, 64}, {5, 131}, {300, 1100}}) {
                const auto item = item_size(dtype);
                const auto x = draw(dtype, rows * size, 2.0f, static_cast<uint32_t>(size));
                const auto weight = draw(dtype, size, 2.0f, static_cast<uint32_t>(size + 1));
                const auto y = run(*kernels, dtype, x, weight, 2);
                CHECK(y == run(*kernels, dtype, x, weight, 1));
                const double ulp = dtype == Dtype::kF32    ? 0x1p-21
                                   : dtype == Dtype::kBF16 ? 0x1.01p-8
                                                           : 0x1.01p-11;
                for (int64_t row = 0; row < rows; ++row) {
                    const auto at = [&](const std::vector<std::byte>& v, int64_t i) {
                        return static_cast<double>(
                            widen(dtype, v.data() + static_cast<size_t>(i) * item));
                    };
                    double sum = 0.0;
                    for (int64_t i = 0; i < size; ++i) sum += std::pow(at(x, row * size + i), 2);
                    const double scale =
                        1.0 / std::sqrt(sum / static_cast<double>(size) + kEpsilon);
                    for (int64_t i = 0; i < size; ++i) {
                        const double wanted = at(x, row * size + i) * scale * (at(weight, i) + 1.0);
                        // half precision has denormals below 2^-14
                        CHECK(std::abs(at(y, row * size + i) - wanted) <=
                              ulp * std::max(std::abs(wanted), 0x1p-14));
                    }
                }
            }
        }
}

}  // namespace

int main() { RUN(every_instruction_set_normalises); }
