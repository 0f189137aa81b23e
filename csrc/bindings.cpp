// The Python face of the paging core: `moe_offload._core`.
//
// Raw addresses in, no torch: torch owns slots and tensors on the Python side and passes
// data_ptr(). Waits release the GIL. A Python callback or object held from C++ is only touched
// and destroyed with the GIL held; the pager is destroyed with it released, because joining a
// worker that is waiting for the GIL would never return.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <algorithm>
#include <cstring>
#include <optional>

#include "paging/cuda_copy_engine.h"
#include "paging/disk_roof.h"
#include "paging/errors.h"
#include "paging/file_source.h"
#include "paging/huge_pages.h"
#include "paging/make_copy_engine.h"
#include "paging/memory_source.h"
#include "paging/pager.h"
#include "paging/policies/path_predictor.h"
#include "predictor_bindings.h"
#include "replay_bindings.h"

namespace py = pybind11;
using namespace moe_offload;
using namespace pybind11::literals;

namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

class TensorSource final : public MemorySource {
  public:
    ~TensorSource() override {
        py::gil_scoped_acquire gil;
        owners = py::object();
    }
    py::object owners = py::none();
};

// Pages made by Python, fill(layer, expert, address) -> bytes read from storage, on a worker
// thread under the GIL.
class CallbackSource final : public PageSource {
  public:
    CallbackSource(py::function fill, uint64_t page_bytes)
        : fill_(std::move(fill)), page_bytes_(page_bytes) {}
    ~CallbackSource() override {
        py::gil_scoped_acquire gil;
        fill_ = py::function();
    }

    std::vector<Chunk> chunks(int32_t, int32_t, size_t) const override {
        return {{0, 0, page_bytes_, {}}};
    }
    uint64_t read(int32_t layer, int32_t expert, const Chunk&, std::byte* page,
                  Scratch&) const override {
        py::gil_scoped_acquire gil;
        try {
            return fill_(layer, expert, reinterpret_cast<uintptr_t>(page)).cast<uint64_t>();
        } catch (const py::error_already_set& error) {
            // The Python exception must not leave the GIL; its class and text go on as words.
            const auto name = error.type().attr("__name__").cast<std::string>();
            throw PageReadError(name + ": " + py::str(error.value()).cast<std::string>());
        }
    }

  private:
    py::function fill_;
    uint64_t page_bytes_;
};

void destroy_pager(Pager* pager) {
    if (Py_IsInitialized() && PyGILState_Check()) {
        py::gil_scoped_release release;
        delete pager;
    } else {
        delete pager;
    }
}

// A CUDA device whose context is held, and what identifies it.
struct CudaDevice {
    std::shared_ptr<CudaContext> context;
    CudaDriver::DeviceInfo info;

    CudaDevice(int ordinal, const std::string& library)
        : context(std::make_shared<CudaContext>(CudaDriver::load(library), ordinal)),
          info(context->driver().device(ordinal)) {}
};

// Puts the device's copy engine in front of the host's, which then fills the host tier; null for
// sources in memory, which need no reading.
std::unique_ptr<CopyEngine> on_device(const CudaDevice& device,
                                      const std::shared_ptr<PageSource>& source,
                                      std::unique_ptr<CopyEngine> reader,
                                      const PagerOptions& options, size_t page_bytes,
                                      size_t copy_chunk_bytes, size_t host_bytes,
                                      bool pin_in_background) {
    CudaCopyOptions copy;
    copy.chunk_bytes = copy_chunk_bytes;
    copy.page_bytes = page_bytes;
    copy.num_layers = options.num_experts.size();
    copy.experts_per_layer = static_cast<size_t>(
        *std::max_element(options.num_experts.begin(), options.num_experts.end()));
    copy.host_bytes = host_bytes;
    copy.pin_bytes = host_bytes;
    copy.pin_in_background = pin_in_background;
    return std::make_unique<CudaCopyEngine>(device.context, source, std::move(reader), copy);
}

// PagerOptions::shifts as the source wants them; a page must stay within its slot.
std::vector<uint32_t> page_shifts(const PageSource& source, const std::vector<int32_t>& num_experts,
                                  size_t page_bytes, size_t slot_stride) {
    const int32_t stride = *std::max_element(num_experts.begin(), num_experts.end());
    std::vector<uint32_t> shifts(num_experts.size() * static_cast<size_t>(stride), 0);
    for (size_t layer = 0; layer < num_experts.size(); ++layer)
        for (int32_t expert = 0; expert < num_experts[layer]; ++expert) {
            const uint32_t shift = source.shift(static_cast<int32_t>(layer), expert);
            if (page_bytes == 0 || shift + page_bytes > slot_stride)
                throw std::invalid_argument("Pager: a page of " + std::to_string(page_bytes) +
                                            " bytes shifted by " + std::to_string(shift) +
                                            " does not fit a slot of " +
                                            std::to_string(slot_stride));
            shifts[layer * static_cast<size_t>(stride) + static_cast<size_t>(expert)] = shift;
        }
    return shifts;
}

