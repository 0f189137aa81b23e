"""What the CUDA expert kernels read: the shape of a page's expert, and where the pages are.

`cuda_kernels.py` runs the kernels on them. Everything here checks itself on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_offload.pages import PageLayout
from moe_offload.quantization import FP8_BLOCK, check_size, specs

DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {
    name: code
    for code, name in enumerate(["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"])
}


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
        group_size: of int4_group, columns that share a scale, a power of two from 32.
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
        if self.up_rows * self.hidden * 2 >= 2**32:  # the kernels count a matrix's bytes in 32 bits
            raise ValueError(
                "ExpertShape: a matrix of an expert must be under 4 GiB in 16 bits, got "
                f"[{self.up_rows}, {self.hidden}]"
            )
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
        group = self.group_size
        if self.weight_format == "int4_group" and (group < 32 or group & (group - 1)):
            raise ValueError(f"{name}: group_size must be a power of two from 32, got {group}")
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
