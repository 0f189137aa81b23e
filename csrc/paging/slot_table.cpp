#include "slot_table.h"

#include <algorithm>
#include <utility>

namespace moe_offload {
namespace {

constexpr size_t kFewStreamSlots = 4, kMostStreamSlots = 8;
// Of a layer's share, how much one scan may renew.
constexpr size_t kTrickle = 8;

}  // namespace

size_t default_admit_limit(size_t num_slots, size_t num_layers) {
    return std::max((num_slots + num_layers - 1) / num_layers, kMinSlots);
}

size_t stream_slots(size_t limit) {
    return std::clamp(limit / 2, kFewStreamSlots, kMostStreamSlots);
}

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

void SlotTable::begin_request(LayerRequest& request) {
    if (request.layer <= last_layer_) ++step_;
    last_layer_ = request.layer;
    request.step = step_;
    policy_->request(request);
}

const std::vector<SlotTable::Admitted>& SlotTable::admit(const LayerRequest& request,
                                                         std::span<const int32_t> misses,
                                                         std::span<const int32_t> fresh,
                                                         size_t limit, const Circumstances& live) {
    admitted_.clear();
    chains_.clear();
    passing_.clear();
    evicted_.clear();
    order_.clear();
    missed_.assign(request.pages.size(), false);
    for (const int32_t item : misses) {
        missed_[static_cast<size_t>(item)] = true;
        order_.emplace_back(policy_->worth(request.pages[static_cast<size_t>(item)]), item);
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });

    // chains_: the misses that stay, each the end of a chain of copies through its slot.
    const bool chooses = policy_->chooses();
    const size_t count = order_.size();
    limit = chooses ? count : std::min(limit, count);
    bool from_hits = policy_->evicts_hits();
    size_t staying = limit;
    if (!chooses && request.num_tokens > 1 && count > limit) {
        // A prompt or a large batch that misses more than the layer's share reads the layer once,
        // in order: what single tokens have gathered is worth more than its last pages (a scan, as
        // of a disk cache). It streams through a few slots, which are free again for the next
        // layer, and leaves behind what fits into free slots and a trickle, so that the cache
        // still follows when only large batches come. Some of those slots may hold what was read
        // ahead for it.
        const size_t stream = stream_slots(limit);
        const size_t free = free_.size() + fresh.size();
        staying = std::max(
            {size_t{1}, limit / kTrickle, free > stream ? std::min(free - stream, limit) : 0});
        limit = std::min(limit, std::max(free, stream));
        limit -= std::min(fresh.size(), limit - std::min(staying, limit));
        for (const int32_t item : fresh) {
            const PageIndex page = request.pages[static_cast<size_t>(item)];
            passing_.push_back({item, slot_of_[page], item, false});
            drop(page);
        }
    }
    const size_t share = chooses ? policy_->smallest_share(count) : limit;
    for (size_t k = 0; k < limit; ++k) {
        // A policy that chooses stops at the first that is not worth it: most valuable first.
        const int32_t item = order_[chooses ? count - 1 - k : count - limit + k].second;
        const bool forced = chains_.size() < share;
        bool taken = take(request, item, forced, from_hits, live);
        while (!taken && forced && live.reclaim && live.reclaim())
            taken = take(request, item, forced, from_hits, live);
        if (!taken && forced && !from_hits && chains_.empty() && passing_.empty()) {
            // The pool is so small that this request's own hits fill it: through their slots.
            from_hits = true;
            taken = take(request, item, forced, from_hits, live);
        }
        if (!taken) break;
        missed_[static_cast<size_t>(item)] = false;
    }
    if (chains_.empty() && passing_.empty()) return admitted_;
    for (size_t k = 0; k + staying < chains_.size(); ++k) {  // the least worth staying
        drop(request.pages[static_cast<size_t>(chains_[k].item)]);
        chains_[k].stays = false;
    }

