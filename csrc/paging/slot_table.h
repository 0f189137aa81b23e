// Who lives in which slot: pages, slots, pins and the policy, and nothing about time or bytes.
//
// A pinned slot cannot be a victim: it is being read by a live ticket or written by a copy.
// Evicting a page that the present forward still needs is this field's worst bug class, so the
// rule lives in one place, here. So does the decision what becomes of a request's misses
// (`admit`): the live pager and the replay of a trace share it. Not thread safe; the pager calls
// it under its lock.
#pragma once

#include <optional>

#include "policies/policy.h"

namespace moe_offload {

using SlotIndex = int32_t;
constexpr SlotIndex kNoSlot = -1;
constexpr size_t kMinSlots = 2;  // one page can be computed while the next arrives
// Misses of one request that may stay when the policy leaves it to us: a layer's even share of the
// slots, so that a prompt that touches every expert of a layer cannot empty the others' cache.
size_t default_admit_limit(size_t num_slots, size_t num_layers);
// Slots a scan streams through, of a layer whose share is `limit`: one page is computed while the
// next ones arrive, and as many of the following layer are read while that one is not yet routed.
size_t stream_slots(size_t limit);

class SlotTable {
  public:
    struct Placement {
        SlotIndex slot;
        PageIndex evicted;  // kNoPage when the slot was free
    };
    // How one miss of a request gets its bytes.
    struct Admitted {
        int32_t item;  // position in the request
        SlotIndex slot;
        int32_t after;  // item that has the slot before and whose release starts this copy, or -1
        bool stays;     // false: passes through
    };
    // What only a live pager knows.
    struct Circumstances {
        std::function<bool(int32_t item)> hit_is_here;  // its copy has ended; null: always
        std::function<bool()> reclaim;  // frees a slot by giving up a prefetch; null: nothing to
    };

    SlotTable(size_t num_pages, size_t num_slots, std::unique_ptr<EvictionPolicy> policy);

    SlotIndex slot_of(PageIndex page) const { return slot_of_[page]; }
    PageIndex page_in(SlotIndex slot) const { return page_in_[slot]; }
    uint32_t pins(SlotIndex slot) const { return pins_[slot]; }
    size_t num_slots() const { return page_in_.size(); }
    size_t num_free() const { return free_.size(); }
    EvictionPolicy& policy() { return *policy_; }

    void touch(PageIndex page) { policy_->touch(page); }
    void pin(SlotIndex slot) { ++pins_[slot]; }
    void unpin(SlotIndex slot);

    // Tells the policy of a request and counts its pass over the model. Call it first.
    void begin_request(LayerRequest& request);

    // Decides for the misses of a request, whose hits are pinned and touched: who gets a slot to
    // stay in, who passes through whose slot. Each miss appears once, in the order copies should
    // be asked for, its slot pinned on its behalf; {} when every slot is pinned by others (or the
    // policy needs none). At most `limit` misses stay, unless the policy chooses itself: then the
    // others of a prompt pass through a few slots that are left free for the next layer's. Valid
    // until the next call. `fresh`: hits on pages that were fetched ahead and never used before. In
    // a scan or a prompt they pass through, as the misses that they would have been: they have no
    // slot of their own any more, and misses are chained behind them.
    const std::vector<Admitted>& admit(const LayerRequest& request, std::span<const int32_t> misses,
                                       std::span<const int32_t> fresh, size_t limit,
                                       const Circumstances& live);
    // Pages that lost their slot in the last `admit`.
    const std::vector<PageIndex>& evicted() const { return evicted_; }

    // Gives an absent page a slot: a free one, else the policy's victim among unpinned pages that
    // `may_evict` accepts (null: all). nullopt when there is none, or, unless `forced`, when the
    // policy holds the victim to be worth more.
    std::optional<Placement> place(PageIndex page, const EvictionPolicy::MayEvict& may_evict,
                                   bool forced);
    // As `place`, but takes free slots only.
    std::optional<SlotIndex> place_free(PageIndex page);
    // Forgets a resident page; its slot is free once nothing pins it.
    void drop(PageIndex page);

  private:
    void give(SlotIndex slot, PageIndex page);
    size_t passages(const LayerRequest& request, size_t limit) const;
    void pass_through(const LayerRequest& request, std::span<const int32_t> fresh);
    bool take(const LayerRequest& request, int32_t item, bool forced, bool from_hits,
              size_t keep_free, const Circumstances& live);
    bool open_passage(const LayerRequest& request, bool from_hits, const Circumstances& live);
    int32_t hit_of(const LayerRequest& request, PageIndex page, const Circumstances& live) const;
    PageIndex find_victim(const LayerRequest& request, PageIndex incoming, bool from_hits,
                          const Circumstances& live) const;
    SlotIndex evict(const LayerRequest& request, PageIndex victim, int32_t& after);

    std::vector<SlotIndex> slot_of_;
    std::vector<PageIndex> page_in_;
    std::vector<uint32_t> pins_;
    std::vector<SlotIndex> free_;  // lowest slot last, so it is handed out first
    std::unique_ptr<EvictionPolicy> policy_;
    uint64_t step_ = 0;
    int32_t last_layer_ = -1;

    // Scratch of admit, kept for its memory.
    std::vector<Admitted> admitted_, chains_, passing_;
    std::vector<PageIndex> evicted_;
    std::vector<std::pair<double, int32_t>> order_;  // worth, item
    std::vector<bool> missed_;                       // by item
};

}  // namespace moe_offload
