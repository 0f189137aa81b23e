// Where a page goes that another one takes the slot of, for caches that send evicted experts back.
//
// Pages are read-only, so nothing needs that copy and nobody reads it: it exists to pay what the
// systems pay whose caches swap an expert in against one out (mixtral-offloading, ExpertFlow's
// Cache-MoE). As there, the page leaves before a byte of its successor comes.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace moe_offload {

class SwapBack {
  public:
    // What a test looks at: the page where it lay and its copy, before the slot is written.
    using Observer = std::function<void(const std::byte* page, const std::byte* copy)>;

    // page_bytes >= 1, gaps between a page's sections included.
    explicit SwapBack(size_t page_bytes, Observer observer = nullptr);

    size_t page_bytes() const { return page_bytes_; }
    // Copies a page to host memory: a buffer for each thread that is here at once, made when first
    // needed. Any thread. Throws std::bad_alloc.
    void send(const std::byte* page);

  private:
    using Buffer = std::unique_ptr<std::byte[]>;

    const size_t page_bytes_;
    const Observer observer_;
    std::mutex mutex_;
    std::vector<Buffer> idle_;
};

}  // namespace moe_offload