std::shared_ptr<Pager> make_pager(std::shared_ptr<PageSource> source,
                                  std::vector<int32_t> num_experts,
                                  std::vector<std::string> layer_names, uintptr_t slots,
                                  size_t num_slots, size_t slot_stride, const std::string& policy,
                                  const std::vector<std::pair<int32_t, int32_t>>& kept,
                                  size_t admit_limit, const std::string& io_engine, int num_threads,
                                  int queue_depth, size_t chunk_bytes, double wait_timeout_s,
                                  const CudaDevice* cuda, size_t page_bytes,
                                  size_t copy_chunk_bytes, size_t host_bytes,
                                  bool pin_in_background, bool shift_pages, bool swap_back) {
    if (num_experts.empty()) throw std::invalid_argument("Pager: expected at least one layer");
    if (num_threads < 1 || queue_depth < 1)
        throw std::invalid_argument("Pager: expected num_threads and queue_depth >= 1");
    if (chunk_bytes == 0 || chunk_bytes % Scratch::kAlign != 0)
        throw std::invalid_argument("Pager: expected chunk_bytes to be a multiple of 4096");
    const int32_t stride = *std::max_element(num_experts.begin(), num_experts.end());
    size_t num_pages = 0;
    for (const int32_t count : num_experts) num_pages += static_cast<size_t>(count);
    std::vector<PageIndex> kept_pages;
    for (const auto& [layer, expert] : kept) {
        if (layer < 0 || static_cast<size_t>(layer) >= num_experts.size() || expert < 0 ||
            expert >= num_experts[static_cast<size_t>(layer)])
            throw std::invalid_argument("static policy: no expert " + std::to_string(expert) +
                                        " in layer " + std::to_string(layer));
        kept_pages.push_back(static_cast<PageIndex>(layer * stride + expert));
    }
    if (kept_pages.size() < num_pages && kept_pages.size() + kMinSlots > num_slots)
        throw std::invalid_argument("static policy: " + std::to_string(kept_pages.size()) +
                                    " kept pages leave fewer than " + std::to_string(kMinSlots) +
                                    " of " + std::to_string(num_slots) +
                                    " slots for the others. Keep fewer, or raise the budget.");
    PagerOptions options;
    options.num_experts = std::move(num_experts);
    options.layer_names = std::move(layer_names);
    options.slots = reinterpret_cast<std::byte*>(slots);
    options.num_slots = num_slots;
    options.slot_stride = slot_stride;
    if (shift_pages)
        options.shifts = page_shifts(*source, options.num_experts, page_bytes, slot_stride);
    options.admit_limit = admit_limit;
    if (swap_back && cuda)
        throw std::invalid_argument(
            "Pager: swap_back copies between host memories only; slots on a GPU cannot have it");
    if (swap_back) {
        if (page_bytes == 0 || page_bytes > slot_stride)
            throw std::invalid_argument("Pager: expected page_bytes in [1, " +
                                        std::to_string(slot_stride) + "] for swap_back, got " +
                                        std::to_string(page_bytes));
        options.swap_back = std::make_shared<SwapBack>(page_bytes);
    }
    options.wait_timeout_ns = static_cast<int64_t>(wait_timeout_s * 1e9);
    auto rule = make_policy(policy, {.num_experts = options.num_experts,
                                     .num_slots = num_slots,
                                     .kept = std::move(kept_pages),
                                     .next_request = {}});
    std::unique_ptr<CopyEngine> engine;
    if (!cuda || !source->in_memory())
        engine = make_copy_engine(source, {io_engine, num_threads, queue_depth, chunk_bytes});
    if (cuda)
        engine = on_device(*cuda, source, std::move(engine), options, page_bytes, copy_chunk_bytes,
                           host_bytes, pin_in_background);
    return {new Pager(std::move(options), std::move(rule), std::move(engine)), destroy_pager};
}

