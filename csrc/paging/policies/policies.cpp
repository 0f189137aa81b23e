#include <cmath>
#include <stdexcept>

#include "lfu.h"
#include "lru.h"
#include "static.h"

namespace moe_offload {

Lru::Lru(size_t num_pages)
    : prev_(num_pages + 1, kNoPage),
      next_(num_pages + 1, kNoPage),
      sentinel_(static_cast<PageIndex>(num_pages)) {
    prev_[sentinel_] = next_[sentinel_] = sentinel_;
}

void Lru::insert(PageIndex page) {
    const PageIndex newest = prev_[sentinel_];
    prev_[page] = newest;
    next_[page] = sentinel_;
    next_[newest] = prev_[sentinel_] = page;
}

void Lru::touch(PageIndex page) {
    erase(page);
    insert(page);
}

void Lru::erase(PageIndex page) {
    next_[prev_[page]] = next_[page];
    prev_[next_[page]] = prev_[page];
    prev_[page] = next_[page] = kNoPage;
}

PageIndex Lru::victim(const MayEvict& may_evict) const {
    for (PageIndex page = next_[sentinel_]; page != sentinel_; page = next_[page])
        if (may_evict(page)) return page;
    return kNoPage;
}

Lfu::Lfu(size_t num_pages, double half_life)
    : score_(num_pages, 0.0), resident_(num_pages, false), growth_(std::exp2(1.0 / half_life)) {}

void Lfu::use(PageIndex page) {
    weight_ *= growth_;
    score_[page] += weight_;
    if (weight_ > 1e200) rescale();
}

void Lfu::rescale() {
    order_.clear();
    for (PageIndex page = 0; page < score_.size(); ++page) {
        score_[page] /= weight_;
        if (resident_[page]) order_.emplace(score_[page], page);
    }
    weight_ = 1.0;
}

void Lfu::insert(PageIndex page) {
    use(page);
    resident_[page] = true;
    order_.emplace(score_[page], page);
}

void Lfu::touch(PageIndex page) {
    erase(page);
    insert(page);
}

void Lfu::erase(PageIndex page) {
    order_.erase({score_[page], page});
    resident_[page] = false;
}

PageIndex Lfu::victim(const MayEvict& may_evict) const {
    for (const auto& [score, page] : order_)
        if (may_evict(page)) return page;
    return kNoPage;
}

Static::Static(size_t num_pages, const std::vector<PageIndex>& kept)
    : Lru(num_pages), kept_(num_pages, false) {
    for (const PageIndex page : kept) kept_.at(page) = true;
}

PageIndex Static::victim(const MayEvict& may_evict) const {
    return Lru::victim([&](PageIndex page) { return !kept_[page] && may_evict(page); });
}

std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, size_t num_pages,
                                            const std::vector<PageIndex>& kept) {
    if (name == "lru") return std::make_unique<Lru>(num_pages);
    // Half life of ten passes over all pages: long enough to rank a domain's experts, short
    // enough to follow a change of domain within a few hundred tokens.
    if (name == "lfu") return std::make_unique<Lfu>(num_pages, 10.0 * double(num_pages));
    if (name == "static") return std::make_unique<Static>(num_pages, kept);
    throw std::invalid_argument("policy: expected one of lru, lfu, static, got " + name);
}

}  // namespace moe_offload
