"""The expert kernels in CUDA C++ (`moe_offload._cuda`), behind checks: the public edge.

    experts = CudaExperts(shape, num_experts=128)          # once per layer
    call = experts.begin(x, topk_weights, route_of_row, row_of_route, total)
    call.compute(pages, groups)                            # in any portions, as pages arrive
    out = call.finish()                                    # [T, H], combined in rank order

Few tokens run the decode kernels, many the prefill kernels; the choice depends on sizes alone, so
results do not depend on portions, slots or timing, bit for bit. Nothing here waits for the device:
launches go to the caller's current stream and can be captured in a CUDA graph (warm up once first).
`docs/cuda_kernels.md` has the design. No speed is claimed: the kernels have not run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_offload.pages import PageLayout
from moe_offload.quantization import FORMATS, FP8_BLOCK, check_size, specs

MIN_CAPABILITY = (8, 0)
DEVICE_TYPE = "cuda"  # of tensors; tests that run the kernels in emulation set it to "cpu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {
    name: code
    for code, name in enumerate(["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"])
}


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("moe_offload._cuda")
    except ImportError as error:
        return str(error)
    return None


def _native() -> Any:
    return sys.modules.get("moe_offload._cuda") or importlib.import_module("moe_offload._cuda")


def missing() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    if (error := _import_error()) is not None:
        return (
            f"moe_offload._cuda is not built ({error}); it is built where nvcc is found: "
            "pip install . with the CUDA toolkit on PATH"
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device, or torch was built without CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0 (Ampere) or newer, this GPU has {capability}"
    return None


@dataclass(frozen=True)
class ExpertShape:
    """What a page holds and what its expert computes.

    Attributes:
        hidden, inner: H and F, multiples of 8.
        dtype: torch.bfloat16 or torch.float16, of weights, biases, x and out.
        up_offset, down_offset: bytes from a page's start to gate_up [2F, H] (ungated: up [F, H])
            and to down [H, F]; multiples of 16.
        transposed: gate_up is [H, 2F] and down [F, H], as transformers' gpt-oss has them in bf16;
            of plain weights only.
        up_bias_offset, down_bias_offset: likewise, or -1 for no biases.
        weight_format: a name in `quantization.FORMATS`, the layout of gate_up and down.
        up_scale_offset, down_scale_offset: of their scales; -1 for plain weights.
        group_size: of int4_group, columns that share a scale.
        activation: a name in `ACTIVATIONS`.
        gated: act(gate) * up; else act(up).
        interleaved: gate and up rows alternate (gpt-oss); else gate's F rows come first.
        alpha, limit, offset: of clamped_swiglu, (u + offset) * g * sigmoid(alpha * g).
    """

    hidden: int
    inner: int
    dtype: torch.dtype
    up_offset: int
    down_offset: int
    up_bias_offset: int = -1
    down_bias_offset: int = -1
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    weight_format: str = "plain"
    up_scale_offset: int = -1
    down_scale_offset: int = -1
    group_size: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "inner"):
            value = getattr(self, name)
            if value <= 0 or value % 8:
                raise ValueError(f"ExpertShape: {name} must be a multiple of 8, got {value}")
        if self.dtype not in DTYPES:
            raise TypeError(f"ExpertShape: dtype must be bfloat16 or float16, got {self.dtype}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"ExpertShape: activation must be of {known}, got {self.activation!r}")
        if self.activation == "clamped_swiglu" and not self.gated:
            raise ValueError("ExpertShape: clamped_swiglu needs a gate")
        for name in ("up_offset", "down_offset"):
            if getattr(self, name) < 0 or getattr(self, name) % 16:
                raise ValueError(
                    f"ExpertShape: {name} must be a multiple of 16 bytes, got {getattr(self, name)}"
                )
        if (self.up_bias_offset < 0) != (self.down_bias_offset < 0):
            raise ValueError("ExpertShape: give both bias offsets or neither")
        self._check_format()

    def _check_format(self) -> None:
        name = f"ExpertShape: weight_format {self.weight_format}"
        if self.transposed and self.weight_format != "plain":
            raise ValueError(f"{name} is stored [rows, columns], got transposed")
        try:
            check_size(self.weight_format, self.up_rows, self.hidden, self.group_size)
            check_size(self.weight_format, self.hidden, self.inner, self.group_size)
        except ValueError as error:
            raise ValueError(f"ExpertShape: {error}") from None
        for field_name in ("up_scale_offset", "down_scale_offset"):
            value = getattr(self, field_name)
            if self.weight_format == "plain" and value != -1:
                raise ValueError(f"{name} has no scales, got {field_name} {value}")
            if self.weight_format != "plain" and (value < 0 or value % 16):
                raise ValueError(f"{name}: {field_name} must be a multiple of 16, got {value}")
        if self.weight_format == "mxfp4" and self.dtype != torch.bfloat16:
            raise TypeError(
                f"{name} needs bfloat16 activations, its scales do not fit float16; "
                f"got {self.dtype}"
            )
        stacked = self.weight_format == "fp8_block" and self.gated and not self.interleaved
        if stacked and self.inner % FP8_BLOCK:
            raise ValueError(
                f"{name}: inner must be a multiple of {FP8_BLOCK}, so that gate and up do not "
                f"share a block's scale, got {self.inner}"
            )

    @property
    def up_rows(self) -> int:
        return 2 * self.inner if self.gated else self.inner

    @classmethod
    def of_layout(
        cls,
        layout: PageLayout,
        hidden: int,
        inner: int,
        dtype: torch.dtype,
        *,
        up: str = "gate_up_proj",
        down: str = "down_proj",
        up_scales: str | None = None,
        down_scales: str | None = None,
        up_bias: str | None = None,
        down_bias: str | None = None,
        **options: Any,
    ) -> ExpertShape:
        """The shape of experts whose pages have this layout, with every section checked.

        Args:
            layout: the page's sections.
            hidden, inner, dtype: as the attributes.
            up, down, up_scales, ...: the sections' names, such as "gate_up_proj_blocks"; None:
                there is no such section.
            options: the other attributes, such as weight_format and activation.

        Raises:
            KeyError: the layout has no such section.
            ValueError: a section's dtype or shape is not what the format stores there.
        """
        sections = (up, down, up_scales, down_scales, up_bias, down_bias)
        offsets = [-1 if name is None else layout.section(name).offset for name in sections]
        names = ("up", "down", "up_scale", "down_scale", "up_bias", "down_bias")
        where: dict[str, Any] = {
            f"{name}_offset": at for name, at in zip(names, offsets, strict=True)
        }
        shape = cls(hidden, inner, dtype, **where, **options)
        form, group = shape.weight_format, shape.group_size
        up_specs = specs(form, shape.up_rows, hidden, dtype, group)
        down_specs = specs(form, hidden, inner, dtype, group)
        biases = ((shape.up_rows,), dtype), ((hidden,), dtype)
        wanted = [up_specs[0], down_specs[0], up_specs[1], down_specs[1], *biases]
        if shape.transposed:
            wanted[:2] = [(size[::-1], kind) for size, kind in (up_specs[0], down_specs[0])]
        for name, want in zip(sections, wanted, strict=True):
            if name is None or want is None:
                continue
            section = layout.section(name)
            if (section.shape, section.dtype) != want:
                raise ValueError(
                    f"ExpertShape: section {name!r} of {form} experts must be {want[1]} "
                    f"{list(want[0])}, got {section.dtype} {list(section.shape)}"
                )
        return shape


@dataclass(frozen=True)
class SlabPages:
    """Pages in slots of one allocation, with slots or experts named by the groups.

    Attributes:
        slab: uint8 [S * slot_stride] on the device, contiguous, 256-byte aligned.
        slot_stride: bytes from slot to slot, a multiple of 16.
        slot_of: int32 [E] on the device, slot of each expert or -1; groups then name experts.
            None: groups name slots.
    """

    slab: Tensor
    slot_stride: int
    slot_of: Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.slab.numel() // self.slot_stride


@dataclass(frozen=True)
class TablePages:
    """Pages anywhere the device can read: other tensors, or pinned host memory.

    Attributes:
        table: int64 [P] on the device, address of each page, multiples of 16.
        slot_of: as for SlabPages, into the table.
        owners: what must stay alive while kernels read the pages.
    """

    table: Tensor
    slot_of: Tensor | None = None
    owners: tuple[Any, ...] = field(default=(), compare=False)


Pages = SlabPages | TablePages


class CudaExperts:
    """The kernels tied to one layer's shape.

    Raises:
        RuntimeError: the kernels cannot run here; the message is that of `missing()`.
    """

    def __init__(self, shape: ExpertShape, num_experts: int) -> None:
        if (reason := missing()) is not None:
            raise RuntimeError(f"CudaExperts: {reason}")
        if num_experts <= 0:
            raise ValueError(f"CudaExperts: num_experts must be positive, got {num_experts}")
        self.shape, self.num_experts = shape, num_experts
        self._choices: dict[tuple[int, int], tuple[bool, int, tuple[int, int, int]]] = {}
        p = _native().ExpertParams()
        p.hidden, p.inner_size = shape.hidden, shape.inner
        p.dtype, p.activation = DTYPES[shape.dtype], ACTIVATIONS[shape.activation]
        p.gated, p.interleaved = shape.gated, shape.interleaved
        p.alpha, p.limit, p.offset = shape.alpha, shape.limit, shape.offset
        p.set_pages(
            slab=0,
            slot_stride=0,
            page_table=0,
            slot_of=0,
            up_offset=shape.up_offset,
            down_offset=shape.down_offset,
            up_bias_offset=shape.up_bias_offset,
            down_bias_offset=shape.down_bias_offset,
            up_scale_offset=shape.up_scale_offset,
            down_scale_offset=shape.down_scale_offset,
            format=FORMATS.index(shape.weight_format),
            log2_group=max(shape.group_size.bit_length() - 1, 0),
            transposed=shape.transposed,
        )
        self._params = p  # what is the same in every call

    def choices(self, num_tokens: int, top_k: int) -> tuple[bool, int, tuple[int, int, int]]:
        """Whether decode's kernels run, prefill's tile height, decode's variant: by sizes alone."""
        if (found := self._choices.get((num_tokens, top_k))) is None:
            native, shape = _native(), self.shape
            sizes = (num_tokens, max(top_k, 1), self.num_experts)
            format_code = FORMATS.index(shape.weight_format)
            variant = native.choose_decode(
                *(*sizes, shape.hidden, shape.inner, format_code), transposed=shape.transposed
            )
            found = native.use_decode(*sizes), native.choose_block_m(*sizes), variant
            self._choices[num_tokens, top_k] = found
        return found

    def begin(
        self,
        x: Tensor,
        topk_weights: Tensor,
        route_of_row: Tensor,
        row_of_route: Tensor,
        total_groups: Tensor | None = None,
        out: Tensor | None = None,
        tickets: Tensor | None = None,
    ) -> ExpertCall:
        """Start one call of the layer; allocates scratch, launches nothing but a memset.

        Args:
            x: [T, H] of the shape's dtype, contiguous.
            topk_weights: float32 [T, A], contiguous.
            route_of_row: int32 [T * A], route t * A + a of each row sorted by expert.
            row_of_route: int32 [T * A], its inverse; -1: the route has no expert here.
            total_groups: int32 [1], number of groups of all `compute` calls together, read by the
                device. None: one `compute` call brings all groups.
            out: [T, H] to write to, contiguous.
            tickets: int32 [ceil(H / 32)] of zeros, scratch that is zero again when every group has
                been computed; None: made here. Never for two calls at a time.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or layout.

        Cost: scratch of T * A * (2 F + 4 H) bytes for few tokens, T * A * (2 F + 2 H) for many.
        """
        return ExpertCall(
            self, x, topk_weights, route_of_row, row_of_route, total_groups, out, tickets
        )


