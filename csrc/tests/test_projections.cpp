// Queries, keys and values of decoded tokens on every instruction set of this machine: the bits of
// products, norms and rotations one by one, these against double, from memory that ends where
// the arrays end (the sanitizers' part).
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/projections.h"
#include "expert_gemm/cpu/rms_norm.h"
#include "expert_gemm/cpu/rope.h"

using namespace moe_offload;

namespace {

using Bytes = std::vector<std::byte>;

struct Case {
    int64_t rows, in, heads, groups, size, rotated;
    bool norm_heads;
};

Bytes nan_bytes(Dtype dtype, int64_t count) {
    return Bytes(static_cast<size_t>(count) * item_size(dtype), std::byte{0xff});
}

void check_case(const Kernels& kernels, Dtype dtype, const Case& c) {
    const auto item = static_cast<int64_t>(item_size(dtype));
    const Bytes x = draw(dtype, c.rows * c.in, 2.0f, 1);
    const Bytes cos = draw(dtype, c.rows * c.rotated, 1.0f, 2);
    const Bytes sin = draw(dtype, c.rows * c.rotated, 1.0f, 3);
    const int64_t features[] = {c.heads * c.size, c.groups * c.size, c.groups * c.size};
    Bytes weights[3], norms[2], got[3], plain[3];
    for (int i = 0; i < 3; ++i) {
        const auto seed = static_cast<uint32_t>(4 + i);
        weights[i] = draw(dtype, features[i] * c.in, 2.0f, seed);
        got[i] = plain[i] = nan_bytes(dtype, c.rows * features[i]);
        if (i < 2) norms[i] = draw(dtype, c.norm_heads ? c.size : features[i], 2.0f, seed + 9);
    }
    const auto output = [&](int i, Bytes& y) {
        return LinearOutput{features[i], weights[i].data(), c.in * item, nullptr, y.data()};
    };
    const auto norm = [&](int i) {
        return ProjectionNorm{norms[i].data(), c.norm_heads ? c.size : features[i], 1e-5f, 0.5f,
                              true};
    };
    project({{x.data(), c.rows, c.in},
             output(0, got[0]),
             output(1, got[1]),
             output(2, got[2]),
             c.size,
             norm(0),
             norm(1),
             cos.data(),
             sin.data(),
             c.rotated * item,
             c.rotated},
            dtype, kernels, 2);
    for (int i = 0; i < 3; ++i) {
        const LinearOutput one = output(i, plain[i]);
        linear({x.data(), c.rows, c.in}, {&one, 1}, dtype, kernels, 1);
        if (i == 2) continue;
        const ProjectionNorm n = norm(i);
        rms_norm({plain[i].data(), n.weight, plain[i].data(), n.size, 0,
                  c.rows * features[i] / n.size, n.epsilon, n.weight_offset, true},
                 dtype, kernels, 1);
        const Bytes before = plain[i];
        rotate({plain[i].data(), c.rows, features[i] / c.size, c.size, cos.data(), sin.data(),
                c.rotated * item, c.rotated},
               dtype);
        const auto at = [&](const Bytes& from, int64_t element) {
            return double(widen(dtype, from.data() + element * item));
        };
        // two products and their sum are rounded
        const double ulp = dtype == Dtype::kF32    ? 0x1p-24
                           : dtype == Dtype::kBF16 ? 0x1p-8
                                                   : 0x1p-11;
        for (int64_t element = 0; element < c.rows * features[i]; ++element) {
            const int64_t row = element / features[i], d = element % c.size, half = c.rotated / 2;
            if (d >= c.rotated) {
                CHECK(at(plain[i], element) == at(before, element));
                continue;
            }
            const double a = at(before, element) * at(cos, row * c.rotated + d);
            const double other = at(before, d < half ? element + half : element - half);
            const double b = (d < half ? -other : other) * at(sin, row * c.rotated + d);
            const double allowed = ulp * (std::abs(a) + std::abs(b) + std::abs(a + b)) + 0x1p-24;
            CHECK(std::abs(at(plain[i], element) - (a + b)) <= allowed);
        }
    }
    for (int i = 0; i < 3; ++i) CHECK(got[i] == plain[i]);
}

void every_instruction_set_projects() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx,
                              Isa::kAmxEmulated}) {
            const Kernels* kernels = kernels_for(isa, dtype);
            if (!kernels) continue;
            for (const Case& c : {Case{1, 37, 4, 2, 24, 24, true}, Case{3, 64, 6, 3, 40, 20, false},
                                  Case{9, 16, 2, 1, 8, 2, true}, Case{2, 200, 8, 8, 64, 64, false}})
                check_case(*kernels, dtype, c);
        }
}

}  // namespace

int main() { RUN(every_instruction_set_projects); }
