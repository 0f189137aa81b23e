// Who lives in which slot: pages, slots, pins and the policy, and nothing about time or bytes.
//
// A pinned slot cannot be a victim: it is being read by a live ticket or written by a copy.
// Evicting a page that the present forward still needs is this field's worst bug class, so the
// rule lives in one place, here. Not thread safe; the pager calls it under its lock.
#pragma once

#include <optional>

#include "policies/policy.h"

namespace moe_offload {

using SlotIndex = int32_t;
constexpr SlotIndex kNoSlot = -1;

class SlotTable {
  public:
    struct Placement {
        SlotIndex slot;
        PageIndex evicted;  // kNoPage when the slot was free
    };

    SlotTable(size_t num_pages, size_t num_slots, std::unique_ptr<EvictionPolicy> policy);

    SlotIndex slot_of(PageIndex page) const { return slot_of_[page]; }
    PageIndex page_in(SlotIndex slot) const { return page_in_[slot]; }
    uint32_t pins(SlotIndex slot) const { return pins_[slot]; }
    size_t num_slots() const { return page_in_.size(); }
    size_t num_free() const { return free_.size(); }

    void touch(PageIndex page) { policy_->touch(page); }
    bool prefers(PageIndex page) const { return policy_->prefers(page); }
    void pin(SlotIndex slot) { ++pins_[slot]; }
    void unpin(SlotIndex slot);

    // Gives an absent page a slot: a free one, else the policy's victim among unpinned pages that
    // `may_evict` accepts (null: all). nullopt when there is none.
    std::optional<Placement> place(PageIndex page, const EvictionPolicy::MayEvict& may_evict);
    // Gives an absent page this slot, whatever its pins, and takes it from its present owner.
    PageIndex take_over(SlotIndex slot, PageIndex page);
    // Forgets a resident page; its slot is free once nothing pins it.
    void drop(PageIndex page);

  private:
    std::vector<SlotIndex> slot_of_;
    std::vector<PageIndex> page_in_;
    std::vector<uint32_t> pins_;
    std::vector<SlotIndex> free_;  // lowest slot last, so it is handed out first
    std::unique_ptr<EvictionPolicy> policy_;
};

}  // namespace moe_offload
