// Compiled without contraction of products and sums (CMakeLists.txt): they round one by one.
#include "expert_gemm/cpu/rope.h"

#include <cstring>

#include "expert_gemm/cpu/lanes.h"

namespace moe_offload {
namespace {

constexpr int64_t kWidth = 8;
using L = PortableLanes<kWidth>;

template <class T>
L::V rounded(L::V v) {
    T lanes[kWidth];
    L::store(lanes, v);
    return L::load(lanes);
}

// Elements i .. i + count of both halves, count up to kWidth.
template <class T>
void rotate_some(T* x, const T* cos, const T* sin, int64_t half, int64_t count) {
    const auto load = [count](const T* from) {
        T lanes[kWidth] = {};
        std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
        return L::load(lanes);
    };
    const auto store = [count](T* to, L::V v) {
        T lanes[kWidth];
        L::store(lanes, v);
        std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
    };
    const L::V low = load(x), high = load(x + half);
    store(x, rounded<T>(low * load(cos)) + rounded<T>(-high * load(sin)));
    store(x + half, rounded<T>(high * load(cos + half)) + rounded<T>(low * load(sin + half)));
}

template <class T>
void rotate_rows(const RopeArgs& a) {
    const int64_t half = a.rotated / 2;
    for (int64_t row = 0; row < a.rows; ++row) {
        const auto* cos = reinterpret_cast<const T*>(a.cos + row * a.row_stride);
        const auto* sin = reinterpret_cast<const T*>(a.sin + row * a.row_stride);
        for (int64_t head = 0; head < a.heads; ++head) {
            T* x = reinterpret_cast<T*>(a.x) + (row * a.heads + head) * a.size;
            int64_t i = 0;
            for (; i + kWidth <= half; i += kWidth)
                rotate_some(x + i, cos + i, sin + i, half, kWidth);
            if (i < half) rotate_some(x + i, cos + i, sin + i, half, half - i);
        }
    }
}

}  // namespace

void rotate(const RopeArgs& args, Dtype dtype) {
    switch (dtype) {
        case Dtype::kF32:
            return rotate_rows<float>(args);
        case Dtype::kBF16:
            return rotate_rows<BF16>(args);
        case Dtype::kF16:
            return rotate_rows<F16>(args);
    }
}

}  // namespace moe_offload
