// Routers on every instruction set of this machine: logits against double, ids and weights against
// a sort, from memory that ends where the arrays end (the sanitizers' part), over any threads.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "check.h"
#include "elements.h"
#include "expert_gemm/cpu/router.h"

using namespace moe_offload;

namespace {

struct Shape {
    int64_t rows, hidden, experts;
};

struct Result {
    std::vector<std::byte> logits, weights;
    std::vector<int64_t> ids;
    bool operator==(const Result&) const = default;
};

Result run(const Kernels& kernels, Dtype dtype, const Shape& shape, const RouterRule& rule,
           const std::vector<std::byte>& x, const std::vector<std::byte>& weight,
           const std::vector<std::byte>& bias, const std::vector<float>& correction, int threads) {
    const auto rows = static_cast<size_t>(shape.rows);
    const auto experts = static_cast<size_t>(shape.experts);
    const auto top_k = static_cast<size_t>(rule.top_k);
    Result out;
    out.logits.resize(rows * experts * (rule.float_logits ? 4 : item_size(dtype)), std::byte{0xff});
    out.weights.resize(rows * top_k * (rule.float_weights ? 4 : item_size(dtype)), std::byte{0xff});
    out.ids.resize(rows * top_k, -1);
    const RouterArgs args{x.data(),
                          shape.rows,
                          shape.hidden,
                          shape.experts,
                          weight.data(),
                          bias.empty() ? nullptr : bias.data(),
                          correction.empty() ? nullptr : correction.data(),
                          out.logits.data(),
                          out.weights.data(),
                          out.ids.data()};
    route(args, rule, dtype, kernels, threads);
    return out;
}

// A row's weights by double arithmetic and a sort, from its logits.
void check_row(const RouterRule& rule, const std::vector<double>& logits,
               const std::vector<float>& correction, const int64_t* ids,
               const std::vector<double>& weights, double ulp) {
    const size_t experts = logits.size();
    std::vector<double> scores = logits;
    const auto softmax = [](std::vector<double>& v) {
        const double max = *std::max_element(v.begin(), v.end());
        double sum = 0.0;
        for (double& s : v) sum += s = std::exp(s - max);
        for (double& s : v) s /= sum;
    };
    if (rule.score == RouterScore::kSoftmax) softmax(scores);
    if (rule.score == RouterScore::kSigmoid)
        for (double& s : scores) s = 1.0 / (1.0 + std::exp(-s));
    std::vector<double> choice = scores;
    for (size_t i = 0; i < correction.size(); ++i) choice[i] += static_cast<double>(correction[i]);
    const auto size = static_cast<int64_t>(experts) / rule.groups;
    if (rule.groups > 1) {
        std::vector<double> groups;
        for (auto first = choice.begin(); first != choice.end(); first += size) {
            std::vector<double> best(first, first + size);
            std::sort(best.rbegin(), best.rend());
            groups.push_back(std::accumulate(best.begin(), best.begin() + rule.group_best, 0.0));
        }
        std::vector<double> sorted = groups;
        std::sort(sorted.rbegin(), sorted.rend());
        // the groups that were chosen from may be any of equal ones
        for (int64_t i = 0; i < rule.top_k; ++i)
            CHECK(groups[static_cast<size_t>(ids[i] / size)] >=
                  sorted[static_cast<size_t>(rule.top_groups - 1)] - 1e-6);
        for (size_t group = 0; group < groups.size(); ++group)
            if (groups[group] < sorted[static_cast<size_t>(rule.top_groups - 1)] - 1e-6)
                std::fill_n(choice.begin() + static_cast<int64_t>(group) * size, size, -1e30);
    }
    std::vector<double> chosen;
    for (int64_t i = 0; i < rule.top_k; ++i) {
        CHECK(ids[i] >= 0 && ids[i] < static_cast<int64_t>(experts));
        CHECK(std::find(ids, ids + i, ids[i]) == ids + i);
        const double mine = choice[static_cast<size_t>(ids[i])];
        if (rule.groups == 1)  // of all that were not chosen, none is larger
            for (size_t e = 0; e < experts; ++e)
                CHECK(std::find(ids, ids + rule.top_k, static_cast<int64_t>(e)) !=
                          ids + rule.top_k ||
                      choice[e] <= mine + 1e-6);
        if (rule.sorted && i > 0) CHECK(choice[static_cast<size_t>(ids[i - 1])] >= mine - 1e-6);
        chosen.push_back(scores[static_cast<size_t>(ids[i])]);
    }
    if (rule.score == RouterScore::kSoftmaxChosen) softmax(chosen);
    const double sum =
        rule.normalises ? std::accumulate(chosen.begin(), chosen.end(), 0.0) + rule.epsilon : 1.0;
    for (size_t i = 0; i < chosen.size(); ++i) {
        const double wanted = chosen[i] / sum * static_cast<double>(rule.scale);
        // fp32: see close() in tests/test_routers.py; half precision has denormals below 2^-14
        CHECK(std::abs(weights[i] - wanted) <= (0x1p-20 + ulp) * std::max(wanted, 0x1p-14));
    }
}

void every_instruction_set_routes() {
    RouterRule softmax;
    softmax.top_k = 3;
    RouterRule chosen = softmax;
    chosen.score = RouterScore::kSoftmaxChosen;
    chosen.float_logits = true;
    RouterRule grouped = softmax;
    grouped.score = RouterScore::kSigmoid;
    grouped.rounds_logits = grouped.sorted = false;
    grouped.float_logits = grouped.float_weights = grouped.normalises = true;
    grouped.groups = 4;
    grouped.top_groups = grouped.group_best = 2;
    grouped.masked = -INFINITY;
    grouped.scale = 2.5f;
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kF16})
        for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
            const Kernels* kernels = kernels_for(isa, dtype);
            if (!kernels) continue;
            for (const Shape& shape :
                 {Shape{1, 1, 8}, {3, 7, 12}, {2, 64, 8}, {9, 131, 20}, {40, 1100, 132}})
                for (const RouterRule& rule : {softmax, chosen, grouped}) {
                    const auto seed = static_cast<uint32_t>(shape.hidden);
                    const auto x = draw(dtype, shape.rows * shape.hidden, 1.0f, seed);
                    const auto weight = draw(dtype, shape.experts * shape.hidden, 0.25f, seed + 1);
                    const auto bias = draw(dtype, shape.experts, 1.0f, seed + 2);
                    std::vector<float> correction;
                    if (rule.groups > 1)
                        for (int64_t e = 0; e < shape.experts; ++e)
                            correction.push_back(static_cast<float>(e * 37 % 11) / 16.0f);
                    const auto out =
                        run(*kernels, dtype, shape, rule, x, weight, bias, correction, 2);
                    CHECK(out == run(*kernels, dtype, shape, rule, x, weight, bias, correction, 1));
                    const double ulp = dtype == Dtype::kF32    ? 0.0
                                       : dtype == Dtype::kBF16 ? 0x1.01p-8
                                                               : 0x1.01p-11;
                    const Dtype logits_dtype = rule.float_logits ? Dtype::kF32 : dtype;
                    const Dtype weights_dtype = rule.float_weights ? Dtype::kF32 : dtype;
                    const auto at = [](const std::vector<std::byte>& v, Dtype of, int64_t i) {
                        return static_cast<double>(
                            widen(of, v.data() + static_cast<size_t>(i) * item_size(of)));
                    };
                    for (int64_t row = 0; row < shape.rows; ++row) {
                        std::vector<double> logits, weights;
                        for (int64_t e = 0; e < shape.experts; ++e) {
                            double sum = at(bias, dtype, e), size = std::abs(sum);
                            for (int64_t i = 0; i < shape.hidden; ++i) {
                                const double term = at(x, dtype, row * shape.hidden + i) *
                                                    at(weight, dtype, e * shape.hidden + i);
                                sum += term;
                                size += std::abs(term);
                            }
                            logits.push_back(at(out.logits, logits_dtype, row * shape.experts + e));
                            const double steps = static_cast<double>(shape.hidden + 1) * 0x1p-24;
                            CHECK(std::abs(logits.back() - sum) <=
                                  steps * size + (rule.rounds_logits ? ulp : 0.0) *
                                                     std::max(std::abs(sum), 0x1p-14) * 1.01);
                        }
                        for (int64_t i = 0; i < rule.top_k; ++i)
                            weights.push_back(at(out.weights, weights_dtype, row * rule.top_k + i));
                        check_row(rule, logits, correction, out.ids.data() + row * rule.top_k,
                                  weights, rule.float_weights ? 0.0 : ulp);
                    }
                }
        }
}

void rules_say_what_they_fit() {
    RouterRule rule;
    rule.top_k = 4;
    CHECK(rule.fits(4));
    CHECK(!rule.fits(3));
    rule.groups = 4;
    rule.top_groups = 2;
    CHECK(rule.fits(8));
    CHECK(!rule.fits(4));   // two experts may be chosen
    CHECK(!rule.fits(10));  // no equal groups
    rule.group_best = 2;
    CHECK(rule.fits(8));
    CHECK(!rule.fits(4));
    rule.top_groups = 5;
    CHECK(!rule.fits(8));
}

}  // namespace

int main() {
    RUN(every_instruction_set_routes);
    RUN(rules_say_what_they_fit);
}
