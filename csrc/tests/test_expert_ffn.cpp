// The CPU expert kernels and the threads under them, without Python: every instruction set of this
// machine against a sum in double, the emulated AMX instruction against its definition, the pool
// under contention. The Python tests go wider; this program is what the sanitizers run.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/amx_emulation.h"
#include "expert_gemm/cpu/ffn_run.h"
#include "expert_gemm/cpu/multiply_roof.h"
#include "expert_gemm/cpu/openmp.h"
#include "expert_gemm/cpu/thread_pool.h"

using namespace moe_offload;

namespace {

struct Problem {
    FfnShape shape;
    int64_t tokens, top_k;
    std::vector<std::byte> hidden, gate_up, down;
    std::vector<std::byte> gate_up_t,
        down_t;  // the same as [E, H, 2F], gate and up in turn; [E, F, H]
    std::vector<int64_t> ids;
    std::vector<float> weights;

    Problem(Dtype dtype, int64_t t, int64_t a, int64_t e, int64_t h, int64_t f)
        : tokens(t), top_k(a), ids(static_cast<size_t>(t * a)), weights(ids.size()) {
        shape = {h, f, e, dtype, {}};
        hidden = draw(dtype, t * h, 1.0f, 1);
        gate_up = draw(dtype, e * 2 * f * h, 0.25f, 2);
        down = draw(dtype, e * h * f, 0.25f, 3);
        gate_up_t.resize(gate_up.size());
        down_t.resize(down.size());
        const size_t item = item_size(dtype);
        const auto copy = [&](auto& to, int64_t i, const auto& from, int64_t j) {
            std::memcpy(to.data() + static_cast<size_t>(i) * item,
                        from.data() + static_cast<size_t>(j) * item, item);
        };
        for (int64_t s = 0; s < e; ++s)
            for (int64_t k = 0; k < h; ++k)
                for (int64_t n = 0; n < f; ++n) {
                    copy(gate_up_t, (s * h + k) * 2 * f + 2 * n, gate_up, (s * 2 * f + n) * h + k);
                    copy(gate_up_t, (s * h + k) * 2 * f + 2 * n + 1, gate_up,
                         (s * 2 * f + f + n) * h + k);
                    copy(down_t, (s * f + n) * h + k, down, (s * h + k) * f + n);
                }
        std::mt19937 rng(4);
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = static_cast<int64_t>(rng() % static_cast<uint32_t>(e + 1));  // e: not ours
            weights[i] = static_cast<float>(rng() % 100) / 100.0f;
        }
    }
    FfnInputs inputs() const {
        return {hidden.data(), ids.data(), weights.data(), true, Dtype::kF32, tokens, top_k};
    }
    FfnWeights views() const {
        const auto item = static_cast<int64_t>(item_size(shape.dtype));
        const int64_t h = shape.hidden, f = shape.inner, row = h * item;
        FfnWeights w;
        w.gate = {gate_up.data(), 2 * f * row, row, item};
        w.up = {gate_up.data() + f * row, 2 * f * row, row, item};
        w.down = {down.data(), h * f * item, f * item, item};
        return w;
    }
    FfnWeights transposed_views() const {
        const auto item = static_cast<int64_t>(item_size(shape.dtype));
        const int64_t h = shape.hidden, f = shape.inner;
        FfnWeights w;
        w.gate = {gate_up_t.data(), 2 * f * h * item, 2 * item, 2 * f * item};
        w.up = {gate_up_t.data() + item, 2 * f * h * item, 2 * item, 2 * f * item};
        w.down = {down_t.data(), h * f * item, item, h * item};
        return w;
    }
    double at(const std::vector<std::byte>& v, int64_t i) const {
        return widen(shape.dtype, v.data() + static_cast<size_t>(i) * item_size(shape.dtype));
    }
    std::vector<double> exact() const {
        const int64_t h = shape.hidden, f = shape.inner;
        std::vector<double> out(static_cast<size_t>(tokens * h), 0.0);
        std::vector<double> inner(static_cast<size_t>(f));
        for (int64_t r = 0; r < tokens * top_k; ++r) {
            const int64_t e = ids[static_cast<size_t>(r)], t = r / top_k;
            if (e >= shape.num_experts) continue;
            for (int64_t i = 0; i < f; ++i) {
                double gate = 0, up = 0;
                for (int64_t k = 0; k < h; ++k) {
                    gate += at(hidden, t * h + k) * at(gate_up, (e * 2 * f + i) * h + k);
                    up += at(hidden, t * h + k) * at(gate_up, (e * 2 * f + f + i) * h + k);
                }
                inner[static_cast<size_t>(i)] = gate / (1 + std::exp(-gate)) * up;
            }
            for (int64_t n = 0; n < h; ++n) {
                double y = 0;
                for (int64_t k = 0; k < f; ++k)
                    y += inner[static_cast<size_t>(k)] * at(down, (e * h + n) * f + k);
                out[static_cast<size_t>(t * h + n)] += y * weights[static_cast<size_t>(r)];
            }
        }
        return out;
    }
    // The same weights in slots of pages that begin anywhere: NaN but for the pages themselves.
    struct Slots {
        std::vector<std::byte> bytes;
        std::vector<uint32_t> shifts;
        FfnWeights weights;
    };
    Slots slots(std::vector<uint32_t> shifts, bool transposed) const {
        const auto item = static_cast<int64_t>(item_size(shape.dtype));
        const int64_t h = shape.hidden, f = shape.inner, half = f * h * item, page = 3 * half;
        const int64_t stride = (page + 512 + 63) / 64 * 64;
        Slots s{std::vector<std::byte>(static_cast<size_t>(shape.num_experts * stride + 64),
                                       std::byte{0xff}),
                std::move(shifts), transposed ? transposed_views() : views()};
        std::byte* base = s.bytes.data() + -reinterpret_cast<uintptr_t>(s.bytes.data()) % 64;
        const auto& first = transposed ? gate_up_t : gate_up;
        const auto& second = transposed ? down_t : down;
        for (int64_t e = 0; e < shape.num_experts; ++e) {
            std::byte* to = base + e * stride + s.shifts[static_cast<size_t>(e)];
            std::memcpy(to, first.data() + e * 2 * half, static_cast<size_t>(2 * half));
            std::memcpy(to + 2 * half, second.data() + e * half, static_cast<size_t>(half));
        }
        FfnWeights& w = s.weights;
        w.up.base = base + (w.up.base - w.gate.base);
        w.gate.base = base;
        w.down.base = base + 2 * half;
        for (WeightView* view : {&w.gate, &w.up, &w.down}) {
            view->slot_stride = stride;
            view->shifts = s.shifts.data();
        }
        return s;
    }
    std::vector<std::byte> run(const Kernels& kernels, int threads, uint32_t portions,
                               bool transposed = false) const {
        return run(kernels, threads, portions, transposed ? transposed_views() : views());
    }
    std::vector<std::byte> run(const Kernels& kernels, int threads, uint32_t portions,
                               const FfnWeights& stored) const {
        FfnRun run(shape, inputs(), kernels, threads);
        std::vector<std::pair<int32_t, int32_t>> ready;
        for (size_t i = 0; i < run.experts().size(); ++i)
            ready.emplace_back(static_cast<int32_t>(i), run.experts()[i]);
        std::mt19937 rng(portions);
        if (portions) std::shuffle(ready.begin(), ready.end(), rng);
        for (size_t i = 0; i < ready.size();) {
            const size_t count =
                portions ? std::min<size_t>(1 + rng() % 3, ready.size() - i) : ready.size();
            run.compute(stored, std::span(ready).subspan(i, count));
            i += count;
        }
        std::vector<std::byte> out(hidden.size(), std::byte{0xff});  // NaN in every dtype
        run.finish(out.data());
        return out;
    }
};

