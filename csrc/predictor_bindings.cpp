#include "predictor_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <optional>
#include <string>
#include <tuple>

#include "predictors/dense.h"
#include "predictors/ranking.h"
#include "predictors/rpp_step.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moe_offload {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

size_t size_of(py::ssize_t size) { return static_cast<size_t>(size); }

Floats dense(const Floats& x, const Floats& w, const std::string& isa) {
    if (x.ndim() != 2 || w.ndim() != 2 || x.shape(1) != w.shape(0))
        throw std::invalid_argument("dense: expected x [rows, inner] and w [inner, columns], got " +
                                    py::str(x.attr("shape")).cast<std::string>() + " and " +
                                    py::str(w.attr("shape")).cast<std::string>());
    const SmallProducts* products = isa.empty() ? &small_products() : nullptr;
    for (const SmallProducts* each : all_small_products())
        if (isa == each->isa) products = each;
    if (!products) throw std::invalid_argument("dense: this machine has no " + isa);
    Floats out({x.shape(0), w.shape(1)});
    const size_t rows = size_of(x.shape(0)), inner = size_of(x.shape(1));
    const size_t columns = size_of(w.shape(1));
    products->dense({x.data(), inner}, {w.data(), columns}, out.mutable_data(), columns, rows,
                    inner, columns, false);
    return out;
}

std::vector<std::string> small_product_isas() {
    std::vector<std::string> names;
    for (const SmallProducts* each : all_small_products()) names.emplace_back(each->isa);
    return names;
}

// Keeps the arrays whose memory RppStep reads.
class BoundRpp {
  public:
    // tensors: embed, token, head, bias, positions; blocks: six matrices each, memory: keys and
    // values of the prompt each, as rpp_step.h says.
    BoundRpp(const py::dict& tensors, const std::vector<std::vector<Floats>>& blocks,
             const std::vector<std::pair<Floats, Floats>>& memory, std::vector<float> hidden) {
        if (blocks.empty() || blocks.size() != memory.size())
            throw std::invalid_argument("rpp: expected as many prompt memories as blocks, got " +
                                        std::to_string(memory.size()) + " and " +
                                        std::to_string(blocks.size()));
        RppWeights weights;
        RppShape& shape = weights.shape;
        const Floats embed = keep(tensors["embed"], "embed"),
                     token = keep(tensors["token"], "token");
        const Floats head = keep(tensors["head"], "head");
        const Floats positions = keep(tensors["positions"], "positions");
        const Floats& keys = memory[0].first;  // [batch, heads, d_kv, prompt]
        if (keys.ndim() != 4)
            throw std::invalid_argument("rpp: expected keys [batch, heads, d_kv, prompt]");
        shape.vocab = size_of(embed.shape(0));
        shape.d_model = size_of(embed.shape(1));
        shape.token_width = size_of(token.shape(1));
        shape.num_heads = size_of(keys.shape(1));
        shape.d_kv = size_of(keys.shape(2));
        shape.outputs = size_of(head.shape(1));
        shape.max_decoded = size_of(positions.shape(1));
        if (blocks[0].size() == 6 && blocks[0][4].ndim() == 3) {
            shape.panel = size_of(blocks[0][4].shape(2));
            shape.d_ff = size_of(blocks[0][4].shape(0)) * shape.panel;
        }
        const size_t batch = size_of(keys.shape(0)), prompt = size_of(keys.shape(3));
        const size_t d_model = shape.d_model, inner = shape.inner();
        weights.embed = embed.data();
        weights.token = token.data();
        weights.head = head.data();
        weights.positions = positions.data();
        weights.bias = keep(tensors["bias"], "bias", 1).data();
        expect(token, shape.vocab, shape.token_width, "token");
        expect(head, d_model + shape.token_width, shape.outputs, "head");
        expect(positions, shape.num_heads, shape.max_decoded, "positions");
        if (size_of(arrays_.back().size()) != shape.outputs)
            throw std::invalid_argument("rpp: expected one bias per output");
        const size_t sizes[6][2] = {{d_model, 3 * inner},  {inner, d_model},
                                    {d_model, inner},      {inner, d_model},
                                    {d_model, shape.d_ff}, {shape.d_ff, d_model}};
        for (const auto& block : blocks) {
            const float* data[6];
            if (block.size() != 6)
                throw std::invalid_argument("rpp: expected six matrices per block, got " +
                                            std::to_string(block.size()));
            for (size_t i = 0; i < 6; ++i) {
                if (i == 4) continue;
                data[i] = keep(block[i], "a block's matrix").data();
                expect(block[i], sizes[i][0], sizes[i][1], "a block's matrix");
            }
            data[4] = keep(block[4], "a block's panels", 3).data();
            if (size_of(block[4].size()) != d_model * shape.d_ff ||
                size_of(block[4].shape(2)) != shape.panel)
                throw std::invalid_argument("rpp: the blocks' panels differ in size");
            weights.blocks.push_back({data[0], data[1], data[2], data[3], data[4], data[5]});
        }
        std::vector<RppMemory> read;
        for (const auto& [k, v] : memory) {
            const size_t expected = batch * inner * prompt;
            if (size_of(k.size()) != expected || size_of(v.size()) != expected)
                throw std::invalid_argument("rpp: keys and values of the prompt differ in size");
            read.push_back({keep(k, "keys", 4).data(), keep(v, "values", 4).data()});
        }
        if (!hidden.empty() && hidden.size() != batch * prompt)
            throw std::invalid_argument("rpp: expected one number per prompt position");
        step_ = std::make_unique<RppStep>(std::move(weights), std::move(read), std::move(hidden),
                                          batch, prompt);
    }

