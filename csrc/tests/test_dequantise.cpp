// Unpacking quantised weights: every code under every scale, on every instruction set, against the
// formats' definitions in double; bytes outside the rows stay as they are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "expert_gemm/cpu/kernels.h"
#include "quantised_section.h"

using namespace moe_offload;

namespace {

double value_of(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// The bf16 nearest to an exact value, ties to even.
uint16_t bf16_of(double exact) {
    const auto value = static_cast<float>(exact);  // exact: the tests' products fit fp32
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::vector<const Kernels*> all_kernels() {
    std::vector<const Kernels*> found;
    for (int32_t isa = 0; isa < 6; ++isa)
        if (const Kernels* kernels = kernels_for(static_cast<Isa>(isa), Dtype::kBF16))
            found.push_back(kernels);
    return found;
}

struct Matrix {
    WeightFormat format;
    int64_t rows, k_size;
    std::vector<std::byte> codes, scales;
    int64_t group = 0;

    // Rows [begin, end), with a guard of 0xabcd behind each row and around all.
    std::vector<uint16_t> unpack(const Kernels& kernels, int64_t begin, int64_t end) const {
        const auto stride = static_cast<size_t>(k_size + 5);
        std::vector<uint16_t> out(stride * static_cast<size_t>(end - begin) + 10, 0xabcd);
        kernels.dequantise({format, codes.data(), scales.data(), k_size, begin, end, 0,
                            reinterpret_cast<std::byte*>(out.data() + 5),
                            static_cast<int64_t>(stride) * 2, group});
        return out;
    }
    template <class Want>
    void check(const Kernels& kernels, int64_t begin, int64_t end, const Want& want) const {
        const std::vector<uint16_t> out = unpack(kernels, begin, end);
        const auto stride = static_cast<size_t>(k_size + 5);
        for (size_t i = 0; i < out.size(); ++i) {
            const auto n = static_cast<int64_t>((i - 5) / stride);
            const auto k = static_cast<int64_t>((i - 5) % stride);
            if (i < 5 || k >= k_size || n >= end - begin) {
                CHECK_EQ(out[i], 0xabcd);
                continue;
            }
            const double exact = want(begin + n, k);
            if (std::isnan(exact))
                CHECK(std::isnan(value_of(out[i])));
            else
                CHECK_EQ(out[i], bf16_of(exact));
        }
    }
};

void every_mxfp4_code_under_every_scale() {
    // Row n has scale byte n; each group has all sixteen codes twice, at other places in each row.
    Matrix m{WeightFormat::kMxfp4, 256, 96, {}, {}};
    std::mt19937 rng(1);
    for (int64_t n = 0; n < m.rows; ++n)
        for (int g = 0; g < 3; ++g) {
            m.scales.push_back(static_cast<std::byte>(n));
            for (uint32_t i = 0, at = rng() % 16; i < 16; ++i)
                m.codes.push_back(static_cast<std::byte>((i + at) % 16 | (i * 7 + at) % 16 << 4));
        }
    const auto want = [&](int64_t n, int64_t k) {
        if (n == 255) return std::nan("");
        const auto byte = static_cast<uint32_t>(m.codes[static_cast<size_t>(n * 48 + k / 2)]);
        const double value = expert_case::e2m1_value(k % 2 ? byte >> 4 : byte & 15);
        return std::ldexp(value, static_cast<int>(n) - 127);
    };
    for (const Kernels* kernels : all_kernels()) {
        m.check(*kernels, 0, 256, want);
        m.check(*kernels, 100, 101, want);
    }
}

void fp8_blocks_of(int64_t rows, int64_t k_size, bool in_bf16) {
    Matrix m{in_bf16 ? WeightFormat::kFp8BlockBF16 : WeightFormat::kFp8Block, rows, k_size, {}, {}};
    std::mt19937 rng(2);
    for (int64_t i = 0; i < rows * k_size; ++i)
        m.codes.push_back(static_cast<std::byte>(i < 512 ? i & 255 : rng() & 255));
    const int64_t across = (k_size + 127) / 128, down = (rows + 127) / 128;
    std::vector<float> scales;
    for (int64_t b = 0; b < across * down; ++b) {
        // Of a few bits, so that products with the four of a code fit fp32; small, large, negative.
        const int exponent = b % 4 == 0 ? -60 : b % 4 == 1 ? 40 : -8;
        scales.push_back(std::ldexp(static_cast<float>(129 + rng() % 127), exponent) *
                         (b % 5 == 4 ? -1.0f : 1.0f));
        uint32_t bits;
        std::memcpy(&bits, &scales.back(), 4);
        for (int byte = in_bf16 ? 2 : 0; byte < 4; ++byte)
            m.scales.push_back(static_cast<std::byte>(bits >> (8 * byte) & 255));
    }
    const auto want = [&](int64_t n, int64_t k) {
        const auto code = static_cast<uint32_t>(m.codes[static_cast<size_t>(n * k_size + k)]);
        return expert_case::e4m3_value(code) *
               scales[static_cast<size_t>(n / 128 * across + k / 128)];
    };
    for (const Kernels* kernels : all_kernels()) {
        m.check(*kernels, 0, rows, want);
        if (rows > 130) m.check(*kernels, 125, 131, want);  // two rows of blocks
    }
}

void every_fp8_code_in_blocks_of_all_sizes() {
    for (const bool in_bf16 : {false, true}) {
        fp8_blocks_of(1, 1, in_bf16);
        fp8_blocks_of(3, 40, in_bf16);
        fp8_blocks_of(140, 257, in_bf16);
        fp8_blocks_of(130, 4230, in_bf16);  // more blocks than tables are held at a time
    }
}

void the_smallest_and_largest_products_round_once() {
    // The subnormal code 1 (2^-9) and the largest 448 under scales at the ends of fp32.
    for (const float scale : {0x1p-126f, 0x1.8p-130f, 0x1p127f, 0x1p119f}) {
        Matrix m{WeightFormat::kFp8Block, 1, 64, {}, {}};
        for (int i = 0; i < 64; ++i) m.codes.push_back(static_cast<std::byte>(i % 2 ? 0x7e : 0x01));
        m.scales.resize(4);
        std::memcpy(m.scales.data(), &scale, 4);
        const auto want = [&](int64_t, int64_t k) { return (k % 2 ? 448.0 : 0x1p-9) * scale; };
        for (const Kernels* kernels : all_kernels()) m.check(*kernels, 0, 1, want);
    }
}

double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 31 ? (fraction ? std::nan("") : HUGE_VAL)
                        : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                       : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

// The fp16 number nearest to an exact value, ties to even: rint does that at the value's last bit.
double rounded_to_half(double exact) {
    if (std::isnan(exact) || std::isinf(exact) || exact == 0) return exact;
    int exponent;
    std::frexp(exact, &exponent);
    const int last = std::max(exponent - 11, -24);
    const double rounded = std::ldexp(std::rint(std::ldexp(exact, -last)), last);
    return std::fabs(rounded) > 65504 ? std::copysign(HUGE_VAL, exact) : rounded;
}

// Row n has scales 4 n ... 4 n + 3 of all 65536 bf16 or fp16: NaN, infinities and subnormals too. A
// group has all sixteen codes twice, at other places in each.
void every_int4_code_under_every_scale_of(bool in_half) {
    const int64_t groups = 4;
    const WeightFormat format = in_half ? WeightFormat::kInt4GroupF16 : WeightFormat::kInt4Group;
    Matrix m{format, 65536 / groups, groups * 32, {}, {}, 32};
    std::mt19937 rng(3);
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        m.scales.push_back(static_cast<std::byte>(bits & 255));
        m.scales.push_back(static_cast<std::byte>(bits >> 8));
        for (uint32_t i = 0, at = rng() % 16; i < 16; ++i)
            m.codes.push_back(static_cast<std::byte>((i + at) % 16 | (i * 7 + at) % 16 << 4));
    }
    const auto want = [&](int64_t n, int64_t k) {
        const auto byte = static_cast<uint32_t>(m.codes[static_cast<size_t>(n * 64 + k / 2)]);
        const auto code = static_cast<int>(k % 2 ? byte >> 4 : byte & 15);
        const auto bits = static_cast<uint16_t>(n * groups + k / 32);
        return in_half ? rounded_to_half((code - 8) * half_value(bits))
                       : (code - 8) * value_of(bits);
    };
    for (const Kernels* kernels : all_kernels()) {
        m.check(*kernels, 0, m.rows, want);
        m.check(*kernels, 700, 701, want);
    }
}

void every_int4_code_under_every_scale() {
    every_int4_code_under_every_scale_of(false);
    every_int4_code_under_every_scale_of(true);
}

void int4_groups_of(int64_t group, int64_t num_groups) {
    Matrix m{WeightFormat::kInt4Group, 5, group * num_groups, {}, {}, group};
    std::mt19937 rng(4);
    for (int64_t i = 0; i < m.rows * m.k_size / 2; ++i)
        m.codes.push_back(static_cast<std::byte>(rng() & 255));
    for (int64_t i = 0; i < m.rows * num_groups; ++i) {
        m.scales.push_back(static_cast<std::byte>(rng() & 255));
        m.scales.push_back(static_cast<std::byte>(i % 3 ? 0x3c : 0xbb));  // 2^-8 to 2^-7, or less
    }
    const auto want = [&](int64_t n, int64_t k) {
        const auto at = static_cast<size_t>(n * num_groups + k / group) * 2;
        const auto bits =
            static_cast<uint32_t>(m.scales[at]) | static_cast<uint32_t>(m.scales[at + 1]) << 8;
        const auto byte =
            static_cast<uint32_t>(m.codes[static_cast<size_t>(n * m.k_size / 2 + k / 2)]);
        const auto code = static_cast<int>(k % 2 ? byte >> 4 : byte & 15);
        return (code - 8) * value_of(static_cast<uint16_t>(bits));
    };
    for (const Kernels* kernels : all_kernels()) m.check(*kernels, 1, 4, want);
}

void int4_groups_of_all_sizes() {
    int4_groups_of(32, 3);
    int4_groups_of(64, 2);
    int4_groups_of(96, 2);
    int4_groups_of(128, 3);
    int4_groups_of(768, 1);  // a scale per row
}

void only_bf16_kernels_unpack() {
    CHECK(all_kernels().size() >= 2);  // the plain ones and AMX in emulation
    for (const Kernels* kernels : all_kernels()) CHECK(kernels->dequantise != nullptr);
    CHECK(best_kernels(Dtype::kF32)->dequantise == nullptr);
    CHECK(best_kernels(Dtype::kF16)->dequantise == nullptr);
}

}  // namespace

int main() {
    RUN(every_mxfp4_code_under_every_scale);
    RUN(every_fp8_code_in_blocks_of_all_sizes);
    RUN(the_smallest_and_largest_products_round_once);
    RUN(every_int4_code_under_every_scale);
    RUN(int4_groups_of_all_sizes);
    RUN(only_bf16_kernels_unpack);
}