void every_instruction_set_is_right() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (int32_t isa = 0; isa < 6; ++isa) {
            const Kernels* kernels = kernels_for(static_cast<Isa>(isa), dtype);
            if (!kernels) continue;
            for (const auto& [t, a, e, h, f] :
                 std::vector<std::array<int64_t, 5>>{{1, 1, 1, 1, 1},
                                                     {3, 2, 3, 37, 19},
                                                     {70, 1, 1, 64, 48},
                                                     {60, 2, 2, 33, 50},
                                                     {25, 1, 1, 270, 41}}) {
                const Problem problem(dtype, t, a, e, h, f);
                const std::vector<std::byte> got = problem.run(*kernels, 1, 0);
                const std::vector<double> want = problem.exact();
                double error = 0, size = 0;
                for (size_t i = 0; i < want.size(); ++i) {
                    error += std::pow(problem.at(got, static_cast<int64_t>(i)) - want[i], 2);
                    size += want[i] * want[i];
                }
                const double relative = std::sqrt(error) / (std::sqrt(size) + 1e-6);
                const double bound = dtype == Dtype::kF32   ? 1e-6
                                     : dtype == Dtype::kF16 ? 1e-3
                                                            : 8e-3;
                if (!(relative <= bound))
                    std::fprintf(stderr, "%s dtype %d T %ld: %g\n", kernels->isa,
                                 static_cast<int>(dtype), static_cast<long>(t), relative);
                CHECK(relative <= bound);
                CHECK(problem.run(*kernels, 2, 0, true) == got);
            }
        }
}