    Floats step(const Ids& tokens, bool chances) {
        Floats out({static_cast<py::ssize_t>(step_->batch()),
                    static_cast<py::ssize_t>(step_->shape().outputs)});
        const std::span<const int64_t> ids{tokens.data(), size_of(tokens.size())};
        const std::span<float> values{out.mutable_data(), size_of(out.size())};
        py::gil_scoped_release release;
        step_->step(ids, values);
        if (chances) small_products().logistic(values.data(), values.size());
        return out;
    }

  private:
    Floats keep(const py::object& given, const char* name, py::ssize_t dimensions = 2) {
        auto array = given.cast<Floats>();
        if (array.ndim() != dimensions)
            throw std::invalid_argument("rpp: expected " + std::to_string(dimensions) +
                                        " dimensions of " + name + ", got " +
                                        std::to_string(array.ndim()));
        arrays_.push_back(array);
        return array;
    }
    static void expect(const Floats& array, size_t rows, size_t columns, const char* name) {
        if (size_of(array.shape(0)) != rows || size_of(array.shape(1)) != columns)
            throw std::invalid_argument(std::string("rpp: expected ") + name + " to be [" +
                                        std::to_string(rows) + ", " + std::to_string(columns) +
                                        "], got [" + std::to_string(array.shape(0)) + ", " +
                                        std::to_string(array.shape(1)) + "]");
    }

    std::vector<Floats> arrays_;
    std::unique_ptr<RppStep> step_;
};

Ranking ranking(const Floats& scores) {
    if (scores.ndim() != 2 || scores.shape(0) < 1)
        throw std::invalid_argument("Ranking: expected scores [rows, experts], got " +
                                    py::str(scores.attr("shape")).cast<std::string>());
    return {std::vector<float>(scores.data(), scores.data() + scores.size()),
            size_of(scores.shape(0))};
}

// None where the call had other tokens than were predicted.
std::optional<std::tuple<int64_t, int64_t, int64_t>> found(const Ranking& ranking, const Ids& used,
                                                           size_t near, size_t deep) {
    if (used.ndim() != 2)
        throw std::invalid_argument("Ranking: expected ids [rows, top_k], got " +
                                    py::str(used.attr("shape")).cast<std::string>());
    if (size_of(used.shape(0)) != ranking.rows()) return std::nullopt;
    const Found found = ranking.found({used.data(), size_of(used.size())}, near, deep);
    return std::tuple{found.tokens, found.near, found.deep};
}

template <typename T>
std::vector<T> copy_of(std::span<const T> values) {
    return {values.begin(), values.end()};
}

void check_experts(const Ranking& ranking, const std::vector<int32_t>& experts) {
    for (const int32_t expert : experts)
        if (expert < 0 || static_cast<size_t>(expert) >= ranking.order().size())
            throw std::invalid_argument("Ranking: expected experts in [0, " +
                                        std::to_string(ranking.order().size()) + "), got " +
                                        std::to_string(expert));
}

}  // namespace

void bind_predictors(py::module_& m) {
    py::class_<Chances>(m, "Chances")
        .def(py::init<>())
        .def("chance", &Chances::chance, "score"_a)
        .def("learn", &Chances::learn, "score"_a, "used"_a)
        .def("fade", &Chances::fade);
    py::class_<Ranking>(m, "Ranking")
        .def(py::init(&ranking), "scores"_a)
        .def_property_readonly("rows", &Ranking::rows)
        .def_property_readonly("chance", [](const Ranking& r) { return copy_of(r.chance()); })
        .def_property_readonly("order", [](const Ranking& r) { return copy_of(r.order()); })
        .def("likely", &Ranking::likely, "chances"_a, "threshold"_a, "count"_a)
        .def("found", &found, "used"_a, "near"_a, "deep"_a)
        .def(
            "teach",
            [](const Ranking& r, Chances& chances, const std::vector<int32_t>& absent,
               const Ids& used) {
                check_experts(r, absent);
                r.teach(chances, absent, {used.data(), size_of(used.size())});
            },
            "chances"_a, "absent"_a, "used"_a);
    m.def("dense", &dense, "x"_a, "w"_a, "isa"_a = "");
    m.def("dense_isas", &small_product_isas);
    py::class_<BoundRpp>(m, "RppStep")
        .def(py::init<const py::dict&, const std::vector<std::vector<Floats>>&,
                      const std::vector<std::pair<Floats, Floats>>&, std::vector<float>>(),
             "tensors"_a, "blocks"_a, "memory"_a, "hidden"_a)
        .def("step", &BoundRpp::step, "tokens"_a, "chances"_a);
}

}  // namespace moe_offload
