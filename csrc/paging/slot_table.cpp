#include "slot_table.h"

#include <algorithm>
#include <utility>

namespace moe_offload {
namespace {

constexpr size_t kFewStreamSlots = 4, kMostStreamSlots = 8;
constexpr size_t kSlotsPerPassage = 16;
// Of a layer's share, how much one scan may renew.
constexpr size_t kTrickle = 8;

}  // namespace

size_t default_admit_limit(size_t num_slots, size_t num_layers) {
    return std::max((num_slots + num_layers - 1) / num_layers, kMinSlots);
}

size_t stream_slots(size_t limit) {
    return std::clamp(limit / 2, kFewStreamSlots, kMostStreamSlots);
}

// If the policy chooses which misses stay, those of a prompt pass through so many slots at least:
// copies overlap with one another and with the arithmetic, and the next layer's can begin. Left
// free from call to call, they would cost batches of a few tokens more misses than they save time.
size_t SlotTable::passages(const LayerRequest& request, size_t limit) const {
    if (request.num_tokens <= kMaxRoutedTokens ||
        policy_->smallest_share(request.pages.size()) == 0)
        return 0;
    return std::clamp(pins_.size() / kSlotsPerPassage, kMinSlots, stream_slots(limit));
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
    const size_t count = order_.size(), limit_given = limit;
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
        pass_through(request, fresh);
    }
    const size_t stream = chooses ? passages(request, limit_given) : 0;
    if (stream > 0) pass_through(request, fresh);
    const size_t share = chooses && stream == 0 ? policy_->smallest_share(count) : limit;
    const auto forced_to = [&](bool forced, auto&& get) {
        bool taken = get();
        while (!taken && forced && live.reclaim && live.reclaim()) taken = get();
        if (!taken && forced && !from_hits && chains_.empty() && passing_.empty()) {
            // The pool is so small that this request's own hits fill it: through their slots.
            from_hits = true;
            taken = get();
        }
        return taken;
    };
    for (size_t k = 0; k < limit; ++k) {
        // A policy that chooses stops at the first that is not worth it: most valuable first.
        const int32_t item = order_[chooses ? count - 1 - k : count - limit + k].second;
        const bool forced = stream == 0 && chains_.size() < share;
        const bool taken =
            forced_to(forced, [&] { return take(request, item, forced, from_hits, stream, live); });
        if (!taken) break;
        missed_[static_cast<size_t>(item)] = false;
    }
    while (passing_.size() < stream && chains_.size() + passing_.size() < count &&
           forced_to(true, [&] { return open_passage(request, from_hits, live); }))
        continue;
    if (chains_.empty() && passing_.empty()) return admitted_;
    for (size_t k = 0; k + staying < chains_.size(); ++k) {  // the least worth staying
        drop(request.pages[static_cast<size_t>(chains_[k].item)]);
        chains_[k].stays = false;
    }

    // Those that pass through go first, dealt to the chains in turn. Chains behind what was read
    // ahead, and passages, have no page that stays at their end, so they come first.
    const size_t num_taken = chains_.size();
    chains_.insert(chains_.end(), passing_.begin(), passing_.end());
    size_t next = num_taken;
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

// Pages fetched ahead, as the misses that they would have been: others follow in their slots.
void SlotTable::pass_through(const LayerRequest& request, std::span<const int32_t> fresh) {
    for (const int32_t item : fresh) {
        const PageIndex page = request.pages[static_cast<size_t>(item)];
        passing_.push_back({item, slot_of_[page], item, false});
        drop(page);
    }
}

// A slot for a miss to stay in: free, if more than `keep_free` are, or a victim's; `from_hits` also
// those of pages of this very request, which are read first.
bool SlotTable::take(const LayerRequest& request, int32_t item, bool forced, bool from_hits,
                     size_t keep_free, const Circumstances& live) {
    const PageIndex page = request.pages[static_cast<size_t>(item)];
    int32_t after = -1;
    SlotIndex slot = kNoSlot;
    if (free_.size() > keep_free && policy_->may_take_free_slot(page)) {
        slot = free_.back();
        free_.pop_back();
    } else {
        const PageIndex victim = find_victim(request, page, from_hits, live);
        if (victim == kNoPage || (!forced && !policy_->admits(page, victim))) return false;
        slot = evict(request, victim, after);
    }
    give(slot, page);
    pin(slot);
    chains_.push_back({item, slot, after, true});
    return true;
}

// A slot that misses pass through, for the lowest page's sake if need be; free again afterwards.
bool SlotTable::open_passage(const LayerRequest& request, bool from_hits,
                             const Circumstances& live) {
    Admitted passage{-1, kNoSlot, -1, false};
    if (!free_.empty()) {
        passage.slot = free_.back();
        free_.pop_back();
    } else {
        const auto next = std::find_if(order_.rbegin(), order_.rend(), [&](const auto& miss) {
            return missed_[static_cast<size_t>(miss.second)];
        });
        const PageIndex page = request.pages[static_cast<size_t>(next->second)];
        const PageIndex victim = find_victim(request, page, from_hits, live);
        if (victim == kNoPage) return false;
        passage.slot = evict(request, victim, passage.after);
        page_in_[passage.slot] = kNoPage;
    }
    passing_.push_back(passage);
    return true;
}

// Of a page of this request that is here and not given away yet: its item; else -1.
int32_t SlotTable::hit_of(const LayerRequest& request, PageIndex page,
                          const Circumstances& live) const {
    const auto found = std::find(request.pages.begin(), request.pages.end(), page);
    const auto index = static_cast<int32_t>(found - request.pages.begin());
    const bool here = found != request.pages.end() &&
                      std::none_of(chains_.begin(), chains_.end(),
                                   [&](const Admitted& a) { return a.item == index; }) &&
                      (!live.hit_is_here || live.hit_is_here(index));
    return here ? index : -1;
}

PageIndex SlotTable::find_victim(const LayerRequest& request, PageIndex incoming, bool from_hits,
                                 const Circumstances& live) const {
    return policy_->victim(incoming, [&](PageIndex candidate) {
        const uint32_t pins = pins_[slot_of_[candidate]];
        return pins == 0 || (from_hits && pins == 1 && hit_of(request, candidate, live) >= 0);
    });
}

// The slot of a page that leaves; `after`: the item that is read from it before, or -1.
SlotIndex SlotTable::evict(const LayerRequest& request, PageIndex victim, int32_t& after) {
    const SlotIndex slot = slot_of_[victim];
    if (pins_[slot] > 0) after = hit_of(request, victim, {});
    slot_of_[victim] = kNoSlot;
    policy_->erase(victim);
    evicted_.push_back(victim);
    return slot;
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
