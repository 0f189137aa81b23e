// The scheduler of emulated blocks and the warp operations' arithmetic.
#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {
namespace {

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool landed;
};

enum class Wait { none, block, warp };

struct Thread {
    Fiber fiber;
    int id = 0;
    Wait waits = Wait::none;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
    const char* operation = nullptr;
    int arrived = 0;
    void* lanes[kWarpSize] = {};
};

struct Machine {
    Launch config;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    Thread* current = nullptr;
    int block_x = 0, block_y = 0;
    int at_barrier = 0, live = 0;
    std::exception_ptr error;
    std::mt19937_64 random;
};

Machine machine;

Thread& self() {
    if (!machine.current) throw std::logic_error("simt: a kernel's words are for inside launch()");
    return *machine.current;
}

void land(Copy& copy) {
    if (copy.landed) return;
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    copy.landed = true;
}

void release_barrier_if_full() {
    if (machine.live == 0 || machine.at_barrier < machine.live) return;
    machine.at_barrier = 0;
    for (auto& thread : machine.threads)
        if (thread->waits == Wait::block) thread->waits = Wait::none;
}

[[noreturn]] void report_deadlock() {
    std::ostringstream text;
    text << "simt: block (" << machine.block_x << ", " << machine.block_y << ") is stuck: ";
    int shown = 0;
    for (auto& thread : machine.threads) {
        if (thread->fiber.done() || thread->waits == Wait::none) continue;
        if (++shown > 4) break;
        const Warp& warp = machine.warps[thread->id / kWarpSize];
        text << "thread " << thread->id << " waits in "
             << (thread->waits == Wait::block ? "block_sync" : warp.operation) << "; ";
    }
    text << machine.at_barrier << " of " << machine.live << " live threads are at block_sync";
    throw std::logic_error(text.str());
}

void run_block(const std::function<void(unsigned char*)>& body) {
    const Launch& config = machine.config;
    // Exactly the bytes asked for, and aligned as on the device: the sanitizer sees an overrun.
    const size_t shared_bytes = std::max<size_t>(config.shared_bytes, 1);
    struct Free {
        void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(1024)); }
    };
    std::unique_ptr<unsigned char, Free> shared(
        static_cast<unsigned char*>(::operator new[](shared_bytes, std::align_val_t(1024))));
    std::memset(shared.get(), 0xff, shared_bytes);

    machine.warps.assign(config.threads / kWarpSize, Warp{});
    machine.at_barrier = 0;
    machine.live = config.threads;
    machine.error = nullptr;
    for (int i = 0; i < config.threads; ++i) {
        Thread& thread = *machine.threads[i];
        thread.id = i;
        thread.waits = Wait::none;
        thread.open_group.clear();
        thread.groups.clear();
        thread.fiber.start([&body, memory = shared.get()] {
            try {
                body(memory);
            } catch (...) {
                machine.error = std::current_exception();
            }
        });
    }
    std::vector<int> order(config.threads);
    std::iota(order.begin(), order.end(), 0);
    while (machine.live > 0) {
        bool progress = false;
        if (config.seed) std::shuffle(order.begin(), order.end(), machine.random);
        for (int i : order) {
            Thread& thread = *machine.threads[i];
            if (thread.fiber.done() || thread.waits != Wait::none) continue;
            progress = true;
            machine.current = &thread;
            thread.fiber.resume();
            machine.current = nullptr;
            if (machine.error) std::rethrow_exception(machine.error);
            if (thread.fiber.done()) {
                --machine.live;
                release_barrier_if_full();
            }
        }
        if (!progress) report_deadlock();
    }
}

}  // namespace

void launch(const Launch& config, const std::function<void(unsigned char*)>& body) {
    if (config.threads <= 0 || config.threads % kWarpSize || config.threads > 1024)
        throw std::logic_error("simt: a block has 32 to 1024 threads in whole warps");
    machine.config = config;
    machine.random.seed(config.seed);
    while (machine.threads.size() < size_t(config.threads))
        machine.threads.push_back(std::make_unique<Thread>());
    // Threads left over from a larger launch must look finished.
    auto spare = std::vector<std::unique_ptr<Thread>>();
    while (machine.threads.size() > size_t(config.threads)) {
        spare.push_back(std::move(machine.threads.back()));
        machine.threads.pop_back();
    }
    std::vector<int> blocks(size_t(config.grid_x) * config.grid_y);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (config.seed) std::shuffle(blocks.begin(), blocks.end(), machine.random);
    try {
        for (int block : blocks) {
            machine.block_x = block % config.grid_x;
            machine.block_y = block / config.grid_x;
            run_block(body);
        }
    } catch (...) {
        machine.current = nullptr;
        machine.threads.clear();  // their functions stand in the middle
        throw;
    }
    for (auto& thread : spare) machine.threads.push_back(std::move(thread));
}

int thread_id() { return self().id; }
int block_x() { return machine.block_x; }
int block_y() { return machine.block_y; }
int grid_x() { return machine.config.grid_x; }
int grid_y() { return machine.config.grid_y; }

