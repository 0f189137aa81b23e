// Small matrix products, softmax and logistic function for predictors, in the calling thread.
//
// A predictor speaks between two layers of a model that torch computes on every core. A BLAS with
// threads of its own must not be called there: with numpy's OpenBLAS, `expertflow` decoded 73 to 79
// tokens/s on two cores (batch 4), and 229 to 270 when OpenBLAS had one thread (docs/study.md).
//
// Results are summed over k in order, whatever the number of rows: the same row gives the same bits
// alone and in a batch. They depend on the instruction set, which is chosen once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moe_offload {

// A matrix in memory: consecutive rows are `stride` elements apart.
struct ConstMatrix {
    const float* data;
    size_t stride;
};

// A matrix [inner, columns] in bfloat16, packed: the first kPanel columns of all rows, then the
// next ones, and so on, the last panel filled up with anything. A product reads it from memory in
// one stream and half the bytes: between two steps of a model, a predictor's weights leave the
// caches.
constexpr size_t kPanel = 64;
struct PackedMatrix {
    const uint16_t* data;
    size_t inner, columns;
};

struct SmallProducts {
    const char* isa;
    // out[m, n] = (add ? out[m, n] : 0) + sum_k x[m, k] w[k, n], m < rows, k < inner, n < columns.
    void (*dense)(ConstMatrix x, ConstMatrix w, float* out, size_t out_stride, size_t rows,
                  size_t inner, size_t columns, bool add);
    // The same of a packed matrix.
    void (*packed)(ConstMatrix x, PackedMatrix w, float* out, size_t out_stride, size_t rows,
                   bool add);
    // values <- e^(values + bias - their largest), bias null for none; returns their sum. Exponents
    // below -87 count as -87. Relative error of a value below 2e-7.
    float (*softmax)(float* values, const float* bias, size_t count);
    // values <- 1 / (1 + e^-values).
    void (*logistic)(float* values, size_t count);
};

// The best for this machine.
const SmallProducts& small_products();
// All that this machine has, for tests.
std::vector<const SmallProducts*> all_small_products();

}  // namespace moe_offload
