"""The checks of moe_offload.cuda_kernels, and on a GPU the kernels themselves.

The CPU executes the kernels' source in csrc/tests/test_emulated_*.cpp; here they run as compiled,
against float64, on fresh random inputs, with poisoned outputs.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moe_offload import cuda_kernels, quantization
from moe_offload.cuda_kernels import CudaExperts
from moe_offload.cuda_pages import ExpertShape, SlabPages, TablePages
from moe_offload.pages import PageLayout

GOOD = ExpertShape(64, 32, torch.bfloat16, up_offset=0, down_offset=8192)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": 60}, ValueError, "hidden must be a multiple of 8, got 60"),
        ({"inner": 0}, ValueError, "inner must be a multiple of 8, got 0"),
        ({"inner": 2**24}, ValueError, r"under 4 GiB in 16 bits, got \[33554432, \d+\]"),
        ({"dtype": torch.float32}, TypeError, "bfloat16 or float16, got torch.float32"),
        ({"activation": "tanh"}, ValueError, "must be of silu, gelu"),
        ({"activation": "clamped_swiglu", "gated": False}, ValueError, "needs a gate"),
        ({"down_offset": 24}, ValueError, "down_offset must be a multiple of 16 bytes, got 24"),
        ({"up_bias_offset": 256}, ValueError, "both bias offsets or neither"),
        ({"weight_format": "awq"}, ValueError, "must be one of plain, .* got 'awq'"),
        ({"up_scale_offset": 256}, ValueError, "plain has no scales, got up_scale_offset 256"),
        ({"group_size": 32}, ValueError, "only int4_group has a group_size"),
    ],
)
def test_a_shape_checks_itself(change: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dataclasses.replace(GOOD, **change)


QUANTISED = ExpertShape(
    256,
    128,
    torch.bfloat16,
    up_offset=0,
    down_offset=65536,
    weight_format="fp8_block",
    up_scale_offset=98304,
    down_scale_offset=98560,
)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"transposed": True}, ValueError, r"stored \[rows, columns\], got transposed"),
        ({"up_scale_offset": -1}, ValueError, "up_scale_offset must be a multiple of 16, got -1"),
        ({"down_scale_offset": 24}, ValueError, "down_scale_offset must be a multiple of 16"),
        ({"hidden": 264}, ValueError, r"multiples of 16, got a matrix of \[256, 264\]"),
        ({"inner": 192}, ValueError, "do not share a block's scale, got 192"),
        ({"weight_format": "mxfp4", "hidden": 48}, ValueError, "multiples of 32"),
        (
            {"weight_format": "mxfp4", "dtype": torch.float16},
            TypeError,
            "needs bfloat16 activations.* got torch.float16",
        ),
        ({"weight_format": "int4_group"}, ValueError, "a power of two from 32, got 0"),
        ({"weight_format": "int4_group", "group_size": 96}, ValueError, "of two from 32, got 96"),
        (
            {"weight_format": "int4_group", "group_size": 128, "hidden": 2880},
            ValueError,
            "multiples of 128",
        ),
    ],
)
def test_a_quantised_shape_checks_itself(change: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dataclasses.replace(QUANTISED, **change)


def test_a_quantised_shape_may_be_unusual_where_the_format_allows() -> None:
    dataclasses.replace(QUANTISED, inner=192, gated=False)
    dataclasses.replace(QUANTISED, inner=192, interleaved=True)  # blocks of the matrix as it is
    dataclasses.replace(QUANTISED, weight_format="mxfp4", inner=96)
    dataclasses.replace(QUANTISED, weight_format="int4_group", group_size=64, dtype=torch.float16)


GPT_OSS = {
    "up": "gate_up_proj_blocks",
    "down": "down_proj_blocks",
    "up_scales": "gate_up_proj_scales",
    "down_scales": "down_proj_scales",
    "up_bias": "gate_up_proj_bias",
    "down_bias": "down_proj_bias",
}


def gpt_oss_sections(hidden: int, inner: int) -> dict:
    byte = torch.uint8
    return {
        "gate_up_proj_blocks": ((2 * inner, hidden // 32, 16), byte),
        "gate_up_proj_scales": ((2 * inner, hidden // 32), byte),
        "gate_up_proj_bias": ((2 * inner,), torch.bfloat16),
        "down_proj_blocks": ((hidden, inner // 32, 16), byte),
        "down_proj_scales": ((hidden, inner // 32), byte),
        "down_proj_bias": ((hidden,), torch.bfloat16),
    }


def test_a_shape_is_read_from_a_layout() -> None:
    layout = PageLayout.build(gpt_oss_sections(96, 64))
    shape = ExpertShape.of_layout(
        layout, 96, 64, torch.bfloat16, **GPT_OSS, weight_format="mxfp4", interleaved=True
    )
    assert shape.up_offset == 0
    assert shape.up_scale_offset == layout.section("gate_up_proj_scales").offset
    assert shape.down_offset == layout.section("down_proj_blocks").offset
    assert shape.down_scale_offset == layout.section("down_proj_scales").offset
    assert shape.down_bias_offset == layout.section("down_proj_bias").offset


def test_a_transposed_layout_is_checked_as_such() -> None:
    kind = torch.bfloat16
    layout = PageLayout.build({"gate_up_proj": ((96, 128), kind), "down_proj": ((64, 96), kind)})
    shape = ExpertShape.of_layout(layout, 96, 64, torch.bfloat16, transposed=True)
    assert (shape.transposed, shape.down_offset) == (True, 96 * 128 * 2)
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 \[128, 96\], got .* \[96, 128\]"):
        ExpertShape.of_layout(layout, 96, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        (
            "gate_up_proj_blocks",
            ((128, 48), torch.uint8),
            r"'gate_up_proj_blocks' of mxfp4 experts must be torch.uint8 \[128, 3, 16\], got "
            r"torch.uint8 \[128, 48\]",
        ),
        ("down_proj_blocks", ((96, 2, 16), torch.int8), r"got torch.int8 \[96, 2, 16\]"),
        ("gate_up_proj_scales", ((128, 2), torch.uint8), r"\[128, 3\], got torch.uint8 \[128, 2\]"),
        ("down_proj_scales", ((96, 2), torch.float32), r"must be torch.uint8 \[96, 2\], got"),
        ("gate_up_proj_bias", ((128,), torch.float32), "must be torch.bfloat16"),
        ("down_proj_bias", ((64,), torch.bfloat16), r"\[96\], got torch.bfloat16 \[64\]"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(name: str, spec: tuple, text: str) -> None:
    layout = PageLayout.build(gpt_oss_sections(96, 64) | {name: spec})
    with pytest.raises(ValueError, match=text):
        ExpertShape.of_layout(layout, 96, 64, torch.bfloat16, **GPT_OSS, weight_format="mxfp4")
    with pytest.raises(KeyError, match="no section 'gate_up_proj'"):
        ExpertShape.of_layout(layout, 96, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.zeros(3, 4), TypeError, "x: expected torch.bfloat16, got torch.float32"),
        (torch.zeros(3, 5, dtype=torch.bfloat16), ValueError, r"shape \[any, 4\], got \[3, 5\]"),
        (torch.zeros(4, dtype=torch.bfloat16), ValueError, r"shape \[any, 4\], got \[4\]"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), ValueError, "expected a CUDA tensor, got .* cpu"),
    ],
)
def test_tensors_are_checked(tensor: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        cuda_kernels.check_tensor("x", tensor, (None, 4), torch.bfloat16, None)


def test_layouts_and_devices_are_checked() -> None:
    cpu = torch.device("cpu")
    x = torch.zeros(4, 8, dtype=torch.int32)
    cuda_kernels.check_tensor("x", x, (4, 8), torch.int32, cpu)
    with pytest.raises(ValueError, match="contiguous"):
        cuda_kernels.check_tensor("x", x.t(), (8, 4), torch.int32, cpu)
    y = torch.zeros(32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        cuda_kernels.check_tensor("y", y[1:], (31,), torch.bfloat16, cpu)
    with pytest.raises(ValueError, match="expected it on meta, got cpu"):
        cuda_kernels.check_tensor("x", x, (4, 8), torch.int32, torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_reason_is_given() -> None:
    reason = cuda_kernels.missing()
    assert reason is not None
    assert "_cuda is not built" in reason or "no CUDA device" in reason
    with pytest.raises(RuntimeError, match="CudaExperts: "):
        CudaExperts(GOOD, num_experts=4)


def test_a_gpu_older_than_ampere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_import_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    text = r"needs compute capability 8.0 \(Ampere\) or newer, this GPU has \(7, 5\)"
    with pytest.raises(RuntimeError, match=f"CudaExperts: {text}"):
        CudaExperts(GOOD, num_experts=4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert cuda_kernels.missing() is None


def test_the_module_names_its_architectures_and_chooses_by_size() -> None:
    native = pytest.importorskip("moe_offload._cuda", reason="_cuda needs nvcc at build time")
    assert native.architectures()
    assert native.use_decode(1, 8, 128)
    assert not native.use_decode(4096, 8, 128)
    assert native.choose_decode(1, 8, 128, 2048, 768) == (1, 8, 4)
    mxfp4 = quantization.FORMATS.index("mxfp4")
    assert native.choose_decode(1, 8, 128, 2048, 768, mxfp4) == (1, 8, 2)
    assert native.choose_block_m(16384, 8, 128) == 128
    p = native.ExpertParams()
    p.x, p.num_tokens, p.offset = 1 << 40, 7, 0.5
    assert (p.copy().x, p.copy().num_tokens, p.copy().offset) == (1 << 40, 7, 0.5)


# ---- on a GPU ----------------------------------------------------------------------------------


class Layer:
    """Random experts in a slab on the device, and the maps of a random routing."""

    gate_up: Tensor
    down: Tensor

    def __init__(
        self,
        tokens: int,
        top_k: int,
        experts: int,
        hidden: int,
        inner: int,
        skew: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        form: str = "plain",
        group: int = 0,
        transposed: bool = False,
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        sections = {}  # the parts of a page: name to [E, ...]
        for name, rows, columns in (("up", 2 * inner, hidden), ("down", hidden, inner)):
            weight = randn(experts, rows, columns) / columns**0.5
            codes, scales = quantization.lossy_quantise(form, weight, dtype, group)
            sections[name] = codes.transpose(1, 2).contiguous() if transposed else codes
            if scales is not None:
                sections[f"{name}_scales"] = scales
            # what the page says the weights are, [E, rows, columns] in float64
            exact = quantization.dequantise(form, codes, scales)
            setattr(self, "gate_up" if name == "up" else name, exact)
        self.x = randn(tokens, hidden).to(dtype)
        self.weights = randn(tokens, top_k).softmax(-1).contiguous()
        scores = randn(tokens, experts) + (4 * torch.arange(experts, device="cuda") if skew else 0)
        self.ids = scores.topk(top_k, dim=-1).indices
        flat = self.ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        self.route_of_row = order.int()
        self.row_of_route = torch.empty_like(self.route_of_row)
        self.row_of_route[order] = torch.arange(len(order), dtype=torch.int32, device="cuda")
        found, counts = flat.unique(return_counts=True)
        ends = counts.cumsum(0)
        self.groups = torch.stack([ends - counts, ends, found], 1).int().contiguous()

        self.total = torch.tensor([len(self.groups)], dtype=torch.int32, device="cuda")

        layout = PageLayout.build(
            {name: (tuple(t.shape[1:]), t.dtype) for name, t in sections.items()}
        )
        num_slots = experts + 3
        stride = layout.slot_stride
        self.slab = torch.full((num_slots * stride,), 255, dtype=torch.uint8, device="cuda")
        slots = torch.randperm(num_slots, device="cuda", generator=generator)[:experts]
        self.slot_of = slots.int()
        for name, view in layout.views(self.slab).items():
            for slot, part in zip(slots.tolist(), sections[name], strict=True):
                view[slot].copy_(part)
        self.pages = SlabPages(self.slab, stride, self.slot_of)
        names = {name: name for name in sections}
        options = {"weight_format": form, "group_size": group, "transposed": transposed}
        shape = ExpertShape.of_layout(layout, hidden, inner, dtype, **names, **options)
        self.experts = CudaExperts(shape, experts)

    def run(self, split: int = 0, out: Tensor | None = None) -> Tensor:
        out = torch.full_like(self.x, float("nan")) if out is None else out
        maps = (self.weights, self.route_of_row, self.row_of_route)
        call = self.experts.begin(self.x, *maps, self.total, out)
        for part in (self.groups[:split], self.groups[split:]):
            if len(part):
                call.compute(self.pages, part.contiguous())
        return call.finish()

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Plain torch, in float64 or, to see what rounding costs torch, in the weights' dtype."""
        out = torch.zeros(self.x.shape, device="cuda", dtype=torch.float64)
        for expert in self.ids.unique().tolist():
            tokens, rank = (self.ids == expert).nonzero(as_tuple=True)
            gate, up = (self.x[tokens].to(dtype) @ self.gate_up[expert].to(dtype).t()).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            y = inner @ self.down[expert].to(dtype).t()
            out.index_add_(0, tokens, y.double() * self.weights[tokens, rank, None].double())
        return out if dtype == torch.float64 else out.to(dtype).double()


