// The routing of the last few thousand passes, and which of them resemble the present one.
//
// What a model routes is decided by the text, and text repeats itself: the pass that follows a
// familiar pass is mostly routed as the one that followed then. So the best forecast of the next
// tokens' experts is what came after the most similar moments of the past. (On the real traces of
// gpt-oss-20b and DeepSeek-V2-Lite the continuation of the nearest past token names 45 to 80 % of
// the next token's experts, an exponential average of use 26 to 46 %; docs/policies.md.) FineMoE
// (arXiv 2502.05370) searches gate trajectories of former requests for prefetching; here the memory
// is exact, a bit per page and pass, and is filled by the running model itself.
//
// Similarity of pass s to the present one: shared experts over the layers routed so far, plus kFade
// of the similarity of their predecessors, and so on. It is kept up layer by layer, in integers, so
// every build decides alike. A layer call costs capacity popcounts per 64 experts, a few us.
// Memory: capacity x layers x ceil(experts / 64) x 8 bytes, 0.9 MB for 26 layers of 64 experts.
#pragma once

#include "policy.h"

namespace moe_offload {

class PathMemory {
  public:
    struct Neighbour {
        uint32_t similarity;  // kUnit per shared expert
        uint32_t age;         // passes ago, >= 1
        uint32_t slot;        // where it is stored
    };
    static constexpr uint32_t kUnit = 16;
    static constexpr uint32_t kFade = 51;  // of 256: 0.2 per pass; 0.1 to 0.3 are alike

    PathMemory(size_t num_layers, size_t experts_per_layer, size_t capacity);

    // A pass begins; layers it does not visit count as routed to nothing.
    void begin_pass();
    // One layer of the present pass has been routed. At most once per layer and
    // pass.
    void observe(size_t layer, std::span<const PageIndex> experts);
    // The at most `count` most similar passes, best first, among equals the one
    // stored first. Valid until the next call.
    std::span<const Neighbour> nearest(size_t count);

    size_t words() const { return words_; }
    // Passes that can be looked back to: 0 is the present one.
    size_t known() const { return known_; }
    // Experts of a layer `age` passes ago as bits; word w holds experts 64 w ..
    // 64 w + 63.
    uint64_t experts(size_t age, size_t layer, size_t word) const {
        return bits_[(layer * words_ + word) * capacity_ + slot(age)];
    }

  private:
    size_t slot(size_t age) const { return now_ >= age ? now_ - age : now_ + capacity_ - age; }

    const size_t num_layers_, words_, capacity_;
    size_t now_ = 0;                    // where the present pass is stored
    size_t known_ = 0;                  // passes stored, the present one included
    std::vector<uint64_t> bits_;        // [layers, words, capacity]
    std::vector<uint32_t> similarity_;  // [capacity] to the present pass
    std::vector<uint32_t> faded_;       // [capacity] scratch
    std::vector<uint32_t> candidates_;  // [capacity] scratch
    std::vector<uint64_t> mask_;        // [words] scratch
    std::vector<Neighbour> nearest_;
};

// How much a neighbour counts that is `behind` the nearest in similarity, when
// a layer uses num_experts: e^-0.4 for one layer's worth of experts.
float neighbour_weight(uint32_t behind, size_t num_experts);

// A request of nearly all experts of a layer (a prompt) says nothing about any
// of them.
bool is_informative(size_t num_requested, size_t num_experts);

}  // namespace moe_offload