class ExpertCall:
    """One call of one layer; keeps alive what its kernels read."""

    def __init__(
        self,
        experts: CudaExperts,
        x: Tensor,
        topk_weights: Tensor,
        route_of_row: Tensor,
        row_of_route: Tensor,
        total_groups: Tensor | None,
        out: Tensor | None,
        tickets: Tensor | None,
    ) -> None:
        shape = experts.shape
        check_tensor("x", x, (None, shape.hidden), shape.dtype, None)
        num_tokens, device = x.shape[0], x.device
        check_tensor("topk_weights", topk_weights, (num_tokens, None), torch.float32, device)
        top_k = topk_weights.shape[1]
        routes = num_tokens * top_k
        row_of_route = row_of_route.view(-1)
        check_tensor("route_of_row", route_of_row, (routes,), torch.int32, device)
        check_tensor("row_of_route", row_of_route, (routes,), torch.int32, device)
        if total_groups is not None:
            check_tensor("total_groups", total_groups, (1,), torch.int32, device)
        if out is None:
            out = torch.empty_like(x)
        check_tensor("out", out, (num_tokens, shape.hidden), shape.dtype, device)

        self.decode, self.block_m, self.variant = experts.choices(num_tokens, top_k)
        self._experts, self._out, self._launched = experts, out, False
        self._capability = _capability(device)
        # quantised and transposed pages: the sm_80 kernel
        plain = shape.weight_format == "plain" and not shape.transposed
        self._hopper = plain and self._capability == (9, 0)
        inner = x.new_empty(routes, shape.inner)
        partial = x.new_empty(
            routes, shape.hidden, dtype=torch.float32 if self.decode else shape.dtype
        )
        if tickets is None:
            tickets = torch.zeros((shape.hidden + 31) // 32, dtype=torch.int32, device=device)
        check_tensor("tickets", tickets, ((shape.hidden + 31) // 32,), torch.int32, device)
        self.tickets = tickets
        kept = (x, topk_weights, route_of_row, row_of_route, total_groups, inner, partial)
        self._kept: list[Any] = list(kept)
        p = self._params = experts._params.copy()
        p.set_call(
            x.data_ptr(),
            topk_weights.data_ptr(),
            route_of_row.data_ptr(),
            row_of_route.data_ptr(),
            0 if total_groups is None else total_groups.data_ptr(),
            inner.data_ptr(),
            partial.data_ptr(),
            tickets.data_ptr(),
            out.data_ptr(),
            num_tokens,
            top_k,
        )

    def compute(
        self,
        pages: Pages,
        groups: Tensor | None = None,
        *,
        active_experts: Tensor | None = None,
        expert_offsets: Tensor | None = None,
        num_groups: Tensor | None = None,
    ) -> None:
        """Launch the rows of some experts on the current stream. Each expert once per call.

        Args:
            pages: where their weights are. An expert whose slot is -1 is skipped: compute it
                later, with a slot.
            groups: int32 [G, 3]: first row, end row, and slot (or expert, with pages.slot_of).
            active_experts, expert_offsets: instead of groups, int32 [G] and [E + 1], as the Triton
                permutation gives them; needs pages.slot_of.
            num_groups: int32 [1], how many of the G are meant, read by the device; None: all.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or layout.
            RuntimeError: CUDA refused the launch; the message has the call and its sizes.
        """
        p, device = self._params, self._out.device
        if (groups is None) == (active_experts is None or expert_offsets is None):
            raise ValueError("compute: give groups, or active_experts and expert_offsets")
        if groups is not None:
            check_tensor("groups", groups, (None, 3), torch.int32, device)
            p.groups, p.active_experts, p.expert_offsets = groups.data_ptr(), 0, 0
            p.max_groups = groups.shape[0]
        elif active_experts is not None and expert_offsets is not None:
            check_tensor("active_experts", active_experts, (None,), torch.int32, device)
            rows = (self._experts.num_experts + 1,)
            check_tensor("expert_offsets", expert_offsets, rows, torch.int32, device)
            if pages.slot_of is None:
                raise ValueError("compute: active_experts are experts, so pages need slot_of")
            p.groups, p.active_experts = 0, active_experts.data_ptr()
            p.expert_offsets = expert_offsets.data_ptr()
            p.max_groups = active_experts.shape[0]
        if num_groups is not None:
            check_tensor("num_groups", num_groups, (1,), torch.int32, device)
        p.num_groups = 0 if num_groups is None else num_groups.data_ptr()
        self._set_pages(pages)
        self._kept += [pages, groups, active_experts, expert_offsets, num_groups]
        self._launched = True
        native = _native()
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            if self.decode:  # sm_90 and newer start the second launch while the first drains
                native.launch_decode(p, self.variant, self._capability >= (9, 0), stream)
            elif self._hopper and isinstance(pages, SlabPages) and _built_for_hopper():
                native.launch_prefill_sm90(p, pages.num_slots, self.block_m, stream)
            else:
                native.launch_prefill(p, self.block_m, stream)

    def finish(self) -> Tensor:
        """[T, H], complete when the stream gets there; every group must have been computed."""
        if self.decode and self._launched:
            return self._out
        with torch.cuda.device(self._out.device):
            if self.decode:  # no expert has rows: zeros
                self._out.zero_()
            else:
                stream = torch.cuda.current_stream().cuda_stream
                _native().launch_combine(self._params, stream)
        return self._out

    def _set_pages(self, pages: Pages) -> None:
        device = self._out.device
        if pages.slot_of is not None:
            size = (self._experts.num_experts,)
            check_tensor("slot_of", pages.slot_of, size, torch.int32, device)
        if isinstance(pages, SlabPages):
            check_tensor("slab", pages.slab, (None,), torch.uint8, device)
            if pages.slab.data_ptr() % 256 or pages.slot_stride % 16 or pages.slot_stride <= 0:
                raise ValueError(
                    "compute: the slab must start at a multiple of 256 bytes and slot_stride be a "
                    f"multiple of 16, got {pages.slab.data_ptr():#x} and {pages.slot_stride}"
                )
            where = (pages.slab.data_ptr(), pages.slot_stride, 0)
        else:
            check_tensor("table", pages.table, (None,), torch.int64, device)
            where = (0, 0, pages.table.data_ptr())
        self._params.set_where(*where, 0 if pages.slot_of is None else pages.slot_of.data_ptr())


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _built_for_hopper() -> bool:
    return "90a" in _native().architectures()


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device | None,
) -> None:
    """Raise unless the tensor is contiguous, of this dtype and shape (None: any), on the device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits and got != shape:  # a loop: this is done for eight tensors in a call
        for index, want in enumerate(shape):
            fits = fits and want in (None, got[index])
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{text}], got {list(tensor.shape)}")
    if device is None and tensor.device.type != DEVICE_TYPE:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {tensor.device}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor; call .contiguous()")
    wide = dtype in DTYPES or dtype == torch.uint8  # read 16 bytes at a time
    if wide and tensor.numel() and tensor.data_ptr() % 16:
        raise ValueError(f"{name}: expected it to start at a multiple of 16 bytes")