py::dict counters_dict(const Pager& pager) {
    const std::vector<LayerCounters> layers = pager.counters();
    py::dict result;
    const auto put = [&](const char* name, uint64_t LayerCounters::* field) {
        py::list values;
        for (const LayerCounters& layer : layers) values.append(layer.*field);
        result[name] = values;
    };
    put("acquires", &LayerCounters::acquires);
    put("lookups", &LayerCounters::lookups);
    put("hits", &LayerCounters::hits);
    put("prefetch_hits", &LayerCounters::prefetch_hits);
    put("joined_prefetches", &LayerCounters::joined_prefetches);
    put("demand_misses", &LayerCounters::demand_misses);
    put("bypasses", &LayerCounters::bypasses);
    put("evictions", &LayerCounters::evictions);
    put("demand_bytes", &LayerCounters::demand_bytes);
    put("prefetch_bytes_used", &LayerCounters::prefetch_bytes_used);
    put("prefetch_bytes_wasted", &LayerCounters::prefetch_bytes_wasted);
    put("fill_bytes", &LayerCounters::fill_bytes);
    put("disk_bytes", &LayerCounters::disk_bytes);
    put("swap_back_bytes", &LayerCounters::swap_back_bytes);
    put("stall_ns", &LayerCounters::stall_ns);
    put("overlap_ns", &LayerCounters::overlap_ns);
    return result;
}

py::tuple timeline_tuple(const Pager& pager) {
    static constexpr const char* kNames[] = {"demand_copy", "prefetch_copy", "fill_copy", "stall",
                                             "ticket"};
    const auto [events, dropped] = pager.timeline();
    py::list rows;
    for (const TimelineEvent& event : events)
        rows.append(py::make_tuple(kNames[static_cast<int>(event.kind)], event.layer, event.expert,
                                   event.slot, event.begin_ns, event.end_ns));
    return py::make_tuple(rows, dropped);
}

// The Python class of the same name in moe_offload.errors.
void raise_python(const char* name, const char* message) {
    py::set_error(py::module_::import("moe_offload.errors").attr(name), message);
}

}  // namespace

void bind_expert_ffn(py::module_& m);  // expert_ffn_bindings.cpp

