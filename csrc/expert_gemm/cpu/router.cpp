#include "expert_gemm/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/sharing.h"
#include "expert_gemm/cpu/thread_pool.h"

namespace moe_offload {
namespace {

// fp32 values lie in memory for whole vectors of so many.
constexpr int64_t kVector = 16;
// Waking a thread pays from so many scores on: a token with 256 takes 2 to 3 us.
constexpr int64_t kScoresWorthSharing = 4096;

struct Candidate {
    float score;
    int32_t id;
};

// The `k` largest scores into queue[0 .. k), in the order in which torch.topk on a CPU returns
// them: which of equal ones it takes depends on its algorithm, so it is the same here
// (ATen/native/TopKImpl.h). NaN is largest.
void choose(const float* scores, int64_t count, int64_t k, bool sorted, Candidate* queue) {
    for (int64_t i = 0; i < count; ++i) queue[i] = {scores[i], static_cast<int32_t>(i)};
    const auto before = [](const Candidate& a, const Candidate& b) {
        return (std::isnan(a.score) && !std::isnan(b.score)) || a.score > b.score;
    };
    if (k * 64 <= count) {
        std::partial_sort(queue, queue + k, queue + count, before);
        return;
    }
    std::nth_element(queue, queue + k - 1, queue + count, before);
    if (sorted) std::sort(queue, queue + k - 1, before);
}

// What one thread needs for a row, in one piece of memory.
struct Scratch {
    float *scores, *choice, *rounded;  // [experts]
    float *weights, *group_scores;     // [top_k], [groups]
    Candidate* queue;                  // [experts]

    static int64_t stride(int64_t experts) { return whole_steps(experts, kVector); }
    static int64_t size(int64_t experts) { return 7 * stride(experts); }  // floats

