// The emulated vocabulary against plain arithmetic, and every trap it is meant to set.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "simt/simt.h"

namespace {

using simt::bf16;
using simt::f16;
using simt::Launch;
using Error = std::logic_error;

template <class T>
std::vector<T> random_values(size_t count, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::vector<T> values(count);
    for (T& value : values) value = {simt::from_float<T>(normal(random))};
    return values;
}

template <class T>
void conversions_round_to_nearest_even() {
    std::vector<float> finite;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const float value = simt::to_float(T{uint16_t(bits)});
        if (std::isnan(value)) continue;
        CHECK_EQ(simt::from_float<T>(value).bits, bits);
        if (std::isfinite(value) && value >= 0 && !(bits & 0x8000)) finite.push_back(value);
    }
    for (size_t i = 0; i + 1 < finite.size(); ++i) {  // in order of their bits
        const float middle = float((double(finite[i]) + double(finite[i + 1])) / 2);
        CHECK_EQ(simt::from_float<T>(middle).bits, i + i % 2);
        CHECK_EQ(simt::from_float<T>(-middle).bits, (i + i % 2) | 0x8000);
        CHECK_EQ(simt::from_float<T>(std::nextafter(middle, 0.0f)).bits, i);
    }
    CHECK(std::isnan(simt::to_float(simt::from_float<T>(NAN))));
}

// Products of pairs round once, also to subnormals, and infinity times zero is NaN.
template <class T>
void pairs_multiply_and_add() {
    const uint32_t minus_zeros = 0x80008000u;
    std::mt19937_64 random(4);
    for (int i = 0; i < 200'000; ++i) {
        const uint32_t a = uint32_t(random()), b = uint32_t(random());
        const uint32_t got = simt::fma2<T>(a, b, minus_zeros);
        for (int shift : {0, 16}) {
            const float x = simt::to_float(T{uint16_t(a >> shift)});
            const float y = simt::to_float(T{uint16_t(b >> shift)});
            const float want = simt::to_float(simt::from_float<T>(x * y));
            const float value = simt::to_float(T{uint16_t(got >> shift)});
            if (std::isnan(want))
                CHECK(std::isnan(value));
            else
                CHECK_EQ(value, want);
        }
    }
    const uint32_t one = simt::pack<T>(1.0f, 1.0f), some = simt::pack<T>(2.5f, -3.0f);
    CHECK_EQ(simt::fma2<T>(some, one, simt::pack<T>(-2.0f, 1.0f)), simt::pack<T>(0.5f, -2.0f));
    const uint32_t infinite = simt::pack<T>(INFINITY, -INFINITY);
    CHECK(std::isnan(simt::unpack_low<T>(simt::fma2<T>(infinite, 0, some))));
}

void bytes_are_permuted() {
    CHECK_EQ(simt::byte_permute(0x33221100u, 0x77665544u, 0x7531), 0x77553311u);
    CHECK_EQ(simt::byte_permute(0x33221100u, 0x77665544u, 0xabcd2222),
             0x22222222u);  // four nibbles count
}

// D = A [16, 16] x B [16, 8], through ldmatrix and mma, with B given as [n][k] or as [k][n].
template <class T>
void matrix_product_matches(bool b_transposed) {
    const auto a = random_values<T>(16 * 16, 1), b = random_values<T>(16 * 8, 2);
    std::vector<float> d(16 * 8, NAN);
    simt::launch({.threads = 32, .shared_bytes = (16 * 16 + 16 * 8) * 2}, [&](unsigned char* raw) {
        T* shared_a = reinterpret_cast<T*>(raw);
        T* shared_b = shared_a + 256;  // [8][16] n by k, or [16][8] k by n
        const int lane = simt::lane_id();
        for (int i = lane; i < 256; i += 32) shared_a[i] = a[i];
        for (int i = lane; i < 128; i += 32) {
            const int k = i / 8, n = i % 8;
            (b_transposed ? shared_b[k * 8 + n] : shared_b[n * 16 + k]) = b[i];
        }
        simt::warp_sync();
        uint32_t af[4], bf[4];
        simt::ldmatrix_x4(af, shared_a + (lane % 16) * 16 + (lane / 16) * 8);
        if (b_transposed)
            simt::ldmatrix_x4_trans(bf, shared_b + (lane % 16) * 8);
        else
            simt::ldmatrix_x4(bf, shared_b + (lane % 8) * 16 + (lane / 8 % 2) * 8);
        float c[4] = {0.5f, 0.5f, 0.5f, 0.5f};
        const uint32_t b_pair[2] = {bf[0], bf[1]};
        simt::mma<T>(c, af, b_pair);
        for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = c[i];
    });
    for (int row = 0; row < 16; ++row)
        for (int n = 0; n < 8; ++n) {
            double sum = 0.5;
            for (int k = 0; k < 16; ++k)
                sum += double(simt::to_float(a[row * 16 + k])) * simt::to_float(b[k * 8 + n]);
            CHECK(std::abs(d[row * 8 + n] - sum) < 1e-4);
        }
}

void fragments_match_a_plain_matrix_product() {
    for (bool transposed : {false, true}) {
        matrix_product_matches<bf16>(transposed);
        matrix_product_matches<f16>(transposed);
    }
}

