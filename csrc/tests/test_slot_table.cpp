// The slot table: pinned slots are nobody's victim, and bookkeeping agrees with a plain map.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "paging/slot_table.h"

using namespace moe_offload;

namespace {

PolicySetting setting(int32_t pages, std::vector<PageIndex> kept = {}) {
    return {.num_experts = {pages}, .num_slots = 4, .kept = std::move(kept), .next_request = {}};
}

void free_slots_are_handed_out_lowest_first() {
    SlotTable table(8, 3, make_policy("lru", setting(8)));
    CHECK_EQ(table.place(5, nullptr, true)->slot, 0);
    CHECK_EQ(table.place(6, nullptr, true)->slot, 1);
    CHECK_EQ(table.num_free(), 1u);
}

void pinned_slots_are_never_victims() {
    SlotTable table(8, 2, make_policy("lru", setting(8)));
    table.pin(table.place(0, nullptr, true)->slot);
    table.place(1, nullptr, true);
    const auto placed = table.place(2, nullptr, true);  // page 0 is older but pinned
    CHECK_EQ(placed->evicted, 1u);
    table.pin(placed->slot);
    CHECK(!table.place(3, nullptr, true).has_value());
    table.unpin(table.slot_of(0));
    CHECK_EQ(table.place(3, nullptr, true)->evicted, 0u);
}

void a_dropped_pinned_slot_is_free_only_after_the_last_unpin() {
    SlotTable table(4, 2, make_policy("lru", setting(4)));
    const SlotIndex slot = table.place(0, nullptr, true)->slot;
    table.pin(slot);
    table.pin(slot);
    table.drop(0);
    CHECK_EQ(table.num_free(), 1u);
    table.unpin(slot);
    CHECK_EQ(table.num_free(), 1u);
    table.unpin(slot);
    CHECK_EQ(table.num_free(), 2u);
}

// 32 experts in each of two layers, 24 slots, a share of 12: a prompt that needs a whole layer
// streams through six slots and renews one page of the share, not all of it. So it does when some
// of them hold what was read ahead.
void a_scan_leaves_most_of_the_cache() {
    SlotTable table(64, 24, make_policy("lru", setting(64)));
    for (PageIndex page = 0; page < 12; ++page) table.place(page, nullptr, true);
    for (PageIndex page = 32; page < 44; ++page) table.place(page, nullptr, true);
    std::set<PageIndex> ahead;
    const auto ask = [&](int32_t layer, int32_t num_tokens) {
        std::vector<PageIndex> pages;
        std::vector<int32_t> misses, fresh;
        std::map<int32_t, SlotIndex> hits;
        for (int32_t i = 0; i < 32; ++i) {
            pages.push_back(PageIndex(32 * layer + i));
            if (table.slot_of(pages.back()) == kNoSlot)
                misses.push_back(i);
            else
                table.pin(hits[i] = table.slot_of(pages.back()));
            if (ahead.contains(pages.back())) fresh.push_back(i);
        }
        LayerRequest request{layer, pages, {}, num_tokens, 0};
        table.begin_request(request);
        const auto admitted = table.admit(request, misses, fresh, 12, {});
        CHECK_EQ(admitted.size(), misses.size());
        std::set<SlotIndex> slots;
        size_t staying = 0;
        for (const auto& one : admitted) {
            slots.insert(one.slot);
            staying += one.stays;
            CHECK_EQ(one.stays, table.slot_of(pages[size_t(one.item)]) == one.slot);
        }
        for (const auto& one : admitted) table.unpin(one.slot);
        for (const int32_t item : fresh) CHECK_EQ(table.slot_of(pages[size_t(item)]), kNoSlot);
        for (const auto& [item, slot] : hits) table.unpin(slot);
        return std::tuple(misses.size(), slots.size(), staying);
    };
    using Seen = std::tuple<size_t, size_t, size_t>;  // missing, slots used, staying
    CHECK(ask(0, 512) == Seen(20, 6, 1));
    CHECK_EQ(table.num_free(), 5u);
    CHECK(ask(1, 512) ==
          Seen(26, 6, 1));  // the six oldest of layer 1 had to go, one free slot less
    CHECK_EQ(table.num_free(), 5u);
    for (PageIndex page = 32; ahead.size() < 5; ++page)
        if (table.slot_of(page) == kNoSlot && table.place_free(page)) ahead.insert(page);
    CHECK_EQ(table.num_free(), 0u);
    CHECK(ask(1, 512) == Seen(20, 6, 1));  // they went on to misses, one more slot was taken
    CHECK_EQ(table.num_free(), 5u);
    CHECK(ask(0, 1) == Seen(21, 12, 12));  // one token: its share, as ever
}

// Keeps what is resident, oldest out first when it must.
class Stubborn final : public EvictionPolicy {
  public:
    void insert(PageIndex page) override { pages_.push_back(page); }
    void touch(PageIndex) override {}
    void erase(PageIndex page) override { std::erase(pages_, page); }
    PageIndex victim(PageIndex, const MayEvict& may_evict) const override {
        const auto found = std::find_if(pages_.begin(), pages_.end(), may_evict);
        return found == pages_.end() ? kNoPage : *found;
    }
    bool chooses() const override { return true; }
    bool admits(PageIndex, PageIndex) const override { return false; }