    Scratch(float* at, int64_t experts) {
        const int64_t step = stride(experts);
        for (float** part : {&scores, &choice, &rounded, &weights, &group_scores}) {
            *part = at;
            at += step;
        }
        queue = reinterpret_cast<Candidate*>(at);
    }
};

// Gives the choices outside of the best groups the value `masked`.
void keep_best_groups(const RouterRule& rule, int64_t experts, const Scratch& s) {
    const int64_t size = experts / rule.groups;
    for (int64_t group = 0; group < rule.groups; ++group) {
        choose(s.choice + group * size, size, rule.group_best, true, s.queue);
        float sum = 0.0f;
        for (int64_t i = 0; i < rule.group_best; ++i) sum += s.queue[i].score;
        s.group_scores[group] = sum;
    }
    choose(s.group_scores, rule.groups, rule.top_groups, false, s.queue);
    for (int64_t i = rule.top_groups; i < rule.groups; ++i)
        std::fill_n(s.choice + s.queue[i].id * size, size, rule.masked);
}

void route_row(const RouterArgs& a, const RouterRule& rule, const Kernels& k, size_t item,
               int64_t row, float* logits, const Scratch& s) {
    const auto experts = static_cast<size_t>(a.experts), top_k = static_cast<size_t>(rule.top_k);
    const auto at = [row](void* rows, size_t nbytes) {
        return static_cast<std::byte*>(rows) + static_cast<size_t>(row) * nbytes;
    };
    std::byte* out = at(a.logits, experts * (rule.float_logits ? sizeof(float) : item));
    if (rule.rounds_logits || !rule.float_logits)
        k.round_values(logits, a.experts, rule.float_logits ? static_cast<void*>(s.rounded) : out);
    if (rule.float_logits) std::memcpy(out, logits, experts * sizeof(float));

    std::copy_n(logits, experts, s.scores);
    if (rule.score == RouterScore::kSoftmax) k.softmax(s.scores, a.experts);
    if (rule.score == RouterScore::kSigmoid) k.sigmoid(s.scores, a.experts);
    std::copy_n(s.scores, experts, s.choice);
    if (a.correction)
        for (size_t i = 0; i < experts; ++i) s.choice[i] += a.correction[i];
    if (rule.groups > 1) keep_best_groups(rule, a.experts, s);
    choose(s.choice, a.experts, rule.top_k, rule.sorted, s.queue);

    int64_t* ids = a.ids + row * rule.top_k;
    for (size_t i = 0; i < top_k; ++i) {
        ids[i] = s.queue[i].id;
        s.weights[i] = s.scores[s.queue[i].id];
    }
    if (rule.score == RouterScore::kSoftmaxChosen) k.softmax(s.weights, rule.top_k);
    if (rule.normalises) {
        float sum = 0.0f;
        for (size_t i = 0; i < top_k; ++i) sum += s.weights[i];
        sum += rule.epsilon;
        for (size_t i = 0; i < top_k; ++i) s.weights[i] /= sum;
    }
    for (size_t i = 0; i < top_k; ++i) s.weights[i] *= rule.scale;
    std::byte* weights = at(a.weights, top_k * (rule.float_weights ? sizeof(float) : item));
    if (rule.float_weights)
        std::memcpy(weights, s.weights, top_k * sizeof(float));
    else
        k.round_values(s.weights, rule.top_k, weights);
}

}  // namespace

void route(const RouterArgs& args, const RouterRule& rule, Dtype dtype, const Kernels& k,
           int num_threads) {
    if (args.rows < 1) return;
    const size_t item = item_size(dtype);
    const int64_t row_bytes = args.hidden * static_cast<int64_t>(item);
    const int64_t part = k.few_rows, parts = (args.rows + part - 1) / part;
    const int64_t stride = Scratch::stride(args.experts);
    const int threads = args.experts * row_bytes < kWorthSharing ? 1 : num_threads;
    const int64_t sharers = args.rows * args.experts < kScoresWorthSharing
                                ? 1
                                : std::min<int64_t>(args.rows, std::max(1, num_threads));

    const int64_t packed_bytes = whole_steps(k.packed_bytes(args.rows, true, args.hidden), 64);
    const int64_t floats = args.rows * stride + sharers * Scratch::size(args.experts);
    const Buffer buffer(static_cast<size_t>(packed_bytes) +
                        static_cast<size_t>(floats) * sizeof(float));
    std::byte* packed = buffer.data();
    auto* logits = reinterpret_cast<float*>(packed + packed_bytes);
    std::vector<int64_t> row_ids(static_cast<size_t>(args.rows));
    std::iota(row_ids.begin(), row_ids.end(), 0);
    k.pack_few(args.x, row_ids.data(), args.rows, args.hidden, packed);

    const int64_t chunk = whole_steps(
        std::max(args.experts / (threads * kChunksPerThread), kMinChunkBytes / row_bytes), part);
    const int64_t chunks = (args.experts + chunk - 1) / chunk;
    ThreadPool& pool = ThreadPool::shared();
    pool.run(threads, chunks * parts, [&](int64_t task) {
        const int64_t first = task % parts * part;  // a chunk's weights stay in the cache
        LogitsArgs a{};
        a.rows = std::min(part, args.rows - first);
        a.hidden = args.hidden;
        a.x = packed + k.row_offset(first, true, args.hidden);
        a.weight = args.weight;
        a.row_stride = row_bytes;
        a.bias = args.bias;
        a.begin = task / parts * chunk;
        a.end = std::min(args.experts, a.begin + chunk);
        a.logits = logits + first * stride;
        a.logits_stride = stride;
        k.logits(a);
    });

    float* scratch = logits + args.rows * stride;
    pool.run(static_cast<int>(sharers), sharers, [&](int64_t task) {
        const Scratch own(scratch + task * Scratch::size(args.experts), args.experts);
        for (int64_t row = task; row < args.rows; row += sharers)
            route_row(args, rule, k, item, row, logits + row * stride, own);
    });
}

}  // namespace moe_offload
