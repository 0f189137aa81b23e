// The Routing Path Predictor's decoder, one token per sequence and call, in the calling thread.
//
// What moe_offload/predictors/rpp_model.py computes for whole sequences at once, for the newest
// position only: keys and values of earlier ones are kept, the scales of the norms are folded into
// the matrices behind them, and these are rounded to bfloat16. 0.47 M multiply-adds per sequence at
// the default shape.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "predictors/dense.h"

namespace moe_offload {

struct RppShape {
    size_t vocab = 0, d_model = 0, d_ff = 0, num_heads = 0, d_kv = 0, token_width = 0;
    size_t outputs = 0;      // layers x experts
    size_t max_decoded = 0;  // positions kept; when they are full the older half leaves
    size_t inner() const { return num_heads * d_kv; }
};

// Row vectors times these: [in, out]. The caller keeps them.
struct RppBlock {
    PackedMatrix qkv;        // [d_model, 3 inner]
    PackedMatrix out;        // [inner, d_model]
    PackedMatrix cross_q;    // [d_model, inner]
    PackedMatrix cross_out;  // [inner, d_model]
    PackedMatrix up;         // [d_model, d_ff]
    PackedMatrix down;       // [d_ff, d_model]
};

struct RppWeights {
    RppShape shape;
    const float* embed;      // [vocab, d_model]
    const float* token;      // [vocab, token_width], straight to the head
    PackedMatrix head;       // [d_model + token_width, outputs]
    const float* bias;       // [outputs]
    const float* positions;  // [num_heads, max_decoded], the last column is distance 0
    std::vector<RppBlock> blocks;
};

// What a block attends to of the prompt; the caller keeps it.
struct RppMemory {
    const float* keys;    // [batch, num_heads, d_kv, prompt]
    const float* values;  // [batch, num_heads, prompt, d_kv]
};

// Keys and values of the tokens decoded so far, of one block.
class RppPast {
  public:
    RppPast(const RppShape& shape, size_t batch);
    // Takes the newest position's key and value from rows of qkv [batch, 3 inner].
    void append(const float* qkv);
    size_t length() const { return length_; }
    // [d_kv, length()], rows capacity() apart, and [length(), d_kv], of one row and head.
    const float* keys(size_t row_head) const { return &keys_[row_head * d_kv_ * capacity_]; }
    const float* values(size_t row_head) const { return &values_[row_head * d_kv_ * capacity_]; }
    size_t capacity() const { return capacity_; }

  private:
    void halve();

    const size_t batch_, num_heads_, d_kv_, capacity_;
    size_t length_ = 0;
    std::unique_ptr<float[]> keys_, values_;  // pages of memory are touched as tokens come
};

class RppStep {
  public:
    // hidden: [batch, prompt] added to the scores of prompt positions, empty for none.
    RppStep(RppWeights weights, std::vector<RppMemory> memory, std::vector<float> hidden,
            size_t batch, size_t prompt);

    // [batch] ids just generated -> logits [batch, outputs] of the experts that feeding them uses.
    // Throws std::invalid_argument for an id outside the vocabulary or another number of ids.
    void step(std::span<const int64_t> tokens, std::span<float> logits);
    size_t batch() const { return batch_; }
    const RppShape& shape() const { return weights_.shape; }

  private:
    void normalise();
    void attend(const float* queries, size_t query_stride, size_t block, bool prompt);

    const RppWeights weights_;
    const std::vector<RppMemory> memory_;
    const std::vector<float> hidden_;
    const size_t batch_, prompt_;
    std::vector<RppPast> past_;
    // Scratch: residual stream, its normalised copy beside the token's own embedding, and so on.
    std::vector<float> x_, both_, qkv_, mixed_, up_, scores_;
};

}  // namespace moe_offload
