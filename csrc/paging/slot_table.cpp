#include "slot_table.h"

#include <utility>

namespace moe_offload {

SlotTable::SlotTable(size_t num_pages, size_t num_slots, std::unique_ptr<EvictionPolicy> policy)
    : slot_of_(num_pages, kNoSlot),
      page_in_(num_slots, kNoPage),
      pins_(num_slots, 0),
      policy_(std::move(policy)) {
    free_.reserve(num_slots);
    for (size_t slot = num_slots; slot > 0; --slot)
        free_.push_back(static_cast<SlotIndex>(slot - 1));
}

void SlotTable::unpin(SlotIndex slot) {
    if (--pins_[slot] == 0 && page_in_[slot] == kNoPage) free_.push_back(slot);
}

std::optional<SlotTable::Placement> SlotTable::place(PageIndex page,
                                                     const EvictionPolicy::MayEvict& may_evict) {
    Placement placement{kNoSlot, kNoPage};
    if (!free_.empty()) {
        placement.slot = free_.back();
        free_.pop_back();
    } else {
        placement.evicted = policy_->victim([&](PageIndex candidate) {
            return pins_[slot_of_[candidate]] == 0 && (!may_evict || may_evict(candidate));
        });
        if (placement.evicted == kNoPage) return std::nullopt;
        placement.slot = slot_of_[placement.evicted];
        slot_of_[placement.evicted] = kNoSlot;
        policy_->erase(placement.evicted);
    }
    page_in_[placement.slot] = page;
    slot_of_[page] = placement.slot;
    policy_->insert(page);
    return placement;
}

PageIndex SlotTable::take_over(SlotIndex slot, PageIndex page) {
    const PageIndex owner = page_in_[slot];
    if (owner != kNoPage) {
        slot_of_[owner] = kNoSlot;
        policy_->erase(owner);
    }
    page_in_[slot] = page;
    slot_of_[page] = slot;
    policy_->insert(page);
    return owner;
}

void SlotTable::drop(PageIndex page) {
    const SlotIndex slot = slot_of_[page];
    slot_of_[page] = kNoSlot;
    page_in_[slot] = kNoPage;
    policy_->erase(page);
    if (pins_[slot] == 0) free_.push_back(slot);
}

}  // namespace moe_offload
