// Which experts a layer will need, from what followed the most similar passes
// (PathMemory).
//
// The layers of the present pass that have been routed say which text this is:
// the pages that the coming layers used in the sixteen most similar passes are
// likely again. Needs no weights, no training and no hidden states, so it works
// for every model and on a recorded trace.
#pragma once

#include "path_memory.h"

namespace moe_offload {

class PathPredictor {
  public:
    explicit PathPredictor(std::vector<int32_t> num_experts);

    // A layer was routed to these distinct experts, numbered from 0; a layer not
    // after the previous one begins a new pass. Of several tokens: whose experts
    // are whose, as in LayerRequest. Throws std::invalid_argument for experts out
    // of range.
    void observe(int32_t layer, std::span<const int32_t> experts, int32_t num_tokens = 1,
                 std::span<const int32_t> routes = {});
    // Chance in [0, 1] that the layer's next visit uses each of its experts,
    // [num_experts[layer]], by any token. Throws std::invalid_argument for a layer
    // out of range.
    std::vector<float> predict(int32_t layer);

    size_t num_layers() const { return num_experts_.size(); }

  private:
    void check_layer(int32_t layer) const;
    // Chances by one row of the pass, into chances_.
    void predict_row(size_t row, size_t layer);

    const std::vector<int32_t> num_experts_;
    const size_t stride_;
    PathMemory memory_;
    NeighbourWeight neighbour_weight_;
    std::vector<float> average_;  // [layers, stride] of use per visit and row
    std::vector<float> chances_;  // [stride] scratch
    std::vector<PageIndex> experts_;
    size_t experts_per_row_ = 0;  // of the last layer routed
    int32_t last_layer_ = 1 << 30;
};

}  // namespace moe_offload