void every_instruction_set_counts_its_multiplications() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (int32_t isa = 0; isa < 6; ++isa) {
            const Kernels* kernels = kernels_for(static_cast<Isa>(isa), dtype);
            if (!kernels) continue;
            CHECK(kernels->multiply(1) > 0);
            CHECK_EQ(kernels->multiply(0), 0);
            CHECK_EQ(kernels->multiply(3), 3 * kernels->multiply(1));
            // tile rows x vectors x lanes x a pair, or four products of two 16 x 32 operands
            if (static_cast<Isa>(isa) == Isa::kAvx2) CHECK_EQ(kernels->multiply(1), 4 * 3 * 8 * 2);
            if (static_cast<Isa>(isa) == Isa::kAvx512Bf16)
                CHECK_EQ(kernels->multiply(1), 8 * 3 * 16 * 2 * 2);
            if (static_cast<Isa>(isa) == Isa::kAmxEmulated)
                CHECK_EQ(kernels->multiply(1), 4 * 2 * 16 * 16 * 32);
            const MultiplyRoof roof = multiply_roof(*kernels, 1e-4);
            CHECK(roof.operations > 0);
            CHECK(roof.seconds >= 1e-4);
        }
}

void bits_do_not_depend_on_portions_or_threads() {
    for (const int64_t tokens : {2, 90}) {
        const Problem problem(Dtype::kBF16, tokens, 2, 6, 256, 192);
        const Kernels& kernels = *best_kernels(Dtype::kBF16);
        const std::vector<std::byte> want = problem.run(kernels, 1, 0);
        for (uint32_t seed = 1; seed < 6; ++seed)
            for (const bool transposed : {false, true})
                CHECK(problem.run(kernels, static_cast<int>(seed), seed, transposed) == want);
    }
}

// A page may begin at any element: no kernel may choose instructions by the alignment of weights.
void bits_do_not_depend_on_where_weights_lie() {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (int32_t isa = 0; isa < 6; ++isa) {
            const Kernels* kernels = kernels_for(static_cast<Isa>(isa), dtype);
            if (!kernels) continue;
            const auto item = static_cast<uint32_t>(item_size(dtype));
            // One row an expert, a few, and many; sizes with and without odd ends.
            for (const auto& [t, a, e, h, f] : std::vector<std::array<int64_t, 5>>{
                     {2, 2, 6, 96, 64}, {5, 2, 3, 37, 19}, {70, 2, 3, 64, 48}, {60, 2, 2, 33, 50}})
                for (const bool transposed : {false, true}) {
                    const Problem problem(dtype, t, a, e, h, f);
                    const std::vector<std::byte> want = problem.run(*kernels, 1, 0, transposed);
                    for (uint32_t shift = 0; shift < 512; shift += shift < 64 ? item : 56) {
                        std::vector<uint32_t> shifts;
                        for (uint32_t s = 0; s < e; ++s)
                            shifts.push_back((shift + s * 72) % 512 / item * item);
                        const auto slots = problem.slots(shifts, transposed);
                        CHECK(problem.run(*kernels, 2, shift, slots.weights) == want);
                    }
                }
        }
}

// Kernels one of whose phases now and then takes a thousand times as long, so that other threads
// run ahead until they have to wait for it.
struct Dawdling {
    static inline const Kernels* base;
    static inline std::atomic<int> calls;

