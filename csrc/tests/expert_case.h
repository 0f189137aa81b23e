// A random MoE layer for the emulated kernels, and its answer in double by the plainest loops.
//
// Everything a kernel could read by mistake is poison: unused slots, rows past a section's end
// (the buffers are exact allocations, so the address sanitizer sees an overrun), all outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "expert_gemm/cuda/params.h"
#include "quantised_section.h"
#include "simt/simt.h"

namespace expert_case {

using moe_offload::Group;
using moe_offload::cuda::Activation;
using moe_offload::cuda::ExpertParams;
using moe_offload::cuda::WeightFormat;

struct Shape {
    const char* name;
    int tokens, top_k, experts, hidden, inner;
    bool gated = true, interleaved = false, bias = false;
    Activation activation = Activation::silu;
    // Which experts a route may choose, by route and a random number; empty: any.
    std::function<int(int route, uint64_t random)> choose = {};
    WeightFormat format = WeightFormat::plain;
    int log2_group = 5;  // of int4_group
};

inline float quiet_nan() { return std::nanf(""); }

template <class T>
struct Case {
    Shape shape;
    std::vector<T> x, inner, out, partial16;
    std::vector<float> weights, partial;
    std::vector<int32_t> route_of_row, row_of_route, ids, tickets, slot_of;
    std::vector<Group> groups;
    std::vector<unsigned char> slab;
    ExpertParams params{};
    std::vector<double> want;       // [T, H]
    std::vector<double> magnitude;  // [T, H], sum of the absolute values that were added

    Case(const Shape& s, uint64_t seed) : shape(s) {
        std::mt19937_64 random(seed);
        std::normal_distribution<float> normal;
        const int routes = s.tokens * s.top_k;
        auto fill = [&](std::vector<T>& v, size_t count, float scale) {
            v.resize(count);
            for (T& value : v) value = {simt::from_float<T>(normal(random) * scale)};
        };
        fill(x, size_t(s.tokens) * s.hidden, 1.0f);
        weights.resize(routes);
        for (float& w : weights) w = 0.1f + std::abs(normal(random));

        // Routes: distinct experts per token, -1 among them now and then.
        ids.assign(routes, -1);
        for (int t = 0; t < s.tokens; ++t)
            for (int a = 0; a < s.top_k; ++a)
                for (int attempt = 0; attempt < 64; ++attempt) {
                    const int route = t * s.top_k + a;
                    const int id = s.choose ? s.choose(route, random()) : int(random() % s.experts);
                    const auto begin = ids.begin() + t * s.top_k;
                    if (id >= 0 && std::find(begin, begin + a, id) != begin + a) continue;
                    ids[route] = id;
                    break;
                }
        row_of_route.assign(routes, -1);
        for (int e = 0; e < s.experts; ++e) {
            const int first = int(route_of_row.size());
            for (int r = 0; r < routes; ++r)
                if (ids[r] == e) {
                    row_of_route[r] = int(route_of_row.size());
                    route_of_row.push_back(r);
                }
            if (int(route_of_row.size()) > first)
                groups.push_back({first, int(route_of_row.size()), e});
        }
        route_of_row.resize(routes, 0x7fffffff);

        // Pages in shuffled slots, one slot in three empty (NaN).
        const int num_slots = s.experts + s.experts / 2 + 1;
        std::vector<int32_t> order(num_slots);
        for (int i = 0; i < num_slots; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), random);
        slot_of.assign(order.begin(), order.begin() + s.experts);
        const int up_rows = (s.gated ? 2 : 1) * s.inner;
        const auto& pages = params.pages;
        const QuantisedMatrix up = matrix(true), down = matrix(false);
        lay_out_pages();
        for (int e = 0; e < s.experts; ++e) {
            unsigned char* page = slab.data() + slot_of[e] * pages.slot_stride;
            auto normal_section = [&](int64_t offset, size_t count, float scale) {
                if (offset < 0) return;
                std::vector<T> v;
                fill(v, count, scale);
                std::memcpy(page + offset, v.data(), count * 2);
            };
            if (s.format == WeightFormat::plain) {
                normal_section(0, size_t(up_rows) * s.hidden, 1.0f / std::sqrt(float(s.hidden)));
                normal_section(pages.down_offset, size_t(s.hidden) * s.inner,
                               1.0f / std::sqrt(float(s.inner)));
            } else {
                up.fill(page + pages.up_offset, page + pages.up_scale_offset, random);
                down.fill(page + pages.down_offset, page + pages.down_scale_offset, random);
            }
            normal_section(pages.up_bias_offset, up_rows, 0.5f);
            normal_section(pages.down_bias_offset, s.hidden, 0.5f);
        }
        params.num_tokens = s.tokens;
        params.top_k = s.top_k;
        params.hidden = s.hidden;
        params.inner_size = s.inner;
        params.dtype = std::is_same_v<T, simt::bf16> ? moe_offload::cuda::DType::bf16
                                                     : moe_offload::cuda::DType::f16;
        params.activation = s.activation;
        params.gated = s.gated;
        params.interleaved = s.interleaved;
        params.alpha = 1.702f;
        params.limit = 1.5f;
        params.offset = 1.0f;
        tickets.assign((s.hidden + 31) / 32, 0);
        poison();
    }

