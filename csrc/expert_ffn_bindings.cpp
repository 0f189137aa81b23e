// The Python face of the CPU kernels (experts, dense layers, attention), and of the sort of routes
// that GPU kernels get, part of `moe_offload._core`. Addresses are integers (Tensor.data_ptr());
// who passes them keeps the tensors alive until finish() has returned.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <array>
#include <cstring>
#include <tuple>

#include "expert_gemm/cpu/attention.h"
#include "expert_gemm/cpu/ffn_run.h"
#include "expert_gemm/cpu/linear.h"
#include "expert_gemm/cpu/memory_roof.h"
#include "expert_gemm/cpu/multiply_roof.h"
#include "expert_gemm/cpu/projections.h"
#include "expert_gemm/cpu/rms_norm.h"
#include "expert_gemm/cpu/router.h"
#include "expert_gemm/route_sort.h"

namespace py = pybind11;
using namespace moe_offload;
using namespace pybind11::literals;

namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

Dtype dtype_named(const std::string& name) {
    if (name == "float32") return Dtype::kF32;
    if (name == "bfloat16") return Dtype::kBF16;
    if (name == "float16") return Dtype::kF16;
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
}

Activation activation_named(const std::string& name) {
    static constexpr const char* kNames[] = {"silu", "gelu",  "gelu_tanh",
                                             "relu", "relu2", "clamped_swiglu"};
    for (int32_t i = 0; i < 6; ++i)
        if (name == kNames[i]) return static_cast<Activation>(i);
    throw std::invalid_argument("activation: the CPU kernels do not know " + name);
}

// A layer's arithmetic and the kernels that do it.
struct ExpertFfn {
    FfnShape shape;
    const Kernels* kernels;
};

// address, slot stride, row stride, k stride
using View = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

WeightView view(const std::optional<View>& given) {
    if (!given) return {};
    const auto [address, slot_stride, row_stride, k_stride] = *given;
    return {reinterpret_cast<const std::byte*>(address), slot_stride, row_stride, k_stride};
}

WeightFormat format_named(const std::string& name) {
    static constexpr const char* kNames[] = {"plain",          "mxfp4",      "fp8_block",
                                             "fp8_block_bf16", "int4_group", "int4_group_f16"};
    for (int32_t i = 0; i < 6; ++i)
        if (name == kNames[i]) return static_cast<WeightFormat>(i);
    throw std::invalid_argument("weight format: the CPU kernels do not know " + name);
}

// address, slot stride
using Scales = std::pair<uintptr_t, int64_t>;

void set_scales(WeightView& view, const std::optional<Scales>& given) {
    if (!given) return;
    view.scales = reinterpret_cast<const std::byte*>(given->first);
    view.scales_stride = given->second;
}

ExpertFfn make_ffn(int64_t hidden, int64_t inner, int64_t num_experts, const std::string& dtype,
                   const std::string& activation, bool gated, float alpha, float limit,
                   float offset, const std::string& isa) {
    if (hidden < 1 || inner < 1 || num_experts < 1)
        throw std::invalid_argument("ExpertFfn: expected positive sizes");
    FfnShape shape;
    shape.hidden = hidden;
    shape.inner = inner;
    shape.num_experts = num_experts;
    shape.dtype = dtype_named(dtype);
    shape.activation = {activation_named(activation), gated, alpha, limit, offset};
    return {shape, kernels_named(isa, shape.dtype)};
}

FfnRun start(const ExpertFfn& ffn, uintptr_t hidden, uintptr_t topk_ids, bool ids_are_int64,
             uintptr_t topk_weights, const std::string& weights_dtype, int64_t num_tokens,
             int64_t top_k, int num_threads, bool rows_apart) {
    FfnInputs inputs;
    inputs.hidden = reinterpret_cast<const void*>(hidden);
    inputs.topk_ids = reinterpret_cast<const void*>(topk_ids);
    inputs.topk_weights = reinterpret_cast<const void*>(topk_weights);
    inputs.ids_are_int64 = ids_are_int64;
    inputs.weights_dtype = dtype_named(weights_dtype);
    inputs.num_tokens = num_tokens;
    inputs.top_k = top_k;
    return FfnRun(ffn.shape, inputs, *ffn.kernels, num_threads, rows_apart);
}

