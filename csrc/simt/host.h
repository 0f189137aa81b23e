// The vocabulary of simt.h on a CPU, for tests. It is stricter than a GPU where that finds bugs:
//
// - Shared memory is a fresh allocation of exactly the bytes asked for, filled with 0xff: NaN in
//   every float format, -1 in every integer. Reading what nobody wrote shows in the result.
// - cp_async really is asynchronous. Its destination turns to NaN at once and gets the data when
//   the issuing thread waits for its group (or at a random earlier moment): a reader that is too
//   early sees NaN, and so does one whose buffer was refilled too soon.
// - Alignment is checked, warp operations must be the same one in every lane of the warp, and a
//   barrier that not every thread reaches is an error that names the threads.
// - A seed other than 0 runs threads, blocks and copies in a random order.
//
// Errors are std::logic_error. One launch at a time per process; nothing here is thread safe.
#pragma once

#include <cmath>
#include <cstddef>
#include <functional>
#include <type_traits>

namespace simt {

struct Launch {
    int grid_x = 1;
    int grid_y = 1;
    int threads = kWarpSize;  // per block, a multiple of the warp
    size_t shared_bytes = 0;
    uint64_t seed = 0;  // 0: everything in order
};

// Runs `body(shared)` once per thread of each block.
void launch(const Launch& config, const std::function<void(unsigned char*)>& body);

int thread_id();
int block_x();
int block_y();
int grid_x();
int grid_y();
inline int opaque(int value) { return value; }

void block_sync();

namespace detail {

[[noreturn]] void fail(const char* what);
// Every lane of a warp brings its arguments; the last one to come runs `all(lanes)` for the warp.
void collective(const char* name, void* args, void (*all)(void* const* lanes));
void check_aligned(const char* what, const void* pointer, size_t bytes);

template <class Args, void (*kAll)(Args* const* lanes)>
void collective(const char* name, Args& args) {
    collective(name, &args, [](void* const* lanes) {
        Args* typed[kWarpSize];
        for (int i = 0; i < kWarpSize; ++i) typed[i] = static_cast<Args*>(lanes[i]);
        kAll(typed);
    });
}

template <class V>
struct ShuffleArgs {
    V value;
    int source;
    V result;
};
template <class V>
void shuffle_all(ShuffleArgs<V>* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i)
        lanes[i]->result = lanes[lanes[i]->source & (kWarpSize - 1)]->value;
}

struct VoteArgs {
    uint32_t value;
    uint32_t result;
};
void ballot_all(VoteArgs* const* lanes);
void match_all(VoteArgs* const* lanes);

struct MatrixArgs {
    const void* row;
    uint32_t* registers;
    bool transposed;
};
void ldmatrix_all(MatrixArgs* const* lanes);

struct MmaArgs {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
    float (*widen)(uint16_t bits);
};
void mma_all(MmaArgs* const* lanes);

struct NoArgs {};
inline void nothing_all(NoArgs* const*) {}

float widen_bf16(uint16_t bits);
float widen_f16(uint16_t bits);
uint16_t narrow_bf16(float value);
uint16_t narrow_f16(float value);
void wait_copies(int newest_groups_left);

}  // namespace detail

inline void warp_sync() {
    detail::NoArgs args;
    detail::collective<detail::NoArgs, detail::nothing_all>("warp_sync", args);
}

template <class V>
V shuffle(V value, int source_lane) {
    detail::ShuffleArgs<V> args{value, source_lane, value};
    detail::collective<detail::ShuffleArgs<V>, detail::shuffle_all<V>>("shuffle", args);
    return args.result;
}
template <class V>
V shuffle_xor(V value, int lane_mask) {
    return shuffle(value, (thread_id() & (kWarpSize - 1)) ^ lane_mask);
}
inline uint32_t ballot(bool predicate) {
    detail::VoteArgs args{predicate, 0};
    detail::collective<detail::VoteArgs, detail::ballot_all>("ballot", args);
    return args.result;
}
inline uint32_t match_any(uint32_t value) {
    detail::VoteArgs args{value, 0};
    detail::collective<detail::VoteArgs, detail::match_all>("match_any", args);
    return args.result;
}

template <class T>
T from_float(float value);
template <>
inline bf16 from_float<bf16>(float value) {
    return {detail::narrow_bf16(value)};
}
template <>
inline f16 from_float<f16>(float value) {
    return {detail::narrow_f16(value)};
}
inline float to_float(bf16 value) { return detail::widen_bf16(value.bits); }
inline float to_float(f16 value) { return detail::widen_f16(value.bits); }

// Exact up to one rounding for products (c of minus zero) and for results that need none.
template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        auto half = [&](uint32_t v) { return double(to_float(T{uint16_t(v >> shift)})); };
        const float sum = float(half(a) * half(b) + half(c));
        out |= uint32_t(from_float<T>(sum).bits) << shift;
    }
    return out;
}

inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t choice) {
    if (choice & 0x8888) detail::fail("byte_permute: a choice above 7 repeats a sign");
    const uint64_t bytes = (uint64_t(high) << 32) | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= (uint32_t(bytes >> (choice >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
    return out;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    auto widen = std::is_same_v<T, bf16> ? detail::widen_bf16 : detail::widen_f16;
    detail::MmaArgs args{c, a, b, widen};
    detail::collective<detail::MmaArgs, detail::mma_all>("mma", args);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    detail::MatrixArgs args{row, r, false};
    detail::collective<detail::MatrixArgs, detail::ldmatrix_all>("ldmatrix", args);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    detail::MatrixArgs args{row, r, true};
    detail::collective<detail::MatrixArgs, detail::ldmatrix_all>("ldmatrix.trans", args);
}

void cp_async(void* shared, const void* global, int source_bytes);
void cp_async_commit();
template <int kNewestGroupsLeft>
void cp_async_wait() {
    detail::wait_copies(kNewestGroupsLeft);
}

template <Keep>
U4 load16(const void* pointer) {
    detail::check_aligned("load16", pointer, 16);
    U4 v;
    std::memcpy(&v, pointer, 16);
    return v;
}
template <Keep>
void load8(const void* pointer, uint32_t& low, uint32_t& high) {
    detail::check_aligned("load8", pointer, 8);
    std::memcpy(&low, pointer, 4);
    std::memcpy(&high, static_cast<const char*>(pointer) + 4, 4);
}
inline uint32_t load4(const void* pointer) {
    detail::check_aligned("load4", pointer, 4);
    uint32_t v;
    std::memcpy(&v, pointer, 4);
    return v;
}
inline uint32_t load2(const void* pointer) {
    detail::check_aligned("load2", pointer, 2);
    uint16_t v;
    std::memcpy(&v, pointer, 2);
    return v;
}
inline uint32_t load1(const void* pointer) { return *static_cast<const unsigned char*>(pointer); }
inline void store16(void* pointer, U4 v) {
    detail::check_aligned("store16", pointer, 16);
    std::memcpy(pointer, &v, 16);
}

inline void store8(void* pointer, uint32_t low, uint32_t high) {
    detail::check_aligned("store8", pointer, 8);
    std::memcpy(pointer, &low, 4);
    std::memcpy(static_cast<char*>(pointer) + 4, &high, 4);
}
inline void store4(void* pointer, uint32_t v) {
    detail::check_aligned("store4", pointer, 4);
    std::memcpy(pointer, &v, 4);
}

inline int atomic_add(int* counter, int value) {
    const int old = *counter;
    *counter = old + value;
    return old;
}
inline void thread_fence() {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace simt
