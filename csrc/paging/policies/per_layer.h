// Every layer has its own cache of equal size, ruled by a policy of its own: Cache-MoE
// (mixtral-offloading, arXiv 2312.17238) is PerLayer over Lru. The pool stays one; the quota is
// kept by never taking a free slot beyond it and by evicting within the layer only.
#pragma once

#include "policy.h"

namespace moe_offload {

class PerLayer final : public EvictionPolicy {
  public:
    // `make(experts)` makes the policy of one layer, which numbers its pages from 0.
    PerLayer(const PolicySetting& setting,
             const std::function<std::unique_ptr<EvictionPolicy>(size_t)>& make);
    void insert(PageIndex page) override;
    void touch(PageIndex page) override;
    void erase(PageIndex page) override;
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override;
    bool may_take_free_slot(PageIndex incoming) const override;

  private:
    struct Layer {
        std::unique_ptr<EvictionPolicy> policy;
        size_t quota = 0, resident = 0;
    };
    Layer& layer(PageIndex page) { return layers_[page / stride_]; }

    PageIndex stride_;
    std::vector<Layer> layers_;
};

}  // namespace moe_offload