// The kernels of dense layers of one dtype, looked up once: a small layer takes a few microseconds.
struct DenseKernels {
    Dtype dtype;
    const Kernels* kernels;
};

DenseKernels make_dense(const std::string& dtype, const std::string& isa) {
    return {dtype_named(dtype), kernels_named(isa, dtype_named(dtype))};
}

// address of a weight, bytes from row to row, address of the bias or 0, features, address of y
using Projection = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t>;

LinearOutput output_of(const Projection& projection) {
    const auto& [weight, row_stride, bias, out, y] = projection;
    return {out, reinterpret_cast<const std::byte*>(weight), row_stride,
            reinterpret_cast<const std::byte*>(bias), reinterpret_cast<void*>(y)};
}

void multiply(const DenseKernels& self, uintptr_t x, int64_t rows, int64_t in, int64_t out,
              uintptr_t weight, int64_t row_stride, uintptr_t bias, uintptr_t y, int num_threads) {
    const LinearOutput output = output_of({weight, row_stride, bias, out, y});
    linear({reinterpret_cast<const void*>(x), rows, in}, {&output, 1}, self.dtype, *self.kernels,
           num_threads);
}

// address of a weight, its size, epsilon, offset, rounds before the weight
using Norm = std::tuple<uintptr_t, int64_t, float, float, bool>;

std::optional<ProjectionNorm> norm_of(const std::optional<Norm>& norm) {
    if (!norm) return std::nullopt;
    const auto& [weight, size, epsilon, offset, rounds] = *norm;
    return ProjectionNorm{reinterpret_cast<const std::byte*>(weight), size, epsilon, offset,
                          rounds};
}

void project_at(const DenseKernels& self, uintptr_t x, int64_t rows, int64_t in,
                const Projection& query, const Projection& key, const Projection& value,
                int64_t size, const std::optional<Norm>& query_norm,
                const std::optional<Norm>& key_norm,
                const std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>& angles, int num_threads) {
    const auto& [cos, sin, angle_stride, rotated] = angles;
    project({{reinterpret_cast<const void*>(x), rows, in},
             output_of(query),
             output_of(key),
             output_of(value),
             size,
             norm_of(query_norm),
             norm_of(key_norm),
             reinterpret_cast<const std::byte*>(cos),
             reinterpret_cast<const std::byte*>(sin),
             angle_stride,
             rotated},
            self.dtype, *self.kernels, num_threads);
}

void normalise(const DenseKernels& self, uintptr_t x, int64_t rows, int64_t size, uintptr_t weight,
               float epsilon, float weight_offset, bool rounds_before_weight, uintptr_t y,
               int num_threads) {
    const NormArgs args{reinterpret_cast<const void*>(x),
                        reinterpret_cast<const void*>(weight),
                        reinterpret_cast<void*>(y),
                        size,
                        0,
                        rows,
                        epsilon,
                        weight_offset,
                        rounds_before_weight};
    rms_norm(args, self.dtype, *self.kernels, num_threads);
}

RouterScore score_named(const std::string& name) {
    static constexpr const char* kNames[] = {"softmax", "softmax_topk", "sigmoid"};
    for (int32_t i = 0; i < 3; ++i)
        if (name == kNames[i]) return static_cast<RouterScore>(i);
    throw std::invalid_argument("route: expected softmax, softmax_topk or sigmoid, got " + name);
}

void route_tokens(const DenseKernels& self, uintptr_t x, int64_t rows, int64_t hidden,
                  int64_t experts, uintptr_t weight, uintptr_t bias, uintptr_t correction,
                  const RouterRule& rule, uintptr_t logits, uintptr_t weights, uintptr_t ids,
                  int num_threads) {
    if (!rule.fits(experts) || hidden < 1)
        throw std::invalid_argument("route: this rule does not fit " + std::to_string(experts) +
                                    " experts");
    const RouterArgs args{reinterpret_cast<const void*>(x),
                          rows,
                          hidden,
                          experts,
                          reinterpret_cast<const std::byte*>(weight),
                          reinterpret_cast<const std::byte*>(bias),
                          reinterpret_cast<const float*>(correction),
                          reinterpret_cast<void*>(logits),
                          reinterpret_cast<void*>(weights),
                          reinterpret_cast<int64_t*>(ids)};
    route(args, rule, self.dtype, *self.kernels, num_threads);
}