PYBIND11_MODULE(_core, m) {
    m.doc() = "Paging core of moe_offload: experts to slots. Addresses are integers (data_ptr()).";

    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const PageReadError& error) {
            raise_python("PageReadError", error.what());
        } catch (const StateError& error) {
            raise_python("StateError", error.what());
        } catch (const DeviceError& error) {
            raise_python("DeviceError", error.what());
        }
    });

    bind_expert_ffn(m);
    m.attr("MIN_SLOTS") = kMinSlots;
    m.attr("MAX_ROUTED_TOKENS") = kMaxRoutedTokens;
    m.attr("MIN_HOST_FRAMES") = HostTier::kMinFrames;
    m.def("host_frame_bytes", &CudaCopyEngine::frame_stride, "page_bytes"_a,
          "bytes a page occupies in the host tier");
    m.def("policy_names", &policy_names, "live_only"_a);
    bind_predictors(m);
    bind_replay(m);
    m.def("build_info", [] {
        return py::dict("compiler"_a = __VERSION__, "cplusplus"_a = __cplusplus,
                        "pybind11"_a = PYBIND11_TOSTRING(
                            PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR));
    });
    m.def(
        "copy_bytes",
        [](uintptr_t to, uintptr_t from, size_t nbytes) {
            std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes);
        },
        "to"_a, "from_"_a, "nbytes"_a, "memcpy between two addresses the caller owns");
    m.def(
        "advise_huge_pages",
        [](uintptr_t address, size_t nbytes) {
            advise_huge_pages(reinterpret_cast<void*>(address), nbytes);
        },
        "address"_a, "nbytes"_a, "ask for huge pages, before the memory is used");
    m.def(
        "disk_roof",
        [](std::vector<std::string> paths, uint64_t page_bytes, uint64_t chunk_bytes, int depth,
           double seconds, uint64_t seed, bool io_uring, bool huge_pages, uint64_t memory_bytes) {
            const DiskRoof roof = disk_roof({std::move(paths), page_bytes, chunk_bytes, depth,
                                             seconds, seed, io_uring, huge_pages, memory_bytes});
            return std::make_tuple(roof.bytes, roof.seconds, roof.cpu_seconds);
        },
        "paths"_a, py::kw_only(), "page_bytes"_a, "chunk_bytes"_a, "depth"_a, "seconds"_a,
        "seed"_a = 0, "io_uring"_a = false, "huge_pages"_a = true, "memory_bytes"_a = 0,
        ReleaseGil(),
        "Read random pages with O_DIRECT and throw them away: (bytes, seconds, CPU seconds)");
    m.def("why_no_io_uring", &why_no_io_uring, "\"\" when io_uring works here, else why not");

    py::class_<PageSource, std::shared_ptr<PageSource>>(m, "PageSource");
    py::class_<FileSource, PageSource, std::shared_ptr<FileSource>>(m, "FileSource")
        .def(py::init<std::vector<std::string>, bool>(), "paths"_a, "direct"_a)
        .def(
            "add_page",
            [](FileSource& self, int32_t layer, int32_t expert,
               const std::vector<std::tuple<int32_t, uint64_t, uint64_t, uint64_t>>& segments) {
                std::vector<FileSegment> list;
                for (const auto& [file, offset, nbytes, page_offset] : segments)
                    list.push_back({file, offset, nbytes, page_offset});
                self.add_page(layer, expert, std::move(list));
            },
            "layer"_a, "expert"_a, "segments"_a,
            "segments: (file index, file offset, bytes, offset in the page)")
        .def_property_readonly("io_mode", &FileSource::io_mode)
        .def("any_deleted", &FileSource::any_deleted);
    py::class_<TensorSource, PageSource, std::shared_ptr<TensorSource>>(m, "MemorySource")
        .def(py::init<>())
        .def(
            "add_page",
            [](TensorSource& self, int32_t layer, int32_t expert,
               const std::vector<std::tuple<uintptr_t, uint64_t, uint64_t>>& segments) {
                std::vector<MemorySegment> list;
                for (const auto& [address, nbytes, page_offset] : segments)
                    list.push_back(
                        {reinterpret_cast<const std::byte*>(address), nbytes, page_offset});
                self.add_page(layer, expert, std::move(list));
            },
            "layer"_a, "expert"_a, "segments"_a, "segments: (address, bytes, offset in the page)")
        .def("keep_alive",
             [](TensorSource& self, py::object owners) { self.owners = std::move(owners); });
    py::class_<CallbackSource, PageSource, std::shared_ptr<CallbackSource>>(m, "CallbackSource")
        .def(py::init<py::function, uint64_t>(), "fill"_a, "page_bytes"_a);

    py::class_<CudaDevice, std::shared_ptr<CudaDevice>>(m, "CudaDevice")
        .def(py::init<int, std::string>(), "ordinal"_a = 0, "library"_a = "libcuda.so.1",
             "Loads the driver and holds the device's primary context, the one torch uses.")
        .def_property_readonly("ordinal",
                               [](const CudaDevice& self) { return self.context->ordinal(); })
        .def_property_readonly("name", [](const CudaDevice& self) { return self.info.name; })
        .def_property_readonly("capability",
                               [](const CudaDevice& self) {
                                   return std::pair(self.info.capability_major,
                                                    self.info.capability_minor);
                               })
        .def_property_readonly("driver_version", [](const CudaDevice& self) {
            return self.context->driver().version();
        });

    py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket")
        .def(
            "next",
            [](Ticket& self) {
                std::vector<ReadyPage> ready;
                {
                    py::gil_scoped_release release;
                    ready = self.next();
                }
                std::vector<std::pair<int32_t, SlotIndex>> pairs;
                for (const ReadyPage& page : ready) pairs.emplace_back(page.index, page.slot);
                return pairs;
            },
            "Wait for pages: list of (index in the request, slot), [] when all were delivered.")
        .def(
            "release",
            [](Ticket& self, const std::vector<int32_t>& indices) { self.release(indices); },
            "indices"_a, ReleaseGil())
        .def("close", &Ticket::close, ReleaseGil())
        .def("__len__", &Ticket::size)
        .def("__enter__", [](std::shared_ptr<Ticket> self) { return self; })
        .def("__exit__", [](Ticket& self, const py::args&) {
            py::gil_scoped_release release;
            self.close();
        });

    py::class_<PathPredictor>(m, "PathPredictor")
        .def(py::init<std::vector<int32_t>>(), "num_experts"_a)
        .def(
            "observe",
            [](PathPredictor& self, int32_t layer, const std::vector<int32_t>& experts,
               int32_t num_tokens, const std::vector<int32_t>& routes) {
                self.observe(layer, experts, num_tokens, routes);
            },
            "layer"_a, "experts"_a, "num_tokens"_a = 1, "routes"_a = std::vector<int32_t>{})
        .def("predict", &PathPredictor::predict, "layer"_a);

    py::class_<Pager, std::shared_ptr<Pager>>(m, "Pager")
        .def(py::init(&make_pager), py::kw_only(), "source"_a, "num_experts"_a, "layer_names"_a,
             "slots"_a, "num_slots"_a, "slot_stride"_a, "policy"_a = "lru",
             "kept"_a = std::vector<std::pair<int32_t, int32_t>>{}, "admit_limit"_a = 0,
             "io_engine"_a = "auto", "num_threads"_a = 4, "queue_depth"_a = 4,
             "chunk_bytes"_a = 1 << 20, "wait_timeout_s"_a = 120.0, "cuda"_a = nullptr,
             "page_bytes"_a = 0, "copy_chunk_bytes"_a = 8 << 20, "host_bytes"_a = 0,
             "pin_in_background"_a = true, "shift_pages"_a = false, "swap_back"_a = false)
        .def(
            "acquire",
            [](Pager& self, int32_t layer, const std::vector<int32_t>& experts,
               const std::vector<float>& weights, int32_t num_tokens,
               std::optional<StreamHandle> stream, const std::vector<int32_t>& routes) {
                return self.acquire(layer, experts, weights, num_tokens, stream, routes);
            },
            "layer"_a, "experts"_a, "weights"_a = std::vector<float>{}, "num_tokens"_a = 0,
            "stream"_a = std::nullopt, "routes"_a = std::vector<int32_t>{}, ReleaseGil())
        .def(
            "prefetch",
            [](Pager& self, int32_t layer, const std::vector<int32_t>& experts) {
                return self.prefetch(layer, experts);
            },
            "layer"_a, "experts"_a, ReleaseGil())
        .def(
            "expect",
            [](Pager& self, int32_t layer, const std::vector<int32_t>& experts) {
                return self.expect(layer, experts);
            },
            "layer"_a, "experts"_a, ReleaseGil(),
            "Absent ones of these experts; the resident ones are kept from prefetches' victims.")
        .def(
            "read_ahead", &Pager::read_ahead, "layer"_a, ReleaseGil(),
            "Starts copies of a layer's absent pages into free slots, until as many are ahead as a "
            "scan streams through; returns how many.")
        .def(
            "cancel_prefetches",
            [](Pager& self, int32_t layer, const std::vector<int32_t>& keep) {
                self.cancel_prefetches(layer, keep);
            },
            "layer"_a = -1, "keep"_a = std::vector<int32_t>{}, ReleaseGil())
        .def(
            "predict",
            [](Pager& self, int32_t layer, const std::vector<int32_t>& experts,
               const std::vector<float>& probabilities,
               int32_t visits_ahead) { self.predict(layer, experts, probabilities, visits_ahead); },
            "layer"_a, "experts"_a, "probabilities"_a, "visits_ahead"_a = 0, ReleaseGil())
        .def("begin_sequence", &Pager::begin_sequence, ReleaseGil())
        .def("set_recording", &Pager::set_recording, "recording"_a, ReleaseGil())
        .def("recorded", [](const Pager& self) { return events_dict(self.recorded()); })
        .def(
            "fill",
            [](Pager& self, const std::vector<std::pair<int32_t, int32_t>>& pages) {
                return self.fill(pages);
            },
            "pages"_a, ReleaseGil())
        .def("drain", &Pager::drain, ReleaseGil())
        .def("close", py::overload_cast<>(&Pager::close), ReleaseGil())
        .def("counters", &counters_dict)
        .def("reset_counters", &Pager::reset_counters)
        .def("timeline", &timeline_tuple)
        .def("residents", &Pager::residents)
        .def("engine_stats", [](const Pager& self) { return self.engine().stats(); })
        .def("engine_limit", [](const Pager& self) { return self.engine().limit(); })
        .def_property_readonly("num_live_tickets", &Pager::num_live_tickets)
        .def_property_readonly("admit_limit", &Pager::admit_limit)
        .def_property_readonly(
            "slot_shifts",
            [](const Pager& self) { return reinterpret_cast<uintptr_t>(self.slot_shifts()); },
            "address of uint32 [num_slots], where in its slot each page begins; 0: at the start")
        .def(
            "slot_shift",
            [](const Pager& self, SlotIndex slot) {
                return self.slot_shifts() ? self.slot_shifts()[static_cast<size_t>(slot)] : 0;
            },
            "slot"_a)
        .def_property_readonly("uses_weights", &Pager::uses_weights)
        .def_property_readonly("uses_routes", &Pager::uses_routes)
        .def_property_readonly("io_engine", &Pager::engine_name)
        .def_property_readonly("uses_predictions", &Pager::uses_predictions)
        .def(
            "set_chaos",
            [](Pager& self, uint64_t seed, int64_t max_delay_us, bool reorder,
               double fail_probability, double evict_probability) {
                self.set_chaos({seed, max_delay_us, reorder, fail_probability}, evict_probability);
            },
            "seed"_a = 0, "max_delay_us"_a = 0, "reorder"_a = false, "fail_probability"_a = 0.0,
            "evict_probability"_a = 0.0);
}
