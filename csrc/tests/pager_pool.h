// A pager over fake pages, as the tests of the pager use it.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "fake_source.h"
#include "paging/host_copy_engine.h"
#include "paging/pager.h"
#include "total_counters.h"

namespace moe_offload {

inline constexpr uint64_t kBytes = 64;
inline constexpr size_t kStride = 128;  // room for shifts of up to 64

// A pager over fake pages, its slots, and checks of what is in them.
struct Pool {
    std::shared_ptr<FakeSource> source = std::make_shared<FakeSource>(kBytes, 2);
    std::vector<std::byte> slots;
    std::mutex mutex;
    std::vector<std::pair<int32_t, int32_t>> sent_back;  // guarded by mutex
    std::shared_ptr<Pager> pager;

    explicit Pool(size_t num_slots, int layers = 2, int experts = 8, int threads = 2,
                  size_t admit_limit = 0, const std::string& policy = "lru",
                  std::vector<PageIndex> kept = {}, int64_t timeout_ms = 20'000,
                  bool shifted = false, bool swap_back = false)
        : slots(num_slots * kStride, std::byte{0}) {
        PagerOptions options;
        options.num_experts.assign(size_t(layers), experts);
        options.layer_names.assign(size_t(layers), "model.experts");
        options.slots = slots.data();
        options.num_slots = num_slots;
        options.slot_stride = kStride;
        if (shifted)
            for (int32_t layer = 0; layer < layers; ++layer)
                for (int32_t expert = 0; expert < experts; ++expert)
                    options.shifts.push_back(source->shift(layer, expert));
        options.admit_limit = admit_limit;
        if (swap_back)
            options.swap_back = std::make_shared<SwapBack>(
                kBytes, [this, layers, experts](const std::byte* page, const std::byte* copy) {
                    note_sent_back(page, copy, layers, experts);
                });
        options.wait_timeout_ns = timeout_ms * 1'000'000;
        const PolicySetting setting{.num_experts = options.num_experts,
                                    .num_slots = num_slots,
                                    .kept = std::move(kept),
                                    .next_request = {}};
        pager = std::make_shared<Pager>(std::move(options), make_policy(policy, setting),
                                        std::make_unique<HostCopyEngine>(source, threads, 4096));
    }

    bool holds(SlotIndex slot, int32_t layer, int32_t expert) const {
        const uint32_t* shifts = pager->slot_shifts();
        CHECK(!shifts || shifts[slot] == source->shift(layer, expert));
        return FakeSource::holds(
            slots.data() + size_t(slot) * kStride + (shifts ? shifts[slot] : 0), kBytes, layer,
            expert);
    }

    // What leaves must be one page's bytes, from its first to its last, and be in the slot still.
    void note_sent_back(const std::byte* page, const std::byte* copy, int layers, int experts) {
        CHECK(std::memcmp(page, copy, kBytes) == 0);
        for (int32_t layer = 0; layer < layers; ++layer)
            for (int32_t expert = 0; expert < experts; ++expert)
                if (FakeSource::holds(copy, kBytes, layer, expert)) {
                    const std::lock_guard lock(mutex);
                    sent_back.emplace_back(layer, expert);
                    return;
                }
        CHECK(!"a whole page was sent back");
    }

    // One layer's forward: every page must arrive once and stay intact until it is released.
    // After each release the pages of layer `ahead` are read ahead; -1: none.
    void forward(int32_t layer, const std::vector<int32_t>& experts, int32_t num_tokens = 0,
                 int32_t ahead = -1) {
        const auto ticket = pager->acquire(layer, experts, {}, num_tokens);
        std::set<int32_t> seen;
        while (true) {
            const auto ready = ticket->next();
            if (ready.empty()) break;
            std::vector<int32_t> indices;
            for (const auto& [index, slot] : ready) {
                CHECK(seen.insert(index).second);
                CHECK(holds(slot, layer, experts[size_t(index)]));
                indices.push_back(index);
            }
            std::this_thread::yield();
            for (const auto& [index, slot] : ready)
                CHECK(holds(slot, layer, experts[size_t(index)]));
            ticket->release(indices);
            if (ahead >= 0) pager->read_ahead(ahead);
        }
        CHECK_EQ(seen.size(), experts.size());
    }

    LayerCounters total() const { return total_counters(*pager); }

    std::set<std::pair<int32_t, int32_t>> residents() const {
        std::set<std::pair<int32_t, int32_t>> pages;
        for (const auto& [layer, expert, slot] : pager->residents()) pages.emplace(layer, expert);
        return pages;
    }
};

using Pages = std::set<std::pair<int32_t, int32_t>>;

}  // namespace moe_offload
