// The Python module moe_offload._cuda: addresses are integers, a stream is its handle. Arguments
// are checked by moe_offload/cuda_kernels.py, which is the public edge; this file only carries
// them over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "expert_gemm/cuda/launch.h"

namespace py = pybind11;
using namespace py::literals;
using namespace moe_offload::cuda;

namespace {

// A field that is an address, as an integer (0: null).
template <class T>
auto address_of(T* ExpertParams::* field) {
    return py::cpp_function(
        [field](const ExpertParams& p) { return reinterpret_cast<uintptr_t>(p.*field); });
}
template <class T>
auto set_address(T* ExpertParams::* field) {
    return py::cpp_function(
        [field](ExpertParams& p, uintptr_t value) { p.*field = reinterpret_cast<T*>(value); });
}

Stream stream_of(uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Expert kernels in CUDA C++. Use moe_offload.cuda_kernels, which checks arguments.";
    static py::exception<CudaError> cuda_error(m, "CudaError", PyExc_RuntimeError);

    // Local: tests load these bindings a second time, over the emulated kernels.
    py::class_<ExpertParams> params(m, "ExpertParams", py::module_local());
    params.def(py::init([] { return ExpertParams{}; }));
#define ADDRESS(name) \
    params.def_property(#name, address_of(&ExpertParams::name), set_address(&ExpertParams::name))
    ADDRESS(x);
    ADDRESS(route_of_row);
    ADDRESS(row_of_route);
    ADDRESS(topk_weights);
    ADDRESS(groups);
    ADDRESS(active_experts);
    ADDRESS(expert_offsets);
    ADDRESS(num_groups);
    ADDRESS(total_groups);
    ADDRESS(inner);
    ADDRESS(partial);
    ADDRESS(tickets);
    ADDRESS(out);
#undef ADDRESS
    params.def_readwrite("num_tokens", &ExpertParams::num_tokens)
        .def_readwrite("top_k", &ExpertParams::top_k)
        .def_readwrite("hidden", &ExpertParams::hidden)
        .def_readwrite("inner_size", &ExpertParams::inner_size)
        .def_readwrite("max_groups", &ExpertParams::max_groups)
        .def_readwrite("gated", &ExpertParams::gated)
        .def_readwrite("interleaved", &ExpertParams::interleaved)
        .def_readwrite("alpha", &ExpertParams::alpha)
        .def_readwrite("limit", &ExpertParams::limit)
        .def_readwrite("offset", &ExpertParams::offset)
        .def_property(
            "dtype", [](const ExpertParams& p) { return int(p.dtype); },
            [](ExpertParams& p, int value) { p.dtype = DType(value); })
        .def_property(
            "activation", [](const ExpertParams& p) { return int(p.activation); },
            [](ExpertParams& p, int value) { p.activation = Activation(value); })
        .def(
            "set_pages",
            [](ExpertParams& p, uintptr_t slab, int64_t slot_stride, uintptr_t page_table,
               uintptr_t slot_of, int64_t up_offset, int64_t down_offset, int64_t up_bias_offset,
               int64_t down_bias_offset, int64_t up_scale_offset, int64_t down_scale_offset,
               int format, int log2_group, bool transposed) {
                p.pages = {reinterpret_cast<const unsigned char*>(slab),
                           slot_stride,
                           reinterpret_cast<const uint64_t*>(page_table),
                           reinterpret_cast<const int32_t*>(slot_of),
                           up_offset,
                           down_offset,
                           up_bias_offset,
                           down_bias_offset,
                           up_scale_offset,
                           down_scale_offset,
                           WeightFormat(format),
                           log2_group,
                           transposed};
            },
            py::kw_only(), "slab"_a, "slot_stride"_a, "page_table"_a, "slot_of"_a, "up_offset"_a,
            "down_offset"_a, "up_bias_offset"_a, "down_bias_offset"_a, "up_scale_offset"_a = -1,
            "down_scale_offset"_a = -1, "format"_a = 0, "log2_group"_a = 0, "transposed"_a = false)
        // The two of every call, by position: a keyword argument costs as much as a field.
        .def("set_where",
             [](ExpertParams& p, uintptr_t slab, int64_t slot_stride, uintptr_t page_table,
                uintptr_t slot_of) {
                 p.pages.slab = reinterpret_cast<const unsigned char*>(slab);
                 p.pages.slot_stride = slot_stride;
                 p.pages.page_table = reinterpret_cast<const uint64_t*>(page_table);
                 p.pages.slot_of = reinterpret_cast<const int32_t*>(slot_of);
             })
        .def("set_call",
             [](ExpertParams& p, uintptr_t x, uintptr_t topk_weights, uintptr_t route_of_row,
                uintptr_t row_of_route, uintptr_t total_groups, uintptr_t inner, uintptr_t partial,
                uintptr_t tickets, uintptr_t out, int num_tokens, int top_k) {
                 p.x = reinterpret_cast<const void*>(x);
                 p.topk_weights = reinterpret_cast<const float*>(topk_weights);
                 p.route_of_row = reinterpret_cast<const int32_t*>(route_of_row);
                 p.row_of_route = reinterpret_cast<const int32_t*>(row_of_route);
                 p.total_groups = reinterpret_cast<const int32_t*>(total_groups);
                 p.inner = reinterpret_cast<void*>(inner);
                 p.partial = reinterpret_cast<void*>(partial);
                 p.tickets = reinterpret_cast<int32_t*>(tickets);
                 p.out = reinterpret_cast<void*>(out);
                 p.num_tokens = num_tokens;
                 p.top_k = top_k;
             })
        .def("copy", [](const ExpertParams& p) { return p; });

    m.def(
        "launch_decode",
        [](const ExpertParams& p, const std::tuple<int, int, int>& variant, bool dependent,
           uintptr_t stream) {
            const auto [token_groups, up_warps, down_warps] = variant;
            launch_decode(p, {token_groups, up_warps, down_warps}, dependent, stream_of(stream));
        },
        "params"_a, "variant"_a, "dependent"_a, "stream"_a);
    m.def(
        "launch_prefill",
        [](const ExpertParams& p, int block_m, uintptr_t stream) {
            launch_prefill(p, block_m, stream_of(stream));
        },
        "params"_a, "block_m"_a, "stream"_a);
    m.def(
        "launch_prefill_sm90",
        [](const ExpertParams& p, int64_t num_slots, int block_m, uintptr_t stream) {
            launch_prefill_sm90(p, num_slots, block_m, stream_of(stream));
        },
        "params"_a, "num_slots"_a, "block_m"_a, "stream"_a);
    m.def(
        "launch_combine",
        [](const ExpertParams& p, uintptr_t stream) { launch_combine(p, stream_of(stream)); },
        "params"_a, "stream"_a);
    m.def(
        "choose_decode",
        [](int num_tokens, int top_k, int num_experts, int hidden, int inner_size, int format,
           bool transposed) {
            const DecodeVariant v =
                choose_decode(num_tokens, top_k, num_experts, hidden, inner_size,
                              bits_of(WeightFormat(format)), transposed);
            return std::tuple(v.token_groups, v.up_warps, v.down_warps);
        },
        "num_tokens"_a, "top_k"_a, "num_experts"_a, "hidden"_a, "inner_size"_a, "format"_a = 0,
        "transposed"_a = false);
    m.def("use_decode", &use_decode, "num_tokens"_a, "top_k"_a, "num_experts"_a);
    m.def("choose_block_m", &choose_block_m, "num_tokens"_a, "top_k"_a, "num_experts"_a);
    m.def("architectures", [] { return std::string(MOE_OFFLOAD_CUDA_ARCHS); });
}
