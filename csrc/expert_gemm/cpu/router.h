// A layer's router, from hidden states to the experts of each token and their weights:
//
//     logits  = x W^T + b                               fp32 sums
//     scores  = softmax or sigmoid of them over all E experts, or as they are
//     choice  = scores + correction, outside of the best groups `masked`
//     ids     = the A experts of largest choice, in torch.topk's order
//     weights = their scores, perhaps softmaxed, perhaps over their sum; times `scale`
//
// One token of a decoded layer is a few thousand instructions and a weight of 0.25 to 4 MB, read
// once. In PyTorch it is five to twenty operations whose code and data the experts have just
// streamed out of the caches.
//
// Bits depend on the instruction set and the dtype, not on threads or other rows.
#pragma once

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

enum class RouterScore : int32_t {
    kSoftmax = 0,        // over all experts
    kSoftmaxChosen = 1,  // over the chosen ones
    kSigmoid = 2,
};

// What becomes of a token's logits.
struct RouterRule {
    RouterScore score = RouterScore::kSoftmax;
    int64_t top_k = 1;          // A
    bool rounds_logits = true;  // to the dtype, before anything else is done with them
    bool sorted = true;         // as torch.topk's argument
    bool normalises = false;    // weights over (their sum + epsilon)
    float epsilon = 0.0f;
    float scale = 1.0f;
    int64_t groups = 1;          // equal ones of consecutive experts; 1: no limit
    int64_t top_groups = 1;      // only experts of so many groups are chosen
    int64_t group_best = 1;      // a group counts as the sum of so many of its best choices
    float masked = 0.0f;         // the choice of experts of other groups
    bool float_logits = false;   // returned in fp32, else in the dtype
    bool float_weights = false;  // the same

    bool fits(int64_t experts) const {  // and chooses no masked expert
        return top_k > 0 && groups > 0 && experts % groups == 0 && top_groups > 0 &&
               top_groups <= groups && group_best > 0 && group_best <= experts / groups &&
               top_k <= experts / groups * top_groups;
    }
};

struct RouterArgs {
    const void* x;  // [rows, hidden], contiguous, in the kernels' dtype
    int64_t rows;
    int64_t hidden, experts;
    const std::byte* weight;  // [experts, hidden], contiguous, in the dtype
    const std::byte* bias;    // [experts] in the dtype, or null
    const float* correction;  // [experts], or null
    void* logits;             // [rows, experts] out
    void* weights;            // [rows, top_k] out
    int64_t* ids;             // [rows, top_k] out
};

// The rule must fit the experts.
void route(const RouterArgs& args, const RouterRule& rule, Dtype dtype, const Kernels& kernels,
           int num_threads);

}  // namespace moe_offload
