#include "world.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace fake_cuda {

thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;

// Never destroyed: stream threads outlive main.
World& world() {
    static World* const world = new World;
    return *world;
}

void misuse(World& w, const std::string& what) {
    ++w.counts.misuses;
    w.misuse = what;
}

bool any_meets(const std::vector<Range>& ranges, const Range& range) {
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const Range& other) { return other.meets(range); });
}

void erase_one(std::vector<Range>& ranges, const Range& range) {
    ranges.erase(std::find_if(ranges.begin(), ranges.end(), [&](const Range& other) {
        return other.begin == range.begin && other.end == range.end;
    }));
}

namespace {

void run_stream(std::shared_ptr<Stream> stream) {
    World& w = world();
    Lock lock(w.mutex);
    while (true) {
        w.changed.wait(lock, [&] { return !stream->queue.empty() || stream->destroyed; });
        if (stream->queue.empty()) return;
        const auto operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->busy = true;
        if (w.max_delay_us > 0) {
            const auto delay = std::uniform_int_distribution<int64_t>(0, w.max_delay_us)(w.random);
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(delay));
            lock.lock();
        }
        operation(lock);
        stream->busy = false;
        w.changed.notify_all();
    }
}

}  // namespace

std::shared_ptr<Stream> start_stream(World& w) {
    auto stream = std::make_shared<Stream>();
    w.streams[stream.get()] = stream;
    std::thread(run_stream, stream).detach();
    return stream;
}

Stream* find_stream(World& w, void* handle) {
    static Stream* default_stream = nullptr;
    if (handle == nullptr) {
        if (default_stream == nullptr) default_stream = start_stream(w).get();
        return default_stream;
    }
    const auto found = w.streams.find(static_cast<Stream*>(handle));
    return found == w.streams.end() ? nullptr : found->second.get();
}

void push(World& w, Stream* stream, std::function<void(Lock&)> operation) {
    stream->queue.push_back(std::move(operation));
    w.changed.notify_all();
}

}  // namespace fake_cuda