  private:
    std::vector<PageIndex> pages_;
};

// 64 slots, three layers of 60 experts, all slots with pages of the last. A prompt's misses pass
// through four of them, which stay free for the next layer's: nobody else leaves. A token's stay in
// what is free; else two of many do.
void a_prompts_misses_pass_through_slots_that_stay_free() {
    SlotTable table(180, 64, std::make_unique<Stubborn>());
    for (PageIndex page = 116; page < 180; ++page) table.place(page, nullptr, true);
    const auto ask = [&](int32_t layer, size_t count, int32_t num_tokens) {
        std::vector<PageIndex> pages;
        std::vector<int32_t> misses;
        for (size_t i = 0; i < count; ++i) {
            pages.push_back(PageIndex(60 * layer) + PageIndex(i));
            misses.push_back(int32_t(i));
        }
        LayerRequest request{layer, pages, {}, num_tokens, 0};
        table.begin_request(request);
        const auto admitted = table.admit(request, misses, {}, 22, {});
        CHECK_EQ(admitted.size(), count);
        std::map<SlotIndex, int32_t> last;  // item in the slot before
        for (const auto& one : admitted) {
            CHECK_EQ(one.after, last.contains(one.slot) ? last[one.slot] : -1);
            last[one.slot] = one.item;
        }
        for (const auto& one : admitted) table.unpin(one.slot);
        return last.size();
    };
    CHECK_EQ(ask(0, 50, 100), 4u);
    CHECK_EQ(table.evicted().size(), 4u);
    CHECK_EQ(table.num_free(), 4u);
    CHECK_EQ(ask(1, 50, 100), 4u);
    CHECK_EQ(table.evicted().size(), 0u);
    CHECK_EQ(table.num_free(), 4u);
    CHECK_EQ(ask(0, 3, 100), 3u);  // no more passages than misses
    CHECK_EQ(table.num_free(), 4u);
    CHECK_EQ(ask(1, 3, 1), 3u);  // they stay, in free slots
    CHECK_EQ(table.num_free(), 1u);
    CHECK_EQ(ask(0, 8, kMaxRoutedTokens), 2u);
}

void random_operations_agree_with_a_map() {
    constexpr PageIndex kPages = 20;
    constexpr size_t kSlots = 6;
    for (const char* policy : {"lru", "lfu", "static"}) {
        SlotTable table(kPages, kSlots, make_policy(policy, setting(kPages, {1, 2})));
        std::map<PageIndex, SlotIndex> resident;
        std::map<SlotIndex, int> pins;
        std::mt19937 random(7);
        for (int step = 0; step < 20000; ++step) {
            const auto page = static_cast<PageIndex>(random() % kPages);
            if (!resident.contains(page)) {
                const auto placed = table.place(page, nullptr, true);
                if (!placed) continue;
                if (placed->evicted != kNoPage) {
                    CHECK_EQ(resident.at(placed->evicted), placed->slot);
                    CHECK_EQ(pins[placed->slot], 0);
                    resident.erase(placed->evicted);
                }
                for (const auto& [other, slot] : resident) CHECK(slot != placed->slot);
                resident[page] = placed->slot;
            } else if (const SlotIndex slot = resident[page]; random() % 3 == 0) {
                table.pin(slot), ++pins[slot];
            } else if (pins[slot] > 0) {
                table.unpin(slot), --pins[slot];
            } else if (random() % 4 == 0) {
                table.drop(page), resident.erase(page);
            } else {
                table.touch(page);
            }
            for (PageIndex p = 0; p < kPages; ++p)
                CHECK_EQ(table.slot_of(p), resident.contains(p) ? resident[p] : kNoSlot);
        }
    }
}

}  // namespace

int main() {
    RUN(free_slots_are_handed_out_lowest_first);
    RUN(pinned_slots_are_never_victims);
    RUN(a_dropped_pinned_slot_is_free_only_after_the_last_unpin);
    RUN(a_scan_leaves_most_of_the_cache);
    RUN(a_prompts_misses_pass_through_slots_that_stay_free);
    RUN(random_operations_agree_with_a_map);
}
