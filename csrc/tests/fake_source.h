// A page source tests can steer: pages of known content, copies that wait at a gate or fail.
#pragma once

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

#include "paging/errors.h"
#include "paging/page_source.h"

namespace moe_offload {

class FakeSource final : public PageSource {
  public:
    FakeSource(uint64_t page_bytes, size_t chunks_per_page = 1)
        : page_bytes_(page_bytes), chunks_per_page_(chunks_per_page) {}

    // Every byte of a page tells which page it is of.
    static unsigned char content(int32_t layer, int32_t expert) {
        return static_cast<unsigned char>(1 + layer * 37 + expert * 5);
    }
    static bool holds(const std::byte* slot, uint64_t nbytes, int32_t layer, int32_t expert) {
        for (uint64_t i = 0; i < nbytes; ++i)
            if (slot[i] != std::byte{content(layer, expert)}) return false;
        return true;
    }

    // Where pages begin when a pager was told to shift them; several for each residue.
    uint32_t shift(int32_t layer, int32_t expert) const override {
        return kShiftUnit * static_cast<uint32_t>((layer * 5 + expert * 3) % 8);
    }

    // While closed, copies wait before they move a byte.
    void set_gate(bool open) {
        const std::lock_guard lock(mutex_);
        open_ = open;
        changed_.notify_all();
    }
    void set_failing(int32_t layer, int32_t expert, bool failing) {
        const std::lock_guard lock(mutex_);
        failing ? void(failing_.emplace(layer, expert)) : void(failing_.erase({layer, expert}));
    }
    // Waits until that many chunks have reached the gate, ever.
    void wait_for_arrivals(int count) const {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return arrivals_ >= count; });
    }
    std::vector<std::pair<int32_t, int32_t>> order() const {
        const std::lock_guard lock(mutex_);
        return order_;
    }

    std::vector<Chunk> chunks(int32_t, int32_t, size_t) const override {
        std::vector<Chunk> chunks;
        const uint64_t step = page_bytes_ / chunks_per_page_;
        for (size_t i = 0; i < chunks_per_page_; ++i)
            chunks.push_back({0, i * step, step, {{0, step, i * step}}});
        return chunks;
    }

    uint64_t read(int32_t layer, int32_t expert, const Chunk& chunk, std::byte* page,
                  Scratch&) const override {
        {
            std::unique_lock lock(mutex_);
            ++arrivals_;
            order_.emplace_back(layer, expert);
            changed_.notify_all();
            changed_.wait(lock, [this] { return open_; });
            if (failing_.contains({layer, expert})) throw PageReadError("the disk is on fire");
        }
        std::memset(page + chunk.offset, content(layer, expert), chunk.nbytes);
        return chunk.nbytes;
    }

  private:
    const uint64_t page_bytes_;
    const size_t chunks_per_page_;
    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;
    bool open_ = true;
    std::set<std::pair<int32_t, int32_t>> failing_;
    mutable int arrivals_ = 0;
    mutable std::vector<std::pair<int32_t, int32_t>> order_;  // of chunks, as they were started
};

}  // namespace moe_offload
