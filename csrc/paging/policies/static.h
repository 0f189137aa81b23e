// A fixed set stays once it is resident; everything else shares the remaining slots, least
// recently used first. The simplest policy a popularity profile can drive (Fiddler, KTransformers),
// and the yardstick for adaptive ones.
#pragma once

#include "lru.h"

namespace moe_offload {

class Static final : public Lru {
  public:
    Static(size_t num_pages, const std::vector<PageIndex>& kept);
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override;
    double worth(PageIndex page) const override { return kept_[page] ? 1.0 : 0.0; }

  private:
    std::vector<bool> kept_;
};

}  // namespace moe_offload
