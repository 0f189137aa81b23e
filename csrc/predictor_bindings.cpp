#include "predictor_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <string>

#include "predictors/dense.h"
#include "predictors/fetch_ahead.h"
#include "predictors/ranking.h"
#include "predictors/rpp_step.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moe_offload {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

size_t size_of(py::ssize_t size) { return static_cast<size_t>(size); }

const SmallProducts& products_of(const std::string& isa) {
    if (isa.empty()) return small_products();
    for (const SmallProducts* each : all_small_products())
        if (isa == each->isa) return *each;
    throw std::invalid_argument("dense: this machine has no " + isa);
}

Floats dense(const Floats& x, const Floats& w, const std::string& isa) {
    if (x.ndim() != 2 || w.ndim() != 2 || x.shape(1) != w.shape(0))
        throw std::invalid_argument("dense: expected x [rows, inner] and w [inner, columns], got " +
                                    py::str(x.attr("shape")).cast<std::string>() + " and " +
                                    py::str(w.attr("shape")).cast<std::string>());
    Floats out({x.shape(0), w.shape(1)});
    const size_t rows = size_of(x.shape(0)), inner = size_of(x.shape(1));
    const size_t columns = size_of(w.shape(1));
    products_of(isa).dense({x.data(), inner}, {w.data(), columns}, out.mutable_data(), columns,
                           rows, inner, columns, false);
    return out;
}

