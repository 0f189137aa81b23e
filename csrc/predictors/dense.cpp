// One body, compiled for each instruction set: the functions below it are always inlined into
// those that name a target. Vectors are the compiler's own, never passed by value.
#include "predictors/dense.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace moe_offload {
namespace {

#define MOE_INLINE inline __attribute__((always_inline))

// GCC takes the size of a vector type as a literal only.
template <int kWidth>
struct Lanes;
#define MOE_LANES(N)                                                 \
    template <>                                                      \
    struct Lanes<N> {                                                \
        typedef float V __attribute__((vector_size(4 * N)));         \
        typedef uint32_t Bits __attribute__((vector_size(4 * N)));   \
        typedef uint16_t Halves __attribute__((vector_size(2 * N))); \
    };
MOE_LANES(4)
MOE_LANES(8)
MOE_LANES(16)
#undef MOE_LANES

template <int kWidth>
MOE_INLINE void load(const float* from, typename Lanes<kWidth>::V& to) {
    std::memcpy(&to, from, sizeof(to));
}

template <int kWidth>
MOE_INLINE void load(const uint16_t* from, typename Lanes<kWidth>::V& to) {
    typename Lanes<kWidth>::Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    const auto bits = __builtin_convertvector(halves, typename Lanes<kWidth>::Bits) << 16;
    std::memcpy(&to, &bits, sizeof(to));
}

MOE_INLINE float widen(float value) { return value; }
MOE_INLINE float widen(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// kRows x (kVectors * kWidth) elements of the result, held in registers over all k.
template <int kWidth, int kRows, int kVectors, typename W>
MOE_INLINE void tile(const float* x, size_t x_stride, const W* w, size_t w_stride, float* out,
                     size_t out_stride, size_t inner, bool add) {
    using V = typename Lanes<kWidth>::V;
    V sums[kRows][kVectors];
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVectors; ++v) {
            sums[m][v] = V{};
            if (add)
                std::memcpy(&sums[m][v], out + size_t(m) * out_stride + size_t(v * kWidth),
                            sizeof(V));
        }
    for (size_t k = 0; k < inner; ++k, w += w_stride)
        for (int v = 0; v < kVectors; ++v) {
            V weights;
            load<kWidth>(w + v * kWidth, weights);
            for (int m = 0; m < kRows; ++m) sums[m][v] += weights * x[size_t(m) * x_stride + k];
        }
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVectors; ++v)
            std::memcpy(out + size_t(m) * out_stride + size_t(v * kWidth), &sums[m][v], sizeof(V));
}

// The columns that do not fill a vector.
template <typename W>
MOE_INLINE void edge(const float* x, const W* w, size_t w_stride, float* out, size_t inner,
                     size_t columns, bool add) {
    for (size_t n = 0; n < columns; ++n) {
        float sum = add ? out[n] : 0.0F;
        for (size_t k = 0; k < inner; ++k) sum += widen(w[k * w_stride + n]) * x[k];
        out[n] = sum;
    }
}

template <int kWidth, int kRows, int kVectors, typename W>
MOE_INLINE void rows_of(const float* x, size_t x_stride, const W* w, size_t w_stride, float* out,
                        size_t out_stride, size_t inner, size_t columns, bool add) {
    size_t n = 0;
    for (; n + kWidth * kVectors <= columns; n += kWidth * kVectors)
        tile<kWidth, kRows, kVectors>(x, x_stride, w + n, w_stride, out + n, out_stride, inner,
                                      add);
    for (; n + kWidth <= columns; n += kWidth)
        tile<kWidth, kRows, 1>(x, x_stride, w + n, w_stride, out + n, out_stride, inner, add);
    for (int m = 0; m < kRows && n < columns; ++m)
        edge(x + size_t(m) * x_stride, w + n, w_stride, out + size_t(m) * out_stride + n, inner,
             columns - n, add);
}

template <int kWidth, typename W>
MOE_INLINE void dense(ConstMatrix x, const W* w, size_t w_stride, float* out, size_t out_stride,
                      size_t rows, size_t inner, size_t columns, bool add) {
    constexpr int kRows = 4, kVectors = kWidth == 16 ? 4 : 2;  // 16 or 8 sums in registers
    size_t m = 0;
    for (; m + kRows <= rows; m += kRows)
        rows_of<kWidth, kRows, kVectors>(x.data + m * x.stride, x.stride, w, w_stride,
                                         out + m * out_stride, out_stride, inner, columns, add);
    for (; m < rows; ++m)
        rows_of<kWidth, 1, kVectors>(x.data + m * x.stride, x.stride, w, w_stride,
                                     out + m * out_stride, out_stride, inner, columns, add);
}

