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
// A pass has a row per sequence of the batch, because each sequence is a text of its own: the
// experts of several tokens together resemble nothing that comes again. Row i of a pass continues
// row i of the pass before. Rows of all sequences are remembered alike, so one text is recognised
// in another. A caller who does not know whose experts are whose makes one row of them.
//
// Similarity of a remembered row to a present one: shared experts over the layers routed so far,
// plus kFade of the similarity of their predecessors, and so on. It is kept up layer by layer, in
// integers, so every build decides alike. A layer call costs, for each row, capacity popcounts per
// 64 experts, a few us.
// Memory: capacity x layers x ceil(experts / 64) x 8 bytes, 0.9 MB for 26 layers of 64 experts, and
// capacity x 4 bytes for each row of a pass.
#pragma once

#include <array>

#include "policy.h"

namespace moe_offload {

class PathMemory {
  public:
    // Where a row of a pass is stored.
    using Entry = uint32_t;
    struct Neighbour {
        uint32_t similarity;  // kUnit per shared expert
        Entry entry;
    };
    static constexpr uint32_t kUnit = 16;
    static constexpr uint32_t kFade = 51;  // of 256: 0.2 per pass; 0.1 to 0.3 are alike

    // capacity: rows remembered, of all passes.
    PathMemory(size_t num_layers, size_t experts_per_layer, size_t capacity);

    // A pass of at most capacity / 2 rows begins; layers it does not visit count as routed to
    // nothing.
    void begin_pass(size_t num_rows);
    // One layer of the present pass has been routed: to these experts, and in a pass of several
    // rows by these routes (see LayerRequest; without them nothing is noted). At most once per
    // layer and pass.
    void observe(size_t layer, std::span<const PageIndex> experts, std::span<const int32_t> routes);
    // The at most `count` most similar rows of former passes, best first, among equals the one
    // stored first; {} for a row that the present pass does not have. Valid until the next call for
    // this row.
    std::span<const Neighbour> nearest(size_t row, size_t count);

    size_t num_rows() const { return num_rows_; }  // of the present pass
    size_t words() const { return words_; }
    // Experts of a layer as bits; word w holds experts 64 w .. 64 w + 63.
    uint64_t experts(Entry entry, size_t layer, size_t word) const {
        return bits_[(layer * words_ + word) * capacity_ + entry];
    }
    // The same sequence one pass later; none() when there is no such row (yet).
    Entry next(Entry entry) const { return next_[entry]; }
    Entry none() const { return static_cast<Entry>(capacity_); }

  private:
    // What is kept up for a row of the present pass. One value more than entries: none()'s is 0.
    struct Row {
        std::vector<uint32_t> similarity;  // [capacity + 1]
        std::vector<Neighbour> nearest;
    };
    bool is_present(Entry entry) const {
        return (entry >= first_ ? entry - first_ : entry + capacity_ - first_) < num_rows_;
    }
    void observe_row(size_t row, size_t layer);  // routed to mask_
    Entry entry_of(size_t row) const { return static_cast<Entry>((first_ + row) % capacity_); }

    const size_t num_layers_, experts_per_layer_, words_, capacity_;
    size_t first_ = 0;                    // entry of the present pass's first row
    size_t num_rows_ = 0;                 // of the present pass
    size_t known_ = 0;                    // entries in use, the present pass's included
    std::vector<uint64_t> bits_;          // [layers, words, capacity]
    std::vector<Entry> next_, previous_;  // [capacity] the same sequence, or none()
    std::vector<Row> rows_;               // of the largest pass so far
    std::vector<uint32_t> faded_;         // [capacity + 1] scratch
    std::vector<uint32_t> candidates_;    // [capacity] scratch
    // So few candidates are compared each with each, without a jump; more are sorted in one by one.
    static constexpr size_t kRankedAtOnce = 128;
    std::array<uint32_t, kRankedAtOnce> values_{}, ranks_{};  // scratch
    std::vector<uint64_t> mask_;                              // [words] scratch
};

// Rows of the pass that begins with this request: as many as it has tokens, if it tells whose
// experts are whose, else one.
size_t rows_of(const LayerRequest& request);

// How much a neighbour counts that is `behind` the nearest in similarity, when
// a layer uses num_experts: e^-0.4 for one layer's worth of experts. The last answers are kept,
// because sixteen exponentials a call take longer than the rest of a neighbour.
class NeighbourWeight {
  public:
    float operator()(uint32_t behind, size_t num_experts);

  private:
    struct Answer {
        uint64_t question = ~uint64_t{0};  // behind, num_experts
        float weight = 0.0F;
    };
    std::array<Answer, 512> answers_{};
};

// A request of nearly all experts of a layer (a prompt) says nothing about any
// of them.
bool is_informative(size_t num_requested, size_t num_experts);

}  // namespace moe_offload
