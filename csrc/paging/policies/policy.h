// Which resident page leaves first. A policy sees only page numbers and the order of events, no
// time and no copies, so the live pager and a replay of a recorded trace take the same decisions.
//
// Contract: `insert` when a page gets a slot, `touch` when a resident page is demanded, `erase`
// when it loses its slot. `victim` proposes a resident page for which may_evict(page) holds, or
// kNoPage; it changes nothing (the caller erases what it evicts). Not thread safe.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace moe_offload {

// Dense number of a page: layer * num_experts + expert.
using PageIndex = uint32_t;
constexpr PageIndex kNoPage = std::numeric_limits<PageIndex>::max();

class EvictionPolicy {
  public:
    using MayEvict = std::function<bool(PageIndex)>;

    virtual ~EvictionPolicy() = default;
    virtual void insert(PageIndex page) = 0;
    virtual void touch(PageIndex page) = 0;
    virtual void erase(PageIndex page) = 0;
    virtual PageIndex victim(const MayEvict& may_evict) const = 0;
    // A page that should stay rather than pass through when not all of a request can stay.
    virtual bool prefers(PageIndex) const { return false; }
};

// "lru", "lfu" or "static" (keeps `kept` resident for ever). Throws std::invalid_argument.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, size_t num_pages,
                                            const std::vector<PageIndex>& kept);

}  // namespace moe_offload