    // Those that pass through go first, dealt to the chains in turn. Chains behind what was read
    // ahead have no page that stays at their end.
    const size_t num_taken = chains_.size();
    chains_.insert(chains_.end(), passing_.begin(), passing_.end());
    size_t next = 0;
    for (const auto& [worth, item] : order_) {
        if (!missed_[static_cast<size_t>(item)]) continue;
        Admitted& chain = chains_[next++ % chains_.size()];
        admitted_.push_back({item, chain.slot, chain.after, false});
        pin(chain.slot);
        chain.after = item;
    }
    chains_.resize(num_taken);
    admitted_.insert(admitted_.end(), chains_.begin(), chains_.end());
    return admitted_;
}

// A slot for a miss to stay in: free, or a victim's; `from_hits` also those of pages of this very
// request, which are read first.
bool SlotTable::take(const LayerRequest& request, int32_t item, bool forced, bool from_hits,
                     const Circumstances& live) {
    const PageIndex page = request.pages[static_cast<size_t>(item)];
    int32_t after = -1;
    SlotIndex slot = kNoSlot;
    const auto hit_of = [&](PageIndex candidate) {  // its item, or -1
        const auto found = std::find(request.pages.begin(), request.pages.end(), candidate);
        const auto index = static_cast<int32_t>(found - request.pages.begin());
        const bool here = found != request.pages.end() &&
                          std::none_of(chains_.begin(), chains_.end(),
                                       [&](const Admitted& a) { return a.item == index; }) &&
                          (!live.hit_is_here || live.hit_is_here(index));
        return here ? index : -1;
    };
    if (!free_.empty() && policy_->may_take_free_slot(page)) {
        slot = free_.back();
        free_.pop_back();
    } else {
        const PageIndex victim = policy_->victim(page, [&](PageIndex candidate) {
            const uint32_t pins = pins_[slot_of_[candidate]];
            return pins == 0 || (from_hits && pins == 1 && hit_of(candidate) >= 0);
        });
        if (victim == kNoPage || (!forced && !policy_->admits(page, victim))) return false;
        slot = slot_of_[victim];
        if (pins_[slot] > 0) after = hit_of(victim);
        slot_of_[victim] = kNoSlot;
        policy_->erase(victim);
        evicted_.push_back(victim);
    }
    give(slot, page);
    pin(slot);
    chains_.push_back({item, slot, after, true});
    return true;
}

void SlotTable::give(SlotIndex slot, PageIndex page) {
    page_in_[slot] = page;
    slot_of_[page] = slot;
    policy_->insert(page);
}

std::optional<SlotTable::Placement> SlotTable::place(PageIndex page,
                                                     const EvictionPolicy::MayEvict& may_evict,
                                                     bool forced) {
    if (const auto slot = place_free(page)) return Placement{*slot, kNoPage};
    const PageIndex victim = policy_->victim(page, [&](PageIndex candidate) {
        return pins_[slot_of_[candidate]] == 0 && (!may_evict || may_evict(candidate));
    });
    if (victim == kNoPage) return std::nullopt;
    if (!forced && policy_->chooses() && !policy_->admits(page, victim)) return std::nullopt;
    const SlotIndex slot = slot_of_[victim];
    slot_of_[victim] = kNoSlot;
    policy_->erase(victim);
    give(slot, page);
    return Placement{slot, victim};
}

std::optional<SlotIndex> SlotTable::place_free(PageIndex page) {
    if (free_.empty() || !policy_->may_take_free_slot(page)) return std::nullopt;
    const SlotIndex slot = free_.back();
    free_.pop_back();
    give(slot, page);
    return slot;
}

void SlotTable::drop(PageIndex page) {
    const SlotIndex slot = slot_of_[page];
    slot_of_[page] = kNoSlot;
    page_in_[slot] = kNoPage;
    policy_->erase(page);
    if (pins_[slot] == 0) free_.push_back(slot);
}

}  // namespace moe_offload
