// What the fake driver knows: streams, events, memory, and how it was told to misbehave.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fake_cuda.h"

namespace fake_cuda {

using Result = int;
using Lock = std::unique_lock<std::mutex>;
constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100;
constexpr Result kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400;
constexpr Result kCaptureUnsupported = 900;
constexpr Result kNotReady = 600, kAlreadyRegistered = 712, kNotRegistered = 713;

struct Range {
    uintptr_t begin, end;
    bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

struct Event {
    uint64_t recorded = 0, completed = 0;  // number of the last record, enqueued and reached
};

struct Stream {
    std::deque<std::function<void(Lock&)>> queue;
    bool busy = false, destroyed = false;
};

struct Failure {
    Result error;
    int skip, count;
};

struct World {
    std::mutex mutex;
    std::condition_variable changed;
    int num_devices = 1, major = 9, minor = 0;
    std::map<Stream*, std::shared_ptr<Stream>> streams;
    std::map<Event*, std::shared_ptr<Event>> events;
    std::map<uintptr_t, uintptr_t> registered;
    std::vector<Range> device, reading, writing;
    std::map<std::string, Failure> failures;
    Result broken = kSuccess;
    bool capturing = false;
    uint64_t register_limit = UINT64_MAX;
    std::mt19937_64 random;
    int64_t max_delay_us = 0;
    bool gate_open = true, copying = false;
    int queued_copies = 0;
    std::vector<std::pair<uintptr_t, uint64_t>> log;
    FakeCudaCounts counts{};
    std::string misuse;
};

World& world();

// Of the calling thread. Mode 0 is global: any thread's capture forbids unsafe calls.
extern thread_local std::vector<void*> contexts;
extern thread_local int capture_mode;

// The lock is held in all of these.
void misuse(World& w, const std::string& what);
bool any_meets(const std::vector<Range>& ranges, const Range& range);
void erase_one(std::vector<Range>& ranges, const Range& range);
// A stream and the thread that runs it.
std::shared_ptr<Stream> start_stream(World& w);
// Null when there is none; a null handle is the legacy default stream.
Stream* find_stream(World& w, void* handle);
void push(World& w, Stream* stream, std::function<void(Lock&)> operation);

}  // namespace fake_cuda