void warp_words_see_the_whole_warp() {
    std::vector<uint32_t> got(64 * 4);
    for (uint64_t seed : {0, 5}) {
        simt::launch({.threads = 64, .seed = seed}, [&](unsigned char*) {
            const int thread = simt::thread_id(), lane = simt::lane_id();
            got[thread * 4 + 0] = simt::shuffle(100 * simt::warp_id() + lane, 3);
            got[thread * 4 + 1] = simt::shuffle_xor(lane, 5);
            got[thread * 4 + 2] = simt::ballot(lane % 3 == 0);
            got[thread * 4 + 3] = simt::match_any(lane % 16);
        });
        for (uint32_t thread = 0; thread < 64; ++thread) {
            const uint32_t lane = thread % 32;
            CHECK_EQ(got[thread * 4 + 0], thread / 32 * 100 + 3);
            CHECK_EQ(got[thread * 4 + 1], lane ^ 5);
            CHECK_EQ(got[thread * 4 + 2], 0x49249249u);
            CHECK_EQ(got[thread * 4 + 3], (1u << (lane % 16)) | (1u << (lane % 16 + 16)));
        }
    }
}

void copies_land_when_waited_for() {
    std::vector<float> source(8, 1.0f);
    std::vector<float> early(8), one_group(8), both(8);
    simt::launch({.threads = 32, .shared_bytes = 32}, [&](unsigned char* raw) {
        if (simt::thread_id() != 0) return;
        float* shared = reinterpret_cast<float*>(raw);
        simt::cp_async(shared, source.data(), 16);
        simt::cp_async_commit();
        simt::cp_async(shared + 4, source.data() + 4, 8);  // half, the rest zero
        simt::cp_async_commit();
        source[0] = 2.0f;  // read when the copy lands, not when it was asked for
        std::copy(shared, shared + 8, early.begin());
        simt::cp_async_wait<1>();
        std::copy(shared, shared + 8, one_group.begin());
        simt::cp_async_wait<0>();
        std::copy(shared, shared + 8, both.begin());
    });
    CHECK(std::all_of(early.begin(), early.end(), [](float v) { return std::isnan(v); }));
    CHECK_EQ(one_group[0], 2.0f);
    CHECK(std::isnan(one_group[4]));
    CHECK_EQ(both, (std::vector<float>{2, 1, 1, 1, 1, 1, 0, 0}));
}

// Threads write, and a neighbour in another warp reads: right only with the barrier between.
bool neighbours_agree(bool with_barrier, uint64_t seed) {
    bool agree = true;
    simt::launch({.threads = 128, .shared_bytes = 512, .seed = seed}, [&](unsigned char* raw) {
        int* shared = reinterpret_cast<int*>(raw);
        const int thread = simt::thread_id();
        shared[thread] = thread;
        if (with_barrier) simt::block_sync();
        if (shared[(thread + 64) % 128] != (thread + 64) % 128) agree = false;
    });
    return agree;
}

void a_missing_barrier_shows() {
    for (uint64_t seed = 0; seed < 4; ++seed) {
        CHECK(neighbours_agree(true, seed));
        CHECK(!neighbours_agree(false, seed));
    }
}

void exited_threads_do_not_hold_a_barrier() {
    int reached = 0;
    simt::launch({.threads = 64}, [&](unsigned char*) {
        if (simt::warp_id() == 1) return;
        simt::block_sync();
        ++reached;
    });
    CHECK_EQ(reached, 32);
}

void mistakes_are_errors_and_leave_it_usable() {
    const Launch two_warps{.threads = 64, .shared_bytes = 64};
    CHECK_THROWS(Error, "thread 0 waits in block_sync", simt::launch(two_warps, [](auto*) {
                     if (simt::lane_id() < 16)
                         simt::block_sync();
                     else
                         simt::warp_sync();
                 }));
    CHECK_THROWS(Error, "ballot while other lanes of the warp are in shuffle",
                 simt::launch(two_warps, [](auto*) {
                     if (simt::lane_id() == 0)
                         simt::shuffle(1, 0);
                     else
                         simt::ballot(true);
                 }));
    CHECK_THROWS(Error, "load16: address is not a multiple of 16",
                 simt::launch(two_warps, [](unsigned char* raw) {
                     simt::load16<simt::Keep::normal>(raw + 8);
                 }));
    CHECK_THROWS(Error, "load4: address is not a multiple of 4",
                 simt::launch(two_warps, [](unsigned char* raw) { simt::load4(raw + 2); }));
    CHECK_THROWS(Error, "a choice above 7",
                 simt::launch(two_warps, [](auto*) { simt::byte_permute(0, 0, 0x0080); }));
    CHECK_THROWS(Error, "32 to 1024 threads", simt::launch({.threads = 40}, [](auto*) {}));
    CHECK_THROWS(Error, "for inside launch", simt::thread_id());
    CHECK_THROWS(std::runtime_error, "mine",
                 simt::launch(two_warps, [](auto*) { throw std::runtime_error("mine"); }));
    CHECK(neighbours_agree(true, 1));
}

void shared_memory_starts_as_nan_in_every_block() {
    int nans = 0;
    simt::launch({.grid_x = 3, .grid_y = 2, .threads = 32, .shared_bytes = 128}, [&](auto* raw) {
        float* shared = reinterpret_cast<float*>(raw);
        nans += std::isnan(shared[simt::thread_id()]);
        shared[simt::thread_id()] = 1.0f;
    });
    CHECK_EQ(nans, 6 * 32);
}

}  // namespace

int main() {
    RUN(conversions_round_to_nearest_even<bf16>);
    RUN(conversions_round_to_nearest_even<f16>);
    RUN(pairs_multiply_and_add<bf16>);
    RUN(pairs_multiply_and_add<f16>);
    RUN(bytes_are_permuted);
    RUN(fragments_match_a_plain_matrix_product);
    RUN(warp_words_see_the_whole_warp);
    RUN(copies_land_when_waited_for);
    RUN(a_missing_barrier_shows);
    RUN(exited_threads_do_not_hold_a_barrier);
    RUN(mistakes_are_errors_and_leave_it_usable);
    RUN(shared_memory_starts_as_nan_in_every_block);
}