    // Sections of a page one after another, and an empty (NaN) slab of them.
    void lay_out_pages() {
        auto& pages = params.pages;
        pages.format = shape.format;
        pages.log2_group = shape.log2_group;
        const QuantisedMatrix up = matrix(true), down = matrix(false);
        int64_t end = 0;
        auto section = [&](int64_t bytes) {
            const int64_t start = (end + 255) / 256 * 256;
            end = start + bytes;
            return start;
        };
        pages.up_offset = section(up.code_bytes());
        pages.down_offset = section(down.code_bytes());
        pages.up_bias_offset = shape.bias ? section(up.rows * 2) : -1;
        pages.down_bias_offset = shape.bias ? section(down.rows * 2) : -1;
        pages.up_scale_offset = section(up.scale_bytes());
        pages.down_scale_offset = section(down.scale_bytes());
        pages.slot_stride = (end + 255) / 256 * 256;
        const int num_slots = shape.experts + shape.experts / 2 + 1;
        slab.assign((num_slots - 1) * pages.slot_stride + end, 0xff);
    }

    // After the vectors have moved.
    void point() {
        params.pages.slab = slab.data();
        params.pages.page_table = nullptr;
        params.pages.slot_of = slot_of.data();
        params.x = x.data();
        params.route_of_row = route_of_row.data();
        params.row_of_route = row_of_route.data();
        params.topk_weights = weights.data();
        params.groups = groups.data();
        params.max_groups = int(groups.size());
        params.tickets = tickets.data();
        params.inner = inner.data();
        params.partial = partial.data();
        params.out = out.data();
    }

    // The same layer with plain pages: each weight rounded once to T.
    Case dequantised() const {
        Case plain(*this);
        plain.shape.format = WeightFormat::plain;
        plain.lay_out_pages();
        const auto &from = params.pages, &to = plain.params.pages;
        for (int e = 0; e < shape.experts; ++e) {
            const unsigned char* page = slab.data() + slot_of[e] * from.slot_stride;
            unsigned char* plain_page = plain.slab.data() + slot_of[e] * to.slot_stride;
            for (bool is_up : {true, false}) {
                const QuantisedMatrix m = matrix(is_up);
                const auto codes = page + (is_up ? from.up_offset : from.down_offset);
                const auto scales = page + (is_up ? from.up_scale_offset : from.down_scale_offset);
                const auto bias = is_up ? from.up_bias_offset : from.down_bias_offset;
                unsigned char* out = plain_page + (is_up ? to.up_offset : to.down_offset);
                for (int row = 0; row < m.rows; ++row)
                    for (int k = 0; k < m.columns; ++k, out += 2) {
                        const uint16_t bits = m.narrow(m.weight(codes, scales, row, k));
                        std::memcpy(out, &bits, 2);
                    }
                if (bias >= 0)
                    std::memcpy(plain_page + (is_up ? to.up_bias_offset : to.down_bias_offset),
                                page + bias, m.rows * 2);
            }
        }
        plain.poison();
        plain.point();
        return plain;
    }

    // The same layer with matrices stored [k, rows].
    Case transposed() const {
        CHECK(shape.format == WeightFormat::plain);
        Case other(*this);
        other.params.pages.transposed = true;
        for (int e = 0; e < shape.experts; ++e)
            for (bool is_up : {true, false}) {
                const QuantisedMatrix m = matrix(is_up);
                const int64_t at = slot_of[e] * params.pages.slot_stride +
                                   (is_up ? params.pages.up_offset : params.pages.down_offset);
                for (int row = 0; row < m.rows; ++row)
                    for (int k = 0; k < m.columns; ++k)
                        std::memcpy(&other.slab[at + (int64_t(k) * m.rows + row) * 2],
                                    &slab[at + (int64_t(row) * m.columns + k) * 2], 2);
            }
        other.poison();
        return other;
    }

    void poison() {
        const size_t routes = size_t(shape.tokens) * shape.top_k;
        inner.assign(routes * shape.inner, T{0xffff});
        partial.assign(routes * shape.hidden, quiet_nan());
        partial16.assign(routes * shape.hidden, T{0xffff});
        out.assign(size_t(shape.tokens) * shape.hidden, T{0xffff});
        point();
    }

    QuantisedMatrix matrix(bool up) const {
        const int up_rows = (shape.gated ? 2 : 1) * shape.inner;
        return {shape.format, std::is_same_v<T, simt::bf16>, up ? up_rows : shape.hidden,
                up ? shape.hidden : shape.inner, 1 << shape.log2_group};
    }

