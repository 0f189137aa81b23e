// Least recently used, over all layers of the pool. A doubly linked list threaded through two
// arrays indexed by page: every operation is O(1), victim walks past pinned pages only.
#pragma once

#include "policy.h"

namespace moe_offload {

class Lru : public EvictionPolicy {
  public:
    explicit Lru(size_t num_pages);
    void insert(PageIndex page) override;
    void touch(PageIndex page) override;
    void erase(PageIndex page) override;
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override;

  private:
    // Entry num_pages is the sentinel: next_[sentinel] is the oldest, prev_[sentinel] the newest.
    std::vector<PageIndex> prev_, next_;
    PageIndex sentinel_;
};

}  // namespace moe_offload