template <int kWidth>
MOE_INLINE void packed(ConstMatrix x, PackedMatrix w, float* out, size_t out_stride, size_t rows,
                       bool add) {
    for (size_t n = 0; n < w.columns; n += kPanel)
        dense<kWidth>(x, w.data + n * w.inner, kPanel, out + n, out_stride, rows, w.inner,
                      std::min(kPanel, w.columns - n), add);
}

// 2^n times a polynomial of the rest (Cephes' expf), in operations every vector unit has.
MOE_INLINE float exponential(float x) {
    x = x < -87.0F ? -87.0F : x;
    x = x > 88.0F ? 88.0F : x;
    const float shifted = x * 1.44269504F + 12582912.0F;  // rounds to the nearest integer
    const float n = shifted - 12582912.0F;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
    float y = 1.9875691500e-4F;
    y = y * r + 1.3981999507e-3F;
    y = y * r + 8.3334519073e-3F;
    y = y * r + 4.1665795894e-2F;
    y = y * r + 1.6666665459e-1F;
    y = y * r + 5.0000001201e-1F;
    y = y * r * r + r + 1.0F;
    bits = (bits - 0x4B400000 + 127) * (1 << 23);
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return y * power;
}

// Largest and sum in sixteen lanes, so that they are vector code in an order of their own.
MOE_INLINE float softmax(float* values, const float* bias, size_t count) {
    constexpr size_t kLanes = 16;
    const size_t whole = count / kLanes * kLanes;
    if (bias)
        for (size_t i = 0; i < count; ++i) values[i] += bias[i];
    float lanes[kLanes];
    for (float& lane : lanes) lane = -3e38F;
    for (size_t i = 0; i < whole; i += kLanes)
        for (size_t l = 0; l < kLanes; ++l)
            lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
    float most = -3e38F;
    for (const float lane : lanes) most = lane > most ? lane : most;
    for (size_t i = whole; i < count; ++i) most = values[i] > most ? values[i] : most;
    for (size_t i = 0; i < count; ++i) values[i] = exponential(values[i] - most);
    for (float& lane : lanes) lane = 0.0F;
    for (size_t i = 0; i < whole; i += kLanes)
        for (size_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
    float sum = 0.0F;
    for (const float lane : lanes) sum += lane;
    for (size_t i = whole; i < count; ++i) sum += values[i];
    return sum;
}

MOE_INLINE void logistic(float* values, size_t count) {
    for (size_t i = 0; i < count; ++i) values[i] = 1.0F / (1.0F + exponential(-values[i]));
}

#define MOE_SMALL_PRODUCTS(name, width, target)                                             \
    target void dense_##name(ConstMatrix x, ConstMatrix w, float* out, size_t out_stride,   \
                             size_t rows, size_t inner, size_t columns, bool add) {         \
        dense<width>(x, w.data, w.stride, out, out_stride, rows, inner, columns, add);      \
    }                                                                                       \
    target void packed_##name(ConstMatrix x, PackedMatrix w, float* out, size_t out_stride, \
                              size_t rows, bool add) {                                      \
        packed<width>(x, w, out, out_stride, rows, add);                                    \
    }                                                                                       \
    target float softmax_##name(float* values, const float* bias, size_t count) {           \
        return softmax(values, bias, count);                                                \
    }                                                                                       \
    target void logistic_##name(float* values, size_t count) { logistic(values, count); }   \
    constexpr SmallProducts k_##name{#name, dense_##name, packed_##name, softmax_##name,    \
                                     logistic_##name};

MOE_SMALL_PRODUCTS(plain, 4, )
#if defined(__x86_64__)
MOE_SMALL_PRODUCTS(avx2, 8, __attribute__((target("avx2,fma"))))
MOE_SMALL_PRODUCTS(avx512, 16, __attribute__((target("avx512f,avx512dq,avx512vl,fma"))))
#endif

}  // namespace

std::vector<const SmallProducts*> all_small_products() {
    std::vector<const SmallProducts*> found{&k_plain};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&k_avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            found.push_back(&k_avx512);
    }
#endif
    return found;
}

const SmallProducts& small_products() {
    static const SmallProducts& best = *all_small_products().back();
    return best;
}

}  // namespace moe_offload