// For tests: x [rows, inner] times a packed matrix [inner, columns].
Floats packed_product(const Floats& x, const Halves& w, size_t columns, const std::string& isa) {
    if (x.ndim() != 2 || w.ndim() != 3 || x.shape(1) != w.shape(1) || w.shape(2) != kPanel ||
        size_of(w.shape(0)) != (columns + kPanel - 1) / kPanel)
        throw std::invalid_argument(
            "packed_product: expected x [rows, inner] and w [panels, "
            "inner, 64] for so many columns");
    Floats out({x.shape(0), static_cast<py::ssize_t>(columns)});
    const size_t rows = size_of(x.shape(0)), inner = size_of(x.shape(1));
    products_of(isa).packed({x.data(), inner}, {w.data(), inner, columns}, out.mutable_data(),
                            columns, rows, false);
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
    // tensors: embed, token, bias, positions; head, and blocks: six matrices each, are packed;
    // memory: keys and values of the prompt for each block, as rpp_step.h says.
    BoundRpp(const py::dict& tensors, const Halves& head,
             const std::vector<std::vector<Halves>>& blocks,
             const std::vector<std::pair<Floats, Floats>>& memory, std::vector<float> hidden) {
        if (blocks.empty() || blocks.size() != memory.size())
            throw std::invalid_argument("rpp: expected as many prompt memories as blocks, got " +
                                        std::to_string(memory.size()) + " and " +
                                        std::to_string(blocks.size()));
        RppWeights weights;
        RppShape& shape = weights.shape;
        const Floats embed = keep(tensors["embed"], "embed"),
                     token = keep(tensors["token"], "token");
        const Floats positions = keep(tensors["positions"], "positions");
        const Floats& keys = memory[0].first;  // [batch, heads, d_kv, prompt]
        if (keys.ndim() != 4)
            throw std::invalid_argument("rpp: expected keys [batch, heads, d_kv, prompt]");
        shape.vocab = size_of(embed.shape(0));
        shape.d_model = size_of(embed.shape(1));
        shape.token_width = size_of(token.shape(1));
        shape.num_heads = size_of(keys.shape(1));
        shape.d_kv = size_of(keys.shape(2));
        shape.max_decoded = size_of(positions.shape(1));
        const Floats bias = keep(tensors["bias"], "bias", 1);
        shape.outputs = size_of(bias.shape(0));
        const size_t batch = size_of(keys.shape(0)), prompt = size_of(keys.shape(3));
        const size_t d_model = shape.d_model, inner = shape.inner();
        if (blocks[0].size() == 6 && blocks[0][5].ndim() == 3)
            shape.d_ff = size_of(blocks[0][5].shape(1));
        weights.embed = embed.data();
        weights.token = token.data();
        weights.head = packed(head, d_model + shape.token_width, shape.outputs, "head");
        weights.positions = positions.data();
        weights.bias = bias.data();
        expect(token, shape.vocab, shape.token_width, "token");
        expect(positions, shape.num_heads, shape.max_decoded, "positions");
        for (const auto& block : blocks) {
            if (block.size() != 6)
                throw std::invalid_argument("rpp: expected six matrices per block, got " +
                                            std::to_string(block.size()));
            weights.blocks.push_back({packed(block[0], d_model, 3 * inner, "qkv"),
                                      packed(block[1], inner, d_model, "out"),
                                      packed(block[2], d_model, inner, "cross_q"),
                                      packed(block[3], inner, d_model, "cross_out"),
                                      packed(block[4], d_model, shape.d_ff, "up"),
                                      packed(block[5], shape.d_ff, d_model, "down")});
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
    // [columns / kPanel, rounded up, inner, kPanel]
    PackedMatrix packed(const Halves& array, size_t inner, size_t columns, const char* name) {
        const size_t panels = (columns + kPanel - 1) / kPanel;
        if (array.ndim() != 3 || size_of(array.shape(0)) != panels ||
            size_of(array.shape(1)) != inner || size_of(array.shape(2)) != kPanel)
            throw std::invalid_argument(std::string("rpp: expected ") + name + " packed as [" +
                                        std::to_string(panels) + ", " + std::to_string(inner) +
                                        ", " + std::to_string(kPanel) + "], got " +
                                        py::str(array.attr("shape")).cast<std::string>());
        matrices_.push_back(array);
        return {array.data(), inner, columns};
    }
    static void expect(const Floats& array, size_t rows, size_t columns, const char* name) {
        if (size_of(array.shape(0)) != rows || size_of(array.shape(1)) != columns)
            throw std::invalid_argument(std::string("rpp: expected ") + name + " to be [" +
                                        std::to_string(rows) + ", " + std::to_string(columns) +
                                        "], got [" + std::to_string(array.shape(0)) + ", " +
                                        std::to_string(array.shape(1)) + "]");
    }

    std::vector<Floats> arrays_;
    std::vector<Halves> matrices_;
    std::unique_ptr<RppStep> step_;
};

Ranking ranking(const Floats& scores) {
    if (scores.ndim() != 2 || scores.shape(0) < 1)
        throw std::invalid_argument("Ranking: expected scores [rows, experts], got " +
                                    py::str(scores.attr("shape")).cast<std::string>());
    return {std::vector<float>(scores.data(), scores.data() + scores.size()),
            size_of(scores.shape(0))};
}

// Does nothing where the call had other tokens than were predicted.
void add_found(FoundPerLayer& sums, size_t layer, const Ranking& ranking, const Ids& used,
               size_t near, size_t deep) {
    if (used.ndim() != 2)
        throw std::invalid_argument("FoundPerLayer: expected ids [rows, top_k], got " +
                                    py::str(used.attr("shape")).cast<std::string>());
    if (size_of(used.shape(0)) == ranking.rows())
        sums.add(layer, ranking.found({used.data(), size_of(used.size())}, near, deep));
}

// tokens, near, deep: [3, layers]
py::array_t<int64_t> sums_of(const FoundPerLayer& sums) {
    const size_t layers = sums.layers().size();
    py::array_t<int64_t> out({py::ssize_t{3}, static_cast<py::ssize_t>(layers)});
    for (size_t i = 0; i < layers; ++i) {
        const Found& found = sums.layers()[i];
        int64_t* const row = out.mutable_data() + i;
        row[0] = found.tokens;
        row[layers] = found.near;
        row[2 * layers] = found.deep;
    }
    return out;
}

py::tuple fetch_ahead_of(Pager& pager, int32_t layer, const Ranking& ranking,
                         const Chances& chances, double threshold, size_t most, size_t budget,
                         std::vector<int32_t> started) {
    Ahead ahead;
    {
        py::gil_scoped_release release;
        ahead = fetch_ahead(pager, layer, ranking, chances, {threshold, most, budget}, started);
    }
    return py::make_tuple(ahead.any_likely, ahead.absent, ahead.begun, ahead.begun == ahead.chosen,
                          started);
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
        .def(
            "teach",
            [](const Ranking& r, Chances& chances, const std::vector<int32_t>& absent,
               const Ids& used) {
                check_experts(r, absent);
                r.teach(chances, absent, {used.data(), size_of(used.size())});
            },
            "chances"_a, "absent"_a, "used"_a);
    py::class_<FoundPerLayer>(m, "FoundPerLayer")
        .def(py::init<size_t>(), "num_layers"_a)
        .def("add", &add_found, "layer"_a, "ranking"_a, "used"_a, "near"_a, "deep"_a)
        .def("sums", &sums_of);
    m.def("fetch_ahead", &fetch_ahead_of, "pager"_a, "layer"_a, "ranking"_a, "chances"_a,
          "threshold"_a, "most"_a, "budget"_a, "started"_a);
    m.def("tell_policy", &tell_policy, "pager"_a, "layer"_a, "ranking"_a,
          py::call_guard<py::gil_scoped_release>());
    m.def("dense", &dense, "x"_a, "w"_a, "isa"_a = "");
    m.def("packed_product", &packed_product, "x"_a, "w"_a, "columns"_a, "isa"_a = "");
    m.attr("PANEL") = kPanel;
    m.def("dense_isas", &small_product_isas);
    py::class_<BoundRpp>(m, "RppStep")
        .def(py::init<const py::dict&, const Halves&, const std::vector<std::vector<Halves>>&,
                      const std::vector<std::pair<Floats, Floats>>&, std::vector<float>>(),
             "tensors"_a, "head"_a, "blocks"_a, "memory"_a, "hidden"_a)
        .def("step", &BoundRpp::step, "tokens"_a, "chances"_a);
}

}  // namespace moe_offload
