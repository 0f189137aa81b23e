// A decoded token's attention by the CPU kernels, on instruction sets of this machine: against
// sums in double, from memory that ends where keys, values and masks end (the sanitizers' part),
// over any threads, and from several calling threads at once.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/attend.h"
#include "expert_gemm/cpu/attention.h"

using namespace moe_offload;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
    Dtype dtype;
    int64_t batch, heads, groups, positions, size, value_size;
    int64_t room = 0;  // positions behind the last one, in a cache that has some
};

struct Inputs {
    Case c;
    std::vector<std::byte> q, keys, values;
    std::vector<uint8_t> mask;  // [batch, positions]

    explicit Inputs(const Case& c) : c(c) {
        const int64_t positions = c.positions + c.room;
        q = draw(c.dtype, c.batch * c.heads * c.size, 2.0f, 1);
        keys = draw(c.dtype, c.batch * c.groups * positions * c.size, 2.0f, 2);
        values = draw(c.dtype, c.batch * c.groups * positions * c.value_size, 2.0f, 3);
        for (int64_t i = 0; i < c.batch * c.positions; ++i) mask.push_back(i % 5 != 1);
    }

    AttentionArgs args(bool masked, std::vector<std::byte>& out) const {
        const auto item = static_cast<int64_t>(item_size(c.dtype));
        AttentionArgs a{};
        a.batch = c.batch, a.query_heads = c.heads, a.key_heads = c.groups;
        a.positions = c.positions, a.size = c.size, a.value_size = c.value_size;
        a.q = q.data(), a.keys = keys.data(), a.values = values.data();
        a.key_stride = c.size * item;
        a.key_head_stride = (c.positions + c.room) * a.key_stride;
        a.key_batch_stride = c.groups * a.key_head_stride;
        a.value_stride = c.value_size * item;
        a.value_head_stride = (c.positions + c.room) * a.value_stride;
        a.value_batch_stride = c.groups * a.value_head_stride;
        if (masked) {
            a.mask.base = reinterpret_cast<const std::byte*>(mask.data());
            a.mask.stride = 1;
            a.mask_batch_stride = c.positions;
        }
        a.scale = 0.125f;
        out.assign(static_cast<size_t>(c.batch * c.heads * c.value_size * item), std::byte{0xff});
        a.out = out.data();
        return a;
    }

    std::vector<std::byte> run(const Kernels& kernels, bool masked, int threads) const {
        std::vector<std::byte> out;
        attention(args(masked, out), c.dtype, kernels, threads);
        return out;
    }

    double at(const std::vector<std::byte>& from, int64_t i) const {
        return widen(c.dtype, from.data() + static_cast<size_t>(i) * item_size(c.dtype));
    }
};

void check_case(const Kernels& kernels, const Inputs& in, bool masked) {
    const Case& c = in.c;
    const auto got = in.run(kernels, masked, 2);
    CHECK(got == in.run(kernels, masked, 1));
    // results are means of values of at most 2: half an ulp of the dtype, and the error of weights
    const double tolerance = (c.dtype == Dtype::kBF16  ? 0x1p-8
                              : c.dtype == Dtype::kF16 ? 0x1p-11
                                                       : 0.0) +
                             0x1p-18;
    std::vector<double> weights(static_cast<size_t>(c.positions));
    for (int64_t row = 0; row < c.batch * c.heads; ++row) {
        const int64_t b = row / c.heads, g = row % c.heads / (c.heads / c.groups);
        const int64_t first = (b * c.groups + g) * (c.positions + c.room);
        double high = -kInfinity, sum = 0.0;
        for (int64_t n = 0; n < c.positions; ++n) {
            double score = 0.0;
            for (int64_t d = 0; d < c.size; ++d)
                score += in.at(in.q, row * c.size + d) * in.at(in.keys, (first + n) * c.size + d);
            if (masked && !in.mask[static_cast<size_t>(b * c.positions + n)]) score = -kInfinity;
            weights[static_cast<size_t>(n)] = 0.125 * score;
            high = std::max(high, 0.125 * score);
        }
        for (double& w : weights) sum += w = std::exp(w - high);
        for (int64_t d = 0; d < c.value_size; ++d) {
            double want = 0.0;
            for (int64_t n = 0; n < c.positions; ++n)
                want += weights[static_cast<size_t>(n)] *
                        in.at(in.values, (first + n) * c.value_size + d);
            CHECK(std::abs(in.at(got, row * c.value_size + d) - want / sum) <= tolerance);
        }
    }
}

void instruction_sets_attend() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx,
                              Isa::kAmxEmulated}) {
            const Kernels* kernels = kernels_for(isa, dtype);
            if (!kernels) continue;
            for (const Case& c :
                 {Case{dtype, 1, 1, 1, 1, 1, 1}, Case{dtype, 2, 6, 2, 37, 19, 21},
                  Case{dtype, 1, 11, 1, 300, 40, 8, 5}, Case{dtype, 1, 4, 4, 600, 32, 64}})
                for (const bool masked : {false, true}) check_case(*kernels, Inputs(c), masked);
        }
}

// The tiles of vectors of sixteen floats, on machines without AVX-512 too.
template <class T>
void wide_vectors_attend(Dtype dtype) {
    using Op = FmaOp<PortableLanes<16>, T>;
    Kernels kernels{};
    kernels.attend = &attend<Op>;
    kernels.attend_scratch_bytes = &attend_scratch_bytes<Op>;
    kernels.merge_chunks = &merge_chunks<Op>;
    for (int64_t heads = 1; heads <= 9; ++heads)
        check_case(kernels, Inputs({dtype, 1, heads, 1, 150, 40, 152}), heads % 2 == 0);
}

void sixteen_lanes_attend() {
    wide_vectors_attend<float>(Dtype::kF32);
    wide_vectors_attend<BF16>(Dtype::kBF16);
    wide_vectors_attend<F16>(Dtype::kF16);
}

void no_sequences_are_no_work() {
    const Inputs in({Dtype::kF32, 0, 2, 1, 4, 8, 8});
    CHECK(in.run(*kernels_for(Isa::kPlain, Dtype::kF32), false, 2).empty());
}

void several_callers_do_not_meet() {
    const Kernels& kernels = *kernels_for(Isa::kPlain, Dtype::kBF16);
    const Inputs in({Dtype::kBF16, 2, 8, 4, 700, 64, 64});
    const auto want = in.run(kernels, true, 1);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
        callers.emplace_back([&] {
            for (int round = 0; round < 20; ++round) CHECK(in.run(kernels, true, 2) == want);
        });
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
    RUN(instruction_sets_attend);
    RUN(sixteen_lanes_attend);
    RUN(no_sequences_are_no_work);
    RUN(several_callers_do_not_meet);
}