    static void dawdle() {
        if (calls++ % 3 == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    static Kernels in_phase(int phase) {
        Kernels slow = *base;
        if (phase == 0)
            slow.pack_block = [](const void* hidden, const int64_t* tokens, int64_t rows, int64_t k,
                                 void* x) {
                dawdle();
                base->pack_block(hidden, tokens, rows, k, x);
            };
        if (phase == 1)
            slow.gate_up_many = [](const GateUpArgs& a) {
                dawdle();
                base->gate_up_many(a);
            };
        if (phase == 2)
            slow.down_many = [](const DownArgs& a) {
                dawdle();
                base->down_many(a);
            };
        return slow;
    }
};

void every_phase_waits_for_the_one_before() {
    // About 500 rows per expert, so two parts, and more stages than exist at a time.
    const Problem problem(Dtype::kBF16, 1000, 2, 3, 64, 48);
    Dawdling::base = best_kernels(Dtype::kBF16);
    const std::vector<std::byte> want = problem.run(*Dawdling::base, 1, 0);
    for (int phase = 0; phase < 3; ++phase) {
        Dawdling::calls = 0;
        const Kernels kernels = Dawdling::in_phase(phase);
        CHECK(problem.run(kernels, 4, 0) == want);
        CHECK(Dawdling::calls > 3);
    }
}

void callers_at_the_same_time_get_their_own_results() {
    const Problem problem(Dtype::kBF16, 40, 2, 6, 256, 192);
    const Kernels& kernels = *best_kernels(Dtype::kBF16);
    const std::vector<std::byte> want = problem.run(kernels, 1, 0);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (uint32_t c = 0; c < 4; ++c)
        callers.emplace_back([&, c] {
            for (uint32_t i = 0; i < 5; ++i)
                if (problem.run(kernels, 3, 10 * c + i) != want) ++wrong;
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_EQ(wrong.load(), 0);
}

void without_torch_there_is_no_openmp_to_borrow() { CHECK(torch_openmp() == nullptr); }

void every_task_runs_once() {
    ThreadPool pool;
    for (const int threads : {1, 2, 4})
        for (const int64_t count : {0, 1, 2, 3, 1000})
            for (int repeat = 0; repeat < 50; ++repeat) {
                std::vector<std::atomic<int>> done(static_cast<size_t>(count));
                pool.run(threads, count, [&](int64_t task) { ++done[static_cast<size_t>(task)]; });
                for (const auto& times : done) CHECK_EQ(times.load(), 1);
            }
}

void sleeping_threads_wake_and_a_pool_ends_at_once() {
    for (int repeat = 0; repeat < 20; ++repeat) {
        ThreadPool pool;
        std::atomic<int64_t> sum{0};
        for (int i = 0; i < 3; ++i) {
            pool.run(4, 100, [&](int64_t task) { sum += task; });
            if (repeat % 2) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
        CHECK_EQ(sum.load(), 3 * 4950);
    }
}

void a_buffer_is_used_again() {
    const std::byte* first;
    {
        const Buffer buffer(3000000);
        first = buffer.data();
        CHECK(reinterpret_cast<uintptr_t>(first) % 4096 == 0);
    }
    const Buffer again(2990000);
    CHECK(again.data() == first);
    const Buffer other(2990000);
    CHECK(other.data() != first);
    const Buffer large(Buffer::kKept + 1);  // never kept, only given back
    CHECK(large.capacity() > Buffer::kKept);
}

void the_emulated_tile_product_is_the_documented_one() {
    const auto tile_of = [](uint16_t value) {
        std::array<uint16_t, 512> bits;
        bits.fill(value);
        return bits;
    };
    const auto product = [](const std::array<uint16_t, 512>& a, const std::array<uint16_t, 512>& b,
                            float start) {
        std::array<float, 256> c;
        c.fill(start);
        amx_emulation::load(0, c.data(), 64);
        amx_emulation::load(1, a.data(), 64);
        amx_emulation::load(2, b.data(), 64);
        amx_emulation::dot_bf16(0, 1, 2);
        amx_emulation::store(0, c.data(), 64);
        return c;
    };
    CHECK_EQ(product(tile_of(0x4000), tile_of(0x4040), 1.0f)[37], 1.0f + 32 * 6.0f);
    // a denormal factor counts as zero, and so does a denormal in C
    CHECK_EQ(product(tile_of(0x0001), tile_of(0x7f00), 0.0f)[0], 0.0f);
    CHECK_EQ(product(tile_of(0x0000), tile_of(0x0000), 1e-40f)[255], 0.0f);
    // even and odd sums are apart until the end: 2^24 in the even one swallows nothing of the odd
    auto a = tile_of(0x0000), b = tile_of(0x3f80);
    for (size_t row = 0; row < 16; ++row) {
        a[row * 32] = 0x4b80;      // 2^24, even
        a[row * 32 + 1] = 0x3f80;  // 1, odd, twice: 2^24 + 1 + 1 one by one would stay 2^24
        a[row * 32 + 3] = 0x3f80;
    }
    CHECK_EQ(product(a, b, 0.0f)[0], 16777218.0f);
}

}  // namespace

int main() {
    RUN(every_instruction_set_is_right);
    RUN(every_instruction_set_counts_its_multiplications);
    RUN(bits_do_not_depend_on_portions_or_threads);
    RUN(bits_do_not_depend_on_where_weights_lie);
    RUN(every_phase_waits_for_the_one_before);
    RUN(callers_at_the_same_time_get_their_own_results);
    RUN(without_torch_there_is_no_openmp_to_borrow);
    RUN(every_task_runs_once);
    RUN(sleeping_threads_wake_and_a_pool_ends_at_once);
    RUN(a_buffer_is_used_again);
    RUN(the_emulated_tile_product_is_the_documented_one);
}