def assert_close(layer: Layer, got: Tensor) -> None:
    """Error against float64 within 1.2 of torch's own in the same dtype."""
    exact = layer.reference(torch.float64)
    size = exact.norm()
    own = (layer.reference(layer.x.dtype) - exact).norm() / size
    error = (got.double() - exact).norm() / size
    assert error <= 1.2 * own, f"relative error {error:.3e}, torch's own {own:.3e}"


# T, A, E, H, F, and whether two experts get everything
SIZES = [
    pytest.param((1, 8, 32, 2048, 768, False), id="qwen3 T1"),
    pytest.param((7, 2, 8, 1032, 1000, False), id="off every tile"),
    pytest.param((64, 8, 32, 2048, 768, False), id="decode T64"),
    pytest.param((100, 4, 8, 1032, 840, False), id="prefill, 64 rows"),
    pytest.param((2000, 2, 8, 1024, 1536, False), id="prefill, 128 rows"),
    pytest.param((500, 2, 8, 512, 256, True), id="two experts"),
]
Sizes = tuple[int, int, int, int, int, bool]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_is_that_of_torch_and_bits_repeat(sizes: Sizes, dtype: torch.dtype) -> None:
    layer = Layer(*sizes, dtype=dtype, seed=torch.seed() % 1000)
    first = layer.run()
    for split in (0, 1, len(layer.groups) // 2):  # also any split into two launches
        assert torch.equal(layer.run(split), first)
    assert_close(layer, first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_transposed_pages(sizes: Sizes, dtype: torch.dtype) -> None:
    layer = Layer(*sizes, dtype=dtype, seed=torch.seed() % 1000, transposed=True)
    first = layer.run()
    for split in (0, 1, len(layer.groups) // 2):
        assert torch.equal(layer.run(split), first)
    assert_close(layer, first)


# format, its group size, and the dtype of activations
FORMATS = [
    ("fp8_block", 0, torch.bfloat16),
    ("fp8_block", 0, torch.float16),
    ("mxfp4", 0, torch.bfloat16),
    ("int4_group", 32, torch.bfloat16),
    ("int4_group", 128, torch.float16),
]
QUANTISED_SIZES = [
    pytest.param((1, 8, 32, 2048, 768, False), id="qwen3 T1"),
    pytest.param((7, 2, 8, 1152, 384, False), id="off every step"),
    pytest.param((64, 8, 32, 2048, 768, False), id="decode T64"),
    pytest.param((300, 2, 8, 1024, 768, True), id="many rows, two experts"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", QUANTISED_SIZES)
def test_quantised_pages(sizes: Sizes, form: tuple[str, int, torch.dtype]) -> None:
    """Against float64 of what the page says; torch's own dequantises to its dtype first."""
    name, group, dtype = form
    layer = Layer(*sizes, dtype=dtype, seed=torch.seed() % 1000, form=name, group=group)
    first = layer.run()
    for split in (0, 1, len(layer.groups) // 2):
        assert torch.equal(layer.run(split), first)
    assert_close(layer, first)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES[:4])
def test_a_captured_graph_replays_on_new_inputs(sizes: Sizes) -> None:
    layer = Layer(*sizes)
    out = torch.empty_like(layer.x)
    layer.run(out=out)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(out=out)
    for _ in range(3):
        layer.x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(layer.run(), replayed)


@pytest.mark.gpu
def test_several_streams_do_not_disturb_each_other() -> None:
    layers = [Layer(4, 4, 16, 1024, 512, seed=seed) for seed in range(4)]
    alone = [layer.run() for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(20):
        results = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer.run())
        torch.cuda.synchronize()
        for got, want in zip(results, alone, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_pages_are_read_from_pinned_memory_through_a_table() -> None:
    layer = Layer(2, 2, 4, 512, 256)
    want = layer.run()
    host = layer.slab.cpu().pin_memory()
    stride = layer.pages.slot_stride
    addresses = [host.data_ptr() + slot * stride for slot in range(layer.pages.num_slots)]
    table = torch.tensor(addresses, dtype=torch.int64, device="cuda")
    layer.pages = TablePages(table, layer.slot_of, owners=(host,))
    assert torch.equal(layer.run(), want)


@pytest.mark.gpu
def test_the_sm80_path_agrees_with_hoppers() -> None:
    layer = Layer(700, 2, 8, 1024, 512)
    want = layer.run()
    addresses = [
        layer.slab.data_ptr() + slot * layer.pages.slot_stride
        for slot in range(layer.pages.num_slots)
    ]
    table = torch.tensor(addresses, dtype=torch.int64, device="cuda")
    layer.pages = TablePages(table, layer.slot_of)  # a table is never read by TMA
    got = layer.run()
    assert_close(layer, got)
    assert_close(layer, want)