// address, kind, bytes to the next sequence, to the next head, to the next position
using Mask = std::tuple<uintptr_t, std::string, int64_t, int64_t, int64_t>;

void attend(const DenseKernels& self, uintptr_t q, uintptr_t keys, uintptr_t values, uintptr_t out,
            const std::array<int64_t, 6>& shape, const std::array<int64_t, 3>& key_strides,
            const std::array<int64_t, 3>& value_strides, const std::optional<Mask>& mask,
            float scale, int num_threads) {
    AttentionArgs a{};
    a.q = reinterpret_cast<const std::byte*>(q);
    a.keys = reinterpret_cast<const std::byte*>(keys);
    a.values = reinterpret_cast<const std::byte*>(values);
    a.out = reinterpret_cast<std::byte*>(out);
    std::tie(a.batch, a.query_heads, a.key_heads, a.positions, a.size, a.value_size) =
        std::tuple_cat(shape);
    std::tie(a.key_batch_stride, a.key_head_stride, a.key_stride) = std::tuple_cat(key_strides);
    std::tie(a.value_batch_stride, a.value_head_stride, a.value_stride) =
        std::tuple_cat(value_strides);
    if (mask) {
        const auto& [address, kind, batch_stride, head_stride, stride] = *mask;
        if (kind != "bool" && kind != "float32" && kind != "same")
            throw std::invalid_argument("attend: expected a mask of bool, float32 or same, got " +
                                        kind);
        a.mask.kind = kind == "bool"      ? AttendMask::kBool
                      : kind == "float32" ? AttendMask::kFloat
                                          : AttendMask::kSame;
        a.mask.base = reinterpret_cast<const std::byte*>(address);
        a.mask.head_stride = head_stride;
        a.mask.stride = stride;
        a.mask_batch_stride = batch_stride;
    }
    a.scale = scale;
    attention(a, self.dtype, *self.kernels, num_threads);
}

// shape: sequences, heads, bytes of a head's new tokens
void copy_rows(uintptr_t from, uintptr_t to, const std::array<int64_t, 3>& shape,
               const std::array<int64_t, 2>& strides) {
    const auto [batch, heads, nbytes] = shape;
    const auto* source = reinterpret_cast<const std::byte*>(from);
    auto* target = reinterpret_cast<std::byte*>(to);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h, source += nbytes)
            std::memcpy(target + b * strides[0] + h * strides[1], source,
                        static_cast<size_t>(nbytes));
}

void sort_routes_at(uintptr_t ids, bool ids_are_int64, int32_t num_routes, int32_t num_experts,
                    const std::array<uintptr_t, 5>& maps) {
    const auto at = [&maps](size_t i) { return reinterpret_cast<int32_t*>(maps[i]); };
    const RouteMaps to{at(0), at(1), at(2), at(3), at(4)};
    if (ids_are_int64)
        sort_routes(reinterpret_cast<const int64_t*>(ids), num_routes, num_experts, to);
    else
        sort_routes(reinterpret_cast<const int32_t*>(ids), num_routes, num_experts, to);
}

}  // namespace

