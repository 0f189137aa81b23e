#include "predictors/rpp_step.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "predictors/dense.h"

namespace moe_offload {
namespace {

constexpr float kEps = 1e-6F;  // of the norms, as in rpp_model.py

}  // namespace

RppPast::RppPast(const RppShape& shape, size_t batch)
    : batch_(batch),
      num_heads_(shape.num_heads),
      d_kv_(shape.d_kv),
      capacity_(shape.max_decoded),
      keys_(new float[batch * shape.inner() * shape.max_decoded]),
      values_(new float[batch * shape.inner() * shape.max_decoded]) {}

void RppPast::append(const float* qkv) {
    if (length_ == capacity_) halve();
    const size_t inner = num_heads_ * d_kv_;
    for (size_t row = 0; row < batch_; ++row)
        for (size_t i = 0; i < inner; ++i) {
            const size_t row_head = row * num_heads_ + i / d_kv_, d = i % d_kv_;
            keys_[(row_head * d_kv_ + d) * capacity_ + length_] = qkv[row * 3 * inner + inner + i];
            values_[(row_head * capacity_ + length_) * d_kv_ + d] =
                qkv[row * 3 * inner + 2 * inner + i];
        }
    ++length_;
}

// The older half leaves. Positions count by distance, so the rest is attended to as before.
void RppPast::halve() {
    const size_t kept = capacity_ / 2, begin = length_ - kept;
    for (size_t row_head = 0; row_head < batch_ * num_heads_; ++row_head) {
        for (size_t d = 0; d < d_kv_; ++d) {
            float* keys = &keys_[(row_head * d_kv_ + d) * capacity_];
            std::copy(keys + begin, keys + length_, keys);
        }
        float* values = &values_[row_head * d_kv_ * capacity_];
        std::copy(values + begin * d_kv_, values + length_ * d_kv_, values);
    }
    length_ = kept;
}

RppStep::RppStep(RppWeights weights, std::vector<RppMemory> memory, std::vector<float> hidden,
                 size_t batch, size_t prompt)
    : weights_(std::move(weights)),
      memory_(std::move(memory)),
      hidden_(std::move(hidden)),
      batch_(batch),
      prompt_(prompt) {
    const RppShape& shape = weights_.shape;
    for (size_t block = 0; block < weights_.blocks.size(); ++block)
        past_.emplace_back(shape, batch);
    x_.resize(batch * shape.d_model);
    both_.resize(batch * (shape.d_model + shape.token_width));
    qkv_.resize(batch * 3 * shape.inner());
    mixed_.resize(batch * shape.inner());
    up_.resize(batch * shape.d_ff);
    scores_.resize(std::max(prompt, shape.max_decoded));
}

void RppStep::step(std::span<const int64_t> tokens, std::span<float> logits) {
    const RppShape& shape = weights_.shape;
    const size_t d_model = shape.d_model, inner = shape.inner(), wide = d_model + shape.token_width;
    if (tokens.size() != batch_)
        throw std::invalid_argument("rpp: expected " + std::to_string(batch_) +
                                    " token ids, one per sequence, got " +
                                    std::to_string(tokens.size()));
    for (const int64_t token : tokens)
        if (token < 0 || static_cast<size_t>(token) >= shape.vocab)
            throw std::invalid_argument("rpp: expected token ids in [0, " +
                                        std::to_string(shape.vocab) + "), got " +
                                        std::to_string(token));
    for (size_t row = 0; row < batch_; ++row) {
        const auto token = static_cast<size_t>(tokens[row]);
        std::copy_n(weights_.embed + token * d_model, d_model, &x_[row * d_model]);
        std::copy_n(weights_.token + token * shape.token_width, shape.token_width,
                    &both_[row * wide + d_model]);
    }
    const ConstMatrix normed{both_.data(), wide};
    const auto times = [&](ConstMatrix x, const PackedMatrix& w, std::vector<float>& out,
                           bool add) {
        small_products().packed(x, w, out.data(), w.columns, batch_, add);
    };
    for (size_t b = 0; b < weights_.blocks.size(); ++b) {
        const RppBlock& block = weights_.blocks[b];
        const ConstMatrix mixed{mixed_.data(), inner};
        normalise();
        times(normed, block.qkv, qkv_, false);
        past_[b].append(qkv_.data());
        attend(qkv_.data(), 3 * inner, b, false);
        times(mixed, block.out, x_, true);
        normalise();
        times(normed, block.cross_q, qkv_, false);
        attend(qkv_.data(), inner, b, true);
        times(mixed, block.cross_out, x_, true);
        normalise();
        times(normed, block.up, up_, false);
        for (float& value : up_) value = std::max(value, 0.0F);
        times({up_.data(), shape.d_ff}, block.down, x_, true);
    }
    normalise();
    for (size_t row = 0; row < batch_; ++row)
        std::copy_n(weights_.bias, shape.outputs, &logits[row * shape.outputs]);
    small_products().packed(normed, weights_.head, logits.data(), shape.outputs, batch_, true);
}

// Rows of x_ at unit root mean square, beside the token embeddings; scales are in the matrices.
void RppStep::normalise() {
    const size_t d_model = weights_.shape.d_model, wide = d_model + weights_.shape.token_width;
    for (size_t row = 0; row < batch_; ++row) {
        const float* x = &x_[row * d_model];
        float power = 0.0F;
        for (size_t i = 0; i < d_model; ++i) power += x[i] * x[i];
        const float scale = 1.0F / std::sqrt(power / static_cast<float>(d_model) + kEps);
        for (size_t i = 0; i < d_model; ++i) both_[row * wide + i] = x[i] * scale;
    }
}

// mixed_ [batch, inner] from queries [batch, inner]: over the tokens so far, or over the prompt.
void RppStep::attend(const float* queries, size_t query_stride, size_t block, bool prompt) {
    const RppShape& shape = weights_.shape;
    const size_t d_kv = shape.d_kv;
    const RppPast& past = past_[block];
    const size_t length = prompt ? prompt_ : past.length();
    const size_t stride = prompt ? prompt_ : past.capacity();  // of keys
    const SmallProducts& products = small_products();
    for (size_t row_head = 0; row_head < batch_ * shape.num_heads; ++row_head) {
        const size_t row = row_head / shape.num_heads, head = row_head % shape.num_heads;
        const float* keys =
            prompt ? memory_[block].keys + row_head * d_kv * prompt_ : past.keys(row_head);
        const float* values =
            prompt ? memory_[block].values + row_head * d_kv * prompt_ : past.values(row_head);
        const float* bias = nullptr;
        if (!prompt)
            bias = weights_.positions + (head + 1) * shape.max_decoded - length;
        else if (!hidden_.empty())
            bias = &hidden_[row * prompt_];
        float* scores = scores_.data();
        products.dense({queries + row * query_stride + head * d_kv, d_kv}, {keys, stride}, scores,
                       length, 1, d_kv, length, false);
        const float sum = products.softmax(scores, bias, length);
        float* mixed = &mixed_[row * shape.inner() + head * d_kv];
        products.dense({scores, length}, {values, d_kv}, mixed, d_kv, 1, length, d_kv, false);
        for (size_t d = 0; d < d_kv; ++d) mixed[d] /= sum;
    }
}

}  // namespace moe_offload