    static double act(Activation kind, double v) {
        switch (kind) {
            case Activation::silu:
                return v / (1 + std::exp(-v));
            case Activation::gelu:
                return v * 0.5 * std::erfc(-v / std::sqrt(2.0));
            case Activation::gelu_tanh:
                return 0.5 * v *
                       (1 +
                        std::tanh(std::sqrt(2 / 3.14159265358979) * (v + 0.044715 * v * v * v)));
            case Activation::relu:
                return std::max(v, 0.0);
            default:
                return std::max(v, 0.0) * std::max(v, 0.0);
        }
    }

    // In double, rounding to T where the kernels promise to: at the inner values (and the output).
    void compute_reference() {
        const Shape& s = shape;
        want.assign(size_t(s.tokens) * s.hidden, 0.0);
        magnitude = want;
        for (int route = 0; route < s.tokens * s.top_k; ++route) {
            if (ids[route] < 0) continue;
            const unsigned char* page =
                slab.data() + slot_of[ids[route]] * params.pages.slot_stride;
            auto bias = [&](int64_t offset, int row) {
                if (offset < 0) return 0.0;
                T value;
                std::memcpy(&value, page + offset + row * 2, 2);
                return double(simt::to_float(value));
            };
            const auto& pages = params.pages;
            const QuantisedMatrix up_matrix = matrix(true), down_matrix = matrix(false);
            auto up_weight = [&](int row, int k) {
                return up_matrix.weight(page + pages.up_offset, page + pages.up_scale_offset, row,
                                        k);
            };
            auto down_weight = [&](int row, int k) {
                return down_matrix.weight(page + pages.down_offset, page + pages.down_scale_offset,
                                          row, k);
            };
            const T* token = x.data() + size_t(route / s.top_k) * s.hidden;
            auto up_row = [&](int row) {
                double sum = bias(params.pages.up_bias_offset, row);
                for (int k = 0; k < s.hidden; ++k)
                    sum += up_weight(row, k) * simt::to_float(token[k]);
                return sum;
            };
            std::vector<double> h(s.inner);
            for (int f = 0; f < s.inner; ++f) {
                double value;
                if (!s.gated) {
                    value = act(s.activation, up_row(f));
                } else {
                    double gate = up_row(s.interleaved ? 2 * f : f);
                    double up = up_row(s.interleaved ? 2 * f + 1 : s.inner + f);
                    if (s.activation == Activation::clamped_swiglu) {
                        gate = std::min(gate, 1.5);
                        up = std::clamp(up, -1.5, 1.5);
                        value = gate / (1 + std::exp(-double(1.702f) * gate)) * (up + 1);
                    } else {
                        value = act(s.activation, gate) * up;
                    }
                }
                h[f] = simt::to_float(simt::from_float<T>(float(value)));
            }
            for (int n = 0; n < s.hidden; ++n) {
                double sum = bias(params.pages.down_bias_offset, n), size = std::abs(sum);
                for (int f = 0; f < s.inner; ++f) {
                    const double term = down_weight(n, f) * h[f];
                    sum += term;
                    size += std::abs(term);
                }
                const size_t at = size_t(route / s.top_k) * s.hidden + n;
                want[at] += weights[route] * sum;
                magnitude[at] += weights[route] * size;
            }
        }
    }

    // An element may be off by its own rounding, and by the inner values that round the other way
    // in float: an ulp (2^-7, fp16 2^-10) of few terms, bounded here by an eighth of all of them.
    // A token as a whole must be as close as the worst rounding of its elements, in the root mean
    // square. `extra_roundings` is for rows that are stored in T before the sum.
    void check(const char* what, double extra_roundings = 0) const {
        const double ulp = std::is_same_v<T, simt::bf16> ? 1.0 / 128 : 1.0 / 1024;
        for (int t = 0; t < shape.tokens; ++t) {
            double error = 0, size = 0;
            for (int n = 0; n < shape.hidden; ++n) {
                const size_t at = size_t(t) * shape.hidden + n;
                const double got = simt::to_float(out[at]), off = std::abs(got - want[at]);
                const double bound =
                    ulp * (1 + extra_roundings) * (0.5 * std::abs(want[at]) + magnitude[at] / 8) +
                    1e-6;
                if (!(off <= bound)) {
                    std::fprintf(stderr, "%s, %s: token %d feature %d: got %g, want %g, bound %g\n",
                                 shape.name, what, t, n, got, want[at], bound);
                    CHECK(off <= bound);
                }
                error += off * off;
                size += want[at] * want[at];
            }
            CHECK(std::sqrt(error) <= ulp / 2 * (1 + extra_roundings) * std::sqrt(size) + 1e-6);
        }
    }

    bool same_bits(const std::vector<T>& other) const {
        return out.size() == other.size() &&
               std::memcmp(out.data(), other.data(), out.size() * sizeof(T)) == 0;
    }
};

}  // namespace expert_case