void bind_expert_ffn(py::module_& m) {
    m.def("sort_routes", &sort_routes_at, py::kw_only(), "ids"_a, "ids_are_int64"_a, "num_routes"_a,
          "num_experts"_a, "maps"_a, ReleaseGil(),
          "Sorts routes by expert into int32 maps, in the order of RouteMaps (route_sort.h).");

    m.def("copy_rows", &copy_rows, "from_address"_a, "to_address"_a, "shape"_a, "strides"_a,
          ReleaseGil(),
          "Copies [B, heads] rows that lie without gaps to rows `strides` bytes apart (to the next "
          "sequence, to the next head). shape: B, heads, bytes of a row.");

    m.def(
        "cpu_isas",
        [](const std::string& dtype) {
            std::vector<std::string> names;
            for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16,
                                  Isa::kAmx, Isa::kAmxEmulated})
                if (const Kernels* kernels = kernels_for(isa, dtype_named(dtype)))
                    names.emplace_back(kernels->isa);
            return names;
        },
        "dtype"_a, "Instruction sets with kernels for this dtype that this machine runs.");

    m.def(
        "multiply_roof",
        [](const std::string& dtype, double seconds, const std::string& isa) {
            const MultiplyRoof roof =
                multiply_roof(*kernels_named(isa, dtype_named(dtype)), seconds);
            return std::make_tuple(roof.operations, roof.seconds);
        },
        "dtype"_a, "seconds"_a, "isa"_a = "auto", ReleaseGil(),
        "Multiply-adds of this dtype's kernels with all operands in registers, in the calling "
        "thread: (floating-point operations, seconds). 16-bit weights are multiplied in fp32 where "
        "the instruction set has nothing else.");
    m.def(
        "memory_roof",
        [](uintptr_t address, size_t num_bytes, size_t ahead) {
            if (num_bytes % 64)
                throw std::invalid_argument("memory_roof: expected a multiple of 64 bytes, got " +
                                            std::to_string(num_bytes));
            const MemoryRoof roof =
                memory_roof(reinterpret_cast<const std::byte*>(address), num_bytes, ahead);
            return std::make_tuple(roof.sum, roof.seconds);
        },
        "address"_a, "num_bytes"_a, "ahead"_a, ReleaseGil(),
        "Read memory once through in the calling thread, every line prefetched into the L2 `ahead` "
        "bytes ahead (0: not): (sum of its 64-bit words modulo 2^64, seconds).");

    py::class_<RouterRule>(m, "RouterRule")
        .def(py::init([](const std::string& score, int64_t top_k, bool rounds_logits, bool sorted,
                         bool normalises, float epsilon, float scale,
                         const std::array<int64_t, 3>& groups, float masked, bool float_logits,
                         bool float_weights) {
                 return RouterRule{score_named(score), top_k,     rounds_logits, sorted,
                                   normalises,         epsilon,   scale,         groups[0],
                                   groups[1],          groups[2], masked,        float_logits,
                                   float_weights};
             }),
             "score"_a, "top_k"_a, "rounds_logits"_a, "sorted"_a, "normalises"_a, "epsilon"_a,
             "scale"_a, "groups"_a, "masked"_a, "float_logits"_a, "float_weights"_a,
             "router_rules.Rule.")
        .def("fits", &RouterRule::fits, "experts"_a);

    py::class_<DenseKernels>(m, "DenseKernels")
        .def(py::init(&make_dense), "dtype"_a, "isa"_a = "auto")
        .def_property_readonly("isa", [](const DenseKernels& self) { return self.kernels->isa; })
        .def("multiply", &multiply, "x"_a, "rows"_a, "in_features"_a, "out_features"_a, "weight"_a,
             "row_stride"_a, "bias"_a, "y"_a, "num_threads"_a, ReleaseGil(),
             "y [rows, out] = x [rows, in] weight^T + bias, addresses of contiguous rows of the "
             "dtype; row_stride: bytes from row to row of the weight; bias 0: none.")
        .def("project", &project_at, "x"_a, "rows"_a, "in_features"_a, "query"_a, "key"_a,
             "value"_a, "size"_a, "query_norm"_a, "key_norm"_a, "angles"_a, "num_threads"_a,
             ReleaseGil(),
             "Queries, keys and values of x [rows, in], queries and keys normed and rotated. Each: "
             "(weight, bytes from row to row, bias or 0, features, y [rows, features]); size: of a "
             "head; norms: None or (weight, what is normed together, epsilon, weight_offset, "
             "rounds_before_weight); angles: (cos, sin, bytes from row to row of both, elements "
             "rotated at the front of a head).")
        .def("rms_norm", &normalise, "x"_a, "rows"_a, "size"_a, "weight"_a, "epsilon"_a,
             "weight_offset"_a, "rounds_before_weight"_a, "y"_a, "num_threads"_a, ReleaseGil(),
             "y [rows, size] = x / sqrt(mean(x^2) + epsilon), perhaps rounded to the dtype, times "
             "(weight + weight_offset).")
        .def("route", &route_tokens, "x"_a, "rows"_a, "hidden"_a, "experts"_a, "weight"_a, "bias"_a,
             "correction"_a, "rule"_a, "logits"_a, "weights"_a, "ids"_a, "num_threads"_a,
             ReleaseGil(),
             "A router, see router.h: x [rows, H], weight [E, H], bias [E] or 0 in the dtype, "
             "correction [E] in float32 or 0, to logits [rows, E] and weights [rows, A] (each in "
             "float32 or the dtype) and int64 ids [rows, A].")
        .def("attend", &attend, "q"_a, "keys"_a, "values"_a, "out"_a, "shape"_a, "key_strides"_a,
             "value_strides"_a, "mask"_a, "scale"_a, "num_threads"_a, ReleaseGil(),
             "out [B, Hq, D'] = softmax(scale q K^T + mask) V for q [B, Hq, D], one token a "
             "sequence. shape: (B, Hq, Hkv, S, D, D'); strides of keys [B, Hkv, S, D] and values: "
             "bytes to the next sequence, head and position; mask: None or (address, bool, float32 "
             "or same (the dtype), bytes to the next sequence, query head and position).");

    py::class_<FfnWeights>(m, "FfnWeights")
        .def(py::init([](const View& up, const View& down, const std::optional<View>& gate,
                         const std::optional<View>& up_bias, const std::optional<View>& down_bias,
                         const std::optional<View>& gate_bias, const std::string& format,
                         const std::optional<Scales>& up_scales,
                         const std::optional<Scales>& down_scales,
                         const std::optional<Scales>& gate_scales, int64_t up_group,
                         int64_t down_group, uintptr_t shifts) {
                 FfnWeights weights{view(gate),          view(up),      view(down),
                                    view(gate_bias),     view(up_bias), view(down_bias),
                                    format_named(format)};
                 set_scales(weights.up, up_scales);
                 set_scales(weights.down, down_scales);
                 set_scales(weights.gate, gate_scales);
                 weights.gate.group = weights.up.group = up_group;
                 weights.down.group = down_group;
                 for (WeightView* view : {&weights.gate, &weights.up, &weights.down,
                                          &weights.gate_bias, &weights.up_bias, &weights.down_bias})
                     view->shifts = reinterpret_cast<const uint32_t*>(shifts);
                 return weights;
             }),
             "up"_a, "down"_a, "gate"_a = py::none(), "up_bias"_a = py::none(),
             "down_bias"_a = py::none(), "gate_bias"_a = py::none(), "format"_a = "plain",
             "up_scales"_a = py::none(), "down_scales"_a = py::none(), "gate_scales"_a = py::none(),
             "up_group"_a = 0, "down_group"_a = 0, "shifts"_a = 0,
             "Each view: (address of slot 0, bytes to the next slot, to the next row, to the next "
             "element of a row); scales of quantised matrices: (address of slot 0, bytes to the "
             "next); groups of int4_group: columns that share a scale. shifts: address of uint32 "
             "[S], bytes that each slot's page lies further on; 0: none does.");

    py::class_<FfnRun>(m, "FfnRun")
        .def_property_readonly("experts", &FfnRun::experts)
        .def(
            "compute",
            [](FfnRun& self, const FfnWeights& weights,
               const std::vector<std::pair<int32_t, int32_t>>& ready) {
                self.compute(weights, ready);
            },
            "weights"_a, "ready"_a, ReleaseGil(), "ready: (index in experts, slot)")
        .def(
            "compute_all",
            [](FfnRun& self, const FfnWeights& weights) {
                std::vector<std::pair<int32_t, int32_t>> ready;
                for (size_t i = 0; i < self.experts().size(); ++i)
                    ready.emplace_back(static_cast<int32_t>(i), self.experts()[i]);
                self.compute(weights, ready);
            },
            "weights"_a, ReleaseGil(), "Every expert, expert e in slot e.")
        .def(
            "finish",
            [](FfnRun& self, uintptr_t out) { self.finish(reinterpret_cast<void*>(out)); }, "out"_a,
            ReleaseGil(), "Write [T, H] in the weights' dtype.");

    py::class_<ExpertFfn>(m, "ExpertFfn")
        .def(py::init(&make_ffn), py::kw_only(), "hidden"_a, "inner"_a, "num_experts"_a, "dtype"_a,
             "activation"_a, "gated"_a, "alpha"_a = 1.0f, "limit"_a = 0.0f, "offset"_a = 0.0f,
             "isa"_a = "auto")
        .def_property_readonly("isa", [](const ExpertFfn& self) { return self.kernels->isa; })
        .def("start", &start, "hidden"_a, "topk_ids"_a, "ids_are_int64"_a, "topk_weights"_a,
             "weights_dtype"_a, "num_tokens"_a, "top_k"_a, "num_threads"_a, "rows_apart"_a = false);
}
