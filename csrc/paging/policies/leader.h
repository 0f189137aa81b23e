// `auto`: does what the best of several policies would have done on this very model.
//
// Each candidate runs a shadow cache, the same SlotTable with page numbers and no bytes, on the
// requests as they come. The one with the fewest recent misses leads, and the real cache follows
// its shadow: pages the leader does not hold leave first, pages it holds stay. When nothing
// changes for a while the two hold the same pages, so the real misses are the leader's; a change of
// leader costs nothing at once, the caches drift together by the misses that happen anyway. The
// lead passes only to a clearly better candidate. (Follow the leader, as in set
// duelling: counts only, nothing random.)
//
// So where the text gives a forecast nothing to learn from the cache becomes an LRU; elsewhere it
// is `learned`, from the first token on.
#pragma once

#include "../slot_table.h"
#include "learned.h"

namespace moe_offload {

class Leader final : public KeepsPrefetched {
  public:
    explicit Leader(const PolicySetting& setting);
    ~Leader() override;
    void request(const LayerRequest& request) override;
    void sequence_begins() override;
    bool evicts_hits() const override { return true; }
    bool uses_routes() const override { return true; }
    // A second slot would be one that the leader kept.
    size_t smallest_share(size_t) const override { return 1; }

    // As Ranked's: what neither the leader holds nor a prefetch brought leaves first, so that most
    // evictions compare a handful of pages.
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override;

    const std::string& leading() const { return candidates_[leader_].name; }

  private:
    double demand_worth(PageIndex page) const override;
    // A missed page that the leader does not hold either may take the place of
    // another such: it need not wait for a slot to pass through then.
    bool demand_admits(PageIndex, PageIndex victim) const override { return !holds(victim); }

    struct Candidate {
        std::string name;
        std::unique_ptr<SlotTable> shadow;
        double misses = 0.0;  // recent ones: fading with kMemory passes
    };
    bool holds(PageIndex page) const {
        return candidates_[leader_].shadow->slot_of(page) != kNoSlot;
    }
    size_t run(SlotTable& shadow, const LayerRequest& request);

    std::vector<Candidate> candidates_;
    size_t leader_ = 0;
    const Learned* learned_ = nullptr;  // owned by its shadow
    const size_t admit_limit_;
    uint64_t step_ = 0;
    std::vector<int32_t> misses_;  // scratch
    std::vector<SlotIndex> pinned_;
};

}  // namespace moe_offload
