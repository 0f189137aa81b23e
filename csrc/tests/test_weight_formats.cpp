// Every code of every format, as the kernels widen it, against the format's definition; exactly.
#include "check.h"
#include "expert_gemm/cuda/weight_formats.h"
#include "quantised_section.h"

namespace {

using namespace moe_offload::cuda;
using simt::bf16;
using simt::f16;

// The element-th of some pairs.
template <class T>
T element(const uint32_t* pairs, int index) {
    return {uint16_t(pairs[index / 2] >> (index % 2 * 16))};
}

template <class T>
void check_is(T got, double want) {
    const double value = simt::to_float(got);
    if (std::isnan(want)) {
        CHECK(std::isnan(value));
        return;
    }
    CHECK_EQ(value, want);
    CHECK_EQ(std::signbit(value), std::signbit(want));
    CHECK_EQ(double(simt::to_float(simt::from_float<T>(float(want)))), want);  // T can hold it
}

template <class T>
void every_e4m3_code_in_every_place() {
    for (uint32_t code = 0; code < 256; ++code)
        for (int place = 0; place < 4; ++place)
            for (uint32_t rest : {0x00000000u, 0xffffffffu, 0x7e81b35cu}) {
                const int shift = 8 * place;
                uint32_t pairs[2];
                const uint32_t codes = (rest & ~(0xffu << shift)) | (code << shift);
                widen_e4m3<T>(codes, pairs);
                for (int i = 0; i < 4; ++i)
                    check_is(element<T>(pairs, i),
                             expert_case::e4m3_value((codes >> (8 * i)) & 255));
            }
}

void every_e2m1_code_in_every_place() {
    for (uint32_t code = 0; code < 16; ++code)
        for (int place = 0; place < 8; ++place)
            for (uint32_t rest : {0x00000000u, 0xffffffffu, 0x76543210u, 0x89abcdefu}) {
                const int shift = 4 * place;
                const uint32_t codes = (rest & ~(0xfu << shift)) | (code << shift);
                const simt::U4 pairs = widen_e2m1(codes);
                for (int i = 0; i < 8; ++i)
                    check_is(element<bf16>(pairs.word, i),
                             expert_case::e2m1_value((codes >> (4 * i)) & 15));
            }
}

template <class T>
void every_int4_code_in_every_place() {
    for (uint32_t code = 0; code < 16; ++code)
        for (int place = 0; place < 8; ++place)
            for (uint32_t rest : {0x00000000u, 0xffffffffu, 0x76543210u, 0x89abcdefu}) {
                const int shift = 4 * place;
                const uint32_t codes = (rest & ~(0xfu << shift)) | (code << shift);
                const simt::U4 pairs = widen_int4<T>(codes);
                for (int i = 0; i < 8; ++i)
                    check_is(element<T>(pairs.word, i), double((codes >> (4 * i)) & 15) - 8);
            }
}

void every_e8m0_code() {
    for (uint32_t code = 0; code < 256; ++code) {
        const uint32_t pair = widen_e8m0(code);
        for (int i = 0; i < 2; ++i)
            check_is(element<bf16>(&pair, i), expert_case::e8m0_value(int(code)));
    }
}

// Every scale with every code, but those whose product bf16 cannot hold (infinity, or a half of its
// smallest number): exact.
void mxfp4_is_exact() {
    const simt::U4 packed{{0x76543210u, 0xfedcba98u, 0, 0}};
    for (uint32_t code = 0; code < 256; ++code)
        for (int part = 0; part < 2; ++part) {
            const simt::U4 got = Mxfp4Weights::unpack(packed, part, code);
            for (int i = 0; i < 8; ++i) {
                const double want =
                    expert_case::e2m1_value(8 * part + i) * expert_case::e8m0_value(int(code));
                const bf16 value = element<bf16>(got.word, i);
                if (std::abs(want) < 3.4e38)
                    check_is(value, want);
                else
                    CHECK(!std::isfinite(simt::to_float(value)));
            }
        }
}

// Every finite scale with every code: one rounding of the exact product.
template <class T>
void int4_rounds_once() {
    const simt::U4 packed{{0x76543210u, 0xfedcba98u, 0, 0}};
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const float scale = simt::to_float(T{uint16_t(bits)});
        if (!std::isfinite(scale)) continue;
        for (int part = 0; part < 2; ++part) {
            const simt::U4 got = Int4GroupWeights<T>::unpack(packed, part, bits);
            for (int i = 0; i < 8; ++i)  // the product is exact in float
                CHECK_EQ(element<T>(got.word, i).bits,
                         simt::from_float<T>(scale * float(8 * part + i - 8)).bits);
        }
    }
}

// The example of weight_formats.h.
void the_worked_example() {
    const simt::U4 got = Mxfp4Weights::unpack({{0x31, 0, 0, 0}}, 0, 120);
    CHECK_EQ(simt::to_float(element<bf16>(got.word, 0)), std::ldexp(1.0f, -8));
    CHECK_EQ(simt::to_float(element<bf16>(got.word, 1)), std::ldexp(3.0f, -8));
}

}  // namespace

int main() {
    RUN(every_e4m3_code_in_every_place<bf16>);
    RUN(every_e4m3_code_in_every_place<f16>);
    RUN(every_e2m1_code_in_every_place);
    RUN(every_int4_code_in_every_place<bf16>);
    RUN(every_int4_code_in_every_place<f16>);
    RUN(every_e8m0_code);
    RUN(mxfp4_is_exact);
    RUN(int4_rounds_once<bf16>);
    RUN(int4_rounds_once<f16>);
    RUN(the_worked_example);
}