void block_sync() {
    Thread& thread = self();
    thread.waits = Wait::block;
    ++machine.at_barrier;
    release_barrier_if_full();
    thread.fiber.suspend();
}

void cp_async(void* shared, const void* global, int source_bytes) {
    detail::check_aligned("cp_async to", shared, 16);
    detail::check_aligned("cp_async from", global, 16);
    if (source_bytes < 0 || source_bytes > 16) detail::fail("cp_async copies 0 to 16 bytes");
    Copy copy{shared, global, source_bytes, false};
    std::memset(shared, 0xff, 16);
    if (machine.config.seed && machine.random() % 4 == 0) land(copy);
    self().open_group.push_back(copy);
}

void cp_async_commit() {
    Thread& thread = self();
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
}

namespace detail {

void fail(const char* what) {
    std::ostringstream text;
    text << "simt: " << what << " (block " << machine.block_x << ", " << machine.block_y
         << ", thread " << thread_id() << ")";
    throw std::logic_error(text.str());
}

void check_aligned(const char* what, const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
    fail((std::string(what) + ": address is not a multiple of " + std::to_string(bytes)).c_str());
}

void wait_copies(int newest_groups_left) {
    auto& groups = self().groups;
    while (groups.size() > size_t(newest_groups_left)) {
        for (Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

void collective(const char* name, void* args, void (*all)(void* const* lanes)) {
    Thread& thread = self();
    Warp& warp = machine.warps[thread.id / kWarpSize];
    if (warp.arrived && std::strcmp(warp.operation, name) != 0)
        fail((std::string(name) + " while other lanes of the warp are in " + warp.operation)
                 .c_str());
    warp.operation = name;
    warp.lanes[thread.id % kWarpSize] = args;
    if (++warp.arrived < kWarpSize) {
        thread.waits = Wait::warp;
        thread.fiber.suspend();
        return;
    }
    all(warp.lanes);
    warp.arrived = 0;
    const int first = thread.id / kWarpSize * kWarpSize;
    for (int i = first; i < first + kWarpSize; ++i) {
        Thread& other = *machine.threads[i];
        if (other.waits == Wait::warp) other.waits = Wait::none;
    }
}

void ballot_all(VoteArgs* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarpSize; ++i) votes |= uint32_t(lanes[i]->value != 0) << i;
    for (int i = 0; i < kWarpSize; ++i) lanes[i]->result = votes;
}

void match_all(VoteArgs* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i) {
        lanes[i]->result = 0;
        for (int j = 0; j < kWarpSize; ++j)
            lanes[i]->result |= uint32_t(lanes[i]->value == lanes[j]->value) << j;
    }
}

// Lane 8m + r holds the address of row r of matrix m; lane l receives of each matrix the elements
// (row l / 4, columns 2 (l % 4) and the next), or of its transpose.
void ldmatrix_all(MatrixArgs* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; ++row) {
            const void* from = lanes[8 * matrix + row]->row;
            check_aligned("ldmatrix row", from, 16);
            std::memcpy(m[row], from, 16);
        }
        for (int lane = 0; lane < kWarpSize; ++lane) {
            const int i = lane / 4, j = 2 * (lane % 4);
            const bool transposed = lanes[lane]->transposed;
            const uint32_t low = transposed ? m[j][i] : m[i][j];
            const uint32_t high = transposed ? m[j + 1][i] : m[i][j + 1];
            lanes[lane]->registers[matrix] = low | (high << 16);
        }
    }
}

// mma.m16n8k16: with g = lane / 4 and t = lane % 4, A's registers hold rows g, g + 8, g, g + 8 and
// columns 2t, 2t, 2t + 8, 2t + 8 (and the next); B's rows 2t and 2t + 8 (and the next) of column g;
// C's elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
void mma_all(MmaArgs* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const MmaArgs& args = *lanes[lane];
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
                    args.widen(uint16_t(args.a[i] >> (16 * half)));
        for (int i = 0; i < 2; ++i)
            for (int half = 0; half < 2; ++half)
                b[2 * t + 8 * i + half][g] = args.widen(uint16_t(args.b[i] >> (16 * half)));
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
            float sum = lanes[lane]->c[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[lane]->c[i] = sum;
        }
    }
}

float widen_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t narrow_bf16(float value) {
    if (std::isnan(value)) return 0x7fff;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

float widen_f16(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float magnitude;
    if (exponent == 31)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = std::ldexp(float(fraction), -24);
    else
        magnitude = std::ldexp(float(fraction | 1024), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t narrow_f16(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (magnitude == 0.0f) return sign;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(magnitude, &exponent);               // magnitude < 2^exponent
    const int step = std::max(exponent - 11, -24);  // log2 of the distance between neighbours
    const int units = int(std::nearbyint(std::ldexp(magnitude, -step)));  // to even
    // A value of `units` steps; carrying into the next binade is what adding does.
    return sign | (step == -24 ? uint16_t(units) : uint16_t(((step + 24) << 10) + units));
}

}  // namespace detail
}  // namespace simt
