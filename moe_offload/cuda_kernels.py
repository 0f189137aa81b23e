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
from typing import Any

import torch
from torch import Tensor

from moe_offload.cuda_pages import ACTIVATIONS, DTYPES, ExpertShape, Pages, SlabPages
from moe_offload.quantization import FORMATS

MIN_CAPABILITY = (8, 0)
DEVICE_TYPE = "cuda"  # of tensors; tests that run the kernels in emulation set it to "cpu"


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
