"""What a model and a budget come to, before anything is loaded: bytes per tier, slots, the minimum.

The sizes are not estimated from the config: the model is built on the meta device, where tensors
have shapes but no bytes, and asked; the KV cache is measured by sending one meta token through it.
Of a checkpoint only config.json and the safetensors headers are read, of a hub id only the config.
(The file is not called plan.py: a submodule hides a function of the same name in its package.)
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_offload.budgets import plan_slots, smallest_budget
from moe_offload.config import OffloadConfig, format_bytes, parse_budget
from moe_offload.console import aligned
from moe_offload.expert_layer import ExpertLayer
from moe_offload.pages import PageLayout

Source = Literal["files", "converted files", "host memory", "unknown"]


@dataclass(frozen=True)
class PoolPlan:
    """Slots for the experts of one layout; nearly every model has one pool.

    Attributes:
        page_bytes: weights of one expert, what a miss moves.
        slot_bytes: the same with alignment, what a slot occupies.
    """

    num_layers: int
    num_pages: int
    num_slots: int
    page_bytes: int
    slot_bytes: int


@dataclass(frozen=True)
class Plan:
    """Where the bytes of a model go under a budget. `print(plan)` shows a table.

    Attributes:
        model: the path or hub id, or the class of a live model.
        architecture: transformers' model type.
        device_budget: as asked for; `budget_bytes` is what that means for this model.
        pools: one entry per page layout.
        experts_per_token: routed experts of one token per layer, None if the config is silent.
        dense_bytes: memory of everything that is not a routed expert.
        expert_bytes: all experts as slots: a budget of 100%.
        source: what slots are filled from: "files" (byte ranges, read verbatim), "converted
            files", "host memory" (live models), or "unknown" (files absent; of a quantised
            checkpoint the sizes are then those of dequantised experts).
        expert_disk_bytes: expert tensors in the checkpoint's files; None for live models and
            where the source is unknown.
        smallest_budget_bytes: the smallest budget this model works with.
        kv_cache_bytes_per_token: per token and sequence, None when it could not be measured.
        context_length: positions the model has, None if the config is silent.
        lossy: what changes the tokens of a live model, see `Offloader.lossy`.
        weight_format: how pages hold weights: "plain", "mxfp4", "fp8_block" or "int4_group".
    """

    model: str
    architecture: str
    device_budget: int | str
    budget_bytes: int
    pools: tuple[PoolPlan, ...]
    experts_per_token: int | None
    dense_bytes: int
    expert_bytes: int
    source: Source
    expert_disk_bytes: int | None
    smallest_budget_bytes: int
    kv_cache_bytes_per_token: int | None
    context_length: int | None
    lossy: str | None = None
    weight_format: str = "plain"

    @property
    def num_layers(self) -> int:
        return sum(pool.num_layers for pool in self.pools)

    @property
    def num_pages(self) -> int:
        return sum(pool.num_pages for pool in self.pools)

    @property
    def num_slots(self) -> int:
        return sum(pool.num_slots for pool in self.pools)

    @property
    def slots_bytes(self) -> int:
        """Memory of all slots: what the budget really buys."""
        return sum(pool.num_slots * pool.slot_bytes for pool in self.pools)

    @property
    def share(self) -> float:
        """Slots over experts, 0 to 1."""
        return self.num_slots / self.num_pages

    @property
    def bytes_per_token(self) -> int | None:
        """Expert bytes one token needs: what it moves when no expert is resident."""
        if self.experts_per_token is None:
            return None
        return sum(p.num_layers * self.experts_per_token * p.page_bytes for p in self.pools)

    def as_dict(self) -> dict[str, Any]:
        """All of the above as plain numbers, for JSON."""
        names = ("num_layers", "num_pages", "num_slots", "slots_bytes", "share", "bytes_per_token")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        rows = list(self._rows())
        head = f"{self.model} ({self.architecture}), budget {self.device_budget}"
        lines = aligned(rows, left=(0, 2))
        if self.lossy is not None:
            lines.append(f"LOSSY: {self.lossy} is on, the tokens are not the resident model's")
        return "\n".join([head, "", *lines])

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, size and explanation of each line of the table."""
        pages = " and ".join(
            f"{p.num_pages} experts of {format_bytes(p.page_bytes)} in {p.num_layers} layers"
            for p in self.pools
        )
        if self.expert_disk_bytes is not None:
            how = "read verbatim" if self.source == "files" else "converted while read"
            how += "" if self.weight_format == "plain" else f", {self.weight_format}"
            yield "experts, on disk", format_bytes(self.expert_disk_bytes), f"{pages}; {how}"
        else:
            known = {"host memory": "in host memory too", "files": "read from the checkpoint"}
            where = known.get(self.source, "size on disk unknown")
            yield "experts, all", format_bytes(self.expert_bytes), f"{pages}; {where}"
        yield (
            "experts, in memory",
            format_bytes(self.slots_bytes),
            f"{self.num_slots} slots, {self.share:.1%} of the experts, "
            f"{self.num_slots / self.num_layers:.1f} per layer",
        )
        yield "dense, in memory", format_bytes(self.dense_bytes), "everything but the experts"
        if self.kv_cache_bytes_per_token is not None:
            context = f"; {self.context_length} at most" if self.context_length else ""
            size = format_bytes(self.kv_cache_bytes_per_token)
            room = "; on the CPU room for an eighth more, or 64 tokens"  # growing_cache.room_for
            yield "KV cache, in memory", size, f"for each token of a sequence{context}{room}"
        if self.bytes_per_token is not None:
            count = self.num_layers * (self.experts_per_token or 0)
            what = f"{count} experts; those without a slot come from the source"
            yield "one token uses", format_bytes(self.bytes_per_token), what
        smallest = self.smallest_budget_bytes
        yield "smallest budget", format_bytes(smallest), f"--device-budget {smallest}"


def plan(model: Any, device_budget: int | str = "25%") -> Plan:
    """Say what a budget means for a model, without loading any weight.

    Args:
        model: a checkpoint folder, a hub id (only its config.json is fetched), or a live
            transformers model, offloaded or not.
        device_budget: as for `from_pretrained`.

    Returns:
        The Plan. Blocks for building the model on the meta device: about a second.

    Raises:
        CheckpointError: missing, damaged or inconsistent files.
        UnsupportedModelError: no experts that can be paged.
        BudgetError: malformed, or below the smallest budget, which the message names.

    Example:
        >>> print(moe_offload.plan("path/to/checkpoint", device_budget="6GiB"))
    """
    facts = _live_facts(model) if isinstance(model, nn.Module) else _checkpoint_facts(model)
    groups: dict[PageLayout, list[int]] = {}
    for layer in facts.layers:
        groups.setdefault(PageLayout.build(layer.page), []).append(layer.num_experts)
    layouts, num_pages = list(groups), [sum(counts) for counts in groups.values()]
    slots = plan_slots(layouts, num_pages, device_budget)
    total = sum(a.slot_stride * b for a, b in zip(layouts, num_pages, strict=True))
    text_config = facts.config.get_text_config()
    top_k = getattr(text_config, "num_experts_per_tok", None)
    context = getattr(text_config, "max_position_embeddings", None)
    return Plan(
        model=facts.name,
        architecture=str(facts.config.model_type),
        device_budget=device_budget,
        budget_bytes=parse_budget(device_budget, total),
        pools=tuple(
            PoolPlan(len(counts), sum(counts), num, layout.payload_bytes, layout.slot_stride)
            for (layout, counts), num in zip(groups.items(), slots, strict=True)
        ),
        experts_per_token=top_k if isinstance(top_k, int) else None,
        dense_bytes=facts.dense_bytes,
        expert_bytes=total,
        source=facts.source,
        expert_disk_bytes=facts.expert_disk_bytes,
        smallest_budget_bytes=smallest_budget(layouts, num_pages),
        kv_cache_bytes_per_token=facts.kv_cache_bytes_per_token,
        context_length=context if isinstance(context, int) else None,
        lossy=facts.lossy,
        weight_format="/".join(sorted({layer.weight_format for layer in facts.layers})),
    )


@dataclass(frozen=True)
class _Facts:
    name: str
    config: Any
    layers: Sequence[ExpertLayer]
    dense_bytes: int
    source: Source
    expert_disk_bytes: int | None
    kv_cache_bytes_per_token: int | None
    lossy: str | None = None


def _live_facts(model: nn.Module) -> _Facts:
    from moe_offload.huggingface.adapters import find_expert_layers
    from moe_offload.huggingface.attach import find_attachment
    from moe_offload.huggingface.llama4 import unteach

    attachment = find_attachment(model)  # offloaded already
    layers = attachment.layers if attachment else find_expert_layers(model)
    if attachment is None:
        unteach(model)
    in_memory = attachment is None or attachment.holds_parameters
    config: Any = copy.deepcopy(model.config)
    config.dtype = model.dtype  # it may have been cast since it was made
    return _Facts(
        name=type(model).__name__,
        config=config,
        layers=layers,
        dense_bytes=_dense_bytes(model, layers),
        source="host memory" if in_memory else "files",
        expert_disk_bytes=None,
        kv_cache_bytes_per_token=_kv_cache_bytes(_on_meta(type(model), config), config),
        lossy=attachment.offloader.lossy if attachment and attachment.offloader else None,
    )


def _checkpoint_facts(path_or_id: str | os.PathLike[str]) -> _Facts:
    from moe_offload.huggingface.adapters import find_expert_layers
    from moe_offload.huggingface.loading import _check_location, _model_class, _model_config
    from moe_offload.huggingface.packed_int4 import PackedCheckpoint, plain_config
    from moe_offload.huggingface.quantised import dequantising_config, packing_of

    path = os.fspath(path_or_id)
    _check_location(path, {})
    config = _model_config(path, {})
    model_class = _model_class(path, config)
    packing = packing_of(config, path)
    if packing is not None:
        config = plain_config(config)
    quantization = dequantising_config(config, path)
    checkpoint = _open_checkpoint(path)
    if checkpoint is not None and packing is not None:
        checkpoint = PackedCheckpoint(checkpoint, packing)
    if config.dtype is None:  # as transformers: then the first floating tensor decides
        dtypes = [t.dtype for t in checkpoint.tensors.values()] if checkpoint else []
        config.dtype = next((d for d in dtypes if d.is_floating_point), torch.float32)
    model = _on_meta(model_class, config)
    layers = find_expert_layers(model)
    source: Source = "unknown"
    disk_bytes = None
    if checkpoint is not None:
        source, disk_bytes, layers = _expert_files(checkpoint, layers, model, quantization)
    return _Facts(
        name=path,
        config=config,
        layers=layers,
        dense_bytes=_dense_bytes(model, layers),
        source=source,
        expert_disk_bytes=disk_bytes,
        kv_cache_bytes_per_token=_kv_cache_bytes(model, config),
    )


def _open_checkpoint(path: str) -> Any:
    """Headers of a local checkpoint, or of a hub id that is in the cache already; else None."""
    from moe_offload.errors import CheckpointError
    from moe_offload.safetensors_file import INDEX_NAME, SINGLE_NAME, Checkpoint

    if os.path.isdir(path):
        return Checkpoint.open(path)
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX_NAME, SINGLE_NAME):
        cached = try_to_load_from_cache(path, name)
        if isinstance(cached, str):
            try:
                return Checkpoint.open(os.path.dirname(cached))
            except CheckpointError:  # half downloaded: from_pretrained will fetch the rest
                return None
    return None


def _expert_files(
    checkpoint: Any, layers: list[ExpertLayer], model: Any, quantization: Any
) -> tuple[Source, int, list[ExpertLayer]]:
    """How experts lie in the files, their bytes there, and the layers with the pages they get."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers.auto import AutoHfQuantizer

    from moe_offload.huggingface.checkpoint import CheckpointExperts
    from moe_offload.huggingface.packed_int4 import PackedCheckpoint
    from moe_offload.huggingface.quantised import (
        allow_partial_blocks,
        check_scales,
        quantised_pages,
    )
    from moe_offload.sources import FilePages

    quantizer = None
    if quantization is not None:
        check_scales(checkpoint)
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
    mapping = get_model_conversion_mapping(model, None, quantizer)
    allow_partial_blocks(mapping)
    experts = CheckpointExperts(checkpoint, layers, model, mapping, cast=quantizer is None)
    everything = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    dense = sum(tensor.nbytes for tensor in experts.dense.values())
    if quantizer is not None or isinstance(checkpoint, PackedCheckpoint):
        found = quantised_pages(experts, OffloadConfig())
        if not isinstance(found, str):
            how: Source = "files" if found.verbatim else "converted files"
            return how, everything - dense, found.layers
    verbatim = isinstance(experts.pages(), FilePages)
    return "files" if verbatim else "converted files", everything - dense, layers


def _on_meta(model_class: Any, config: Any) -> Any:
    """The model without bytes, in the dtypes a load would give it."""
    from transformers.core_model_loading import build_glob_alternation

    with torch.device("meta"):
        model = model_class._from_config(config).eval()
    kept = model._get_dtype_plan(config.dtype)  # what transformers keeps in fp32
    if kept:
        pattern, rule_of_group, _ = build_glob_alternation(list(kept))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (match := pattern.search(name)) is not None:
                tensor.data = tensor.data.to(kept[rule_of_group[match.lastgroup]])
    return model


def _dense_bytes(model: nn.Module, layers: Sequence[ExpertLayer]) -> int:
    """Bytes of all parameters and buffers but the experts', tied ones once."""
    experts = {f"{layer.name}.{section}" for layer in layers for section in layer.tensors}
    tensors = [*model.named_parameters(), *model.named_buffers()]  # each object once
    return sum(t.numel() * t.element_size() for name, t in tensors if name not in experts)


def _kv_cache_bytes(model: Any, config: Any) -> int | None:
    """Bytes one token leaves in the cache: a forward on meta, with experts that do nothing."""
    from transformers import DynamicCache

    from moe_offload.huggingface.adapters import find_expert_layers

    for layer in find_expert_layers(model):
        object.__setattr__(layer.module, "forward", _same_shape)
    try:
        cache = DynamicCache(config=config.get_text_config())
        token = torch.zeros(1, 1, dtype=torch.long, device="meta")
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)
        tensors = [(layer.keys, layer.values) for layer in cache.layers]
    except Exception:  # a family whose forward or cache is special: the plan is worth it without
        return None
    kept = [t for pair in tensors for t in pair if isinstance(t, Tensor)]
    return sum(math.prod(t.shape) * t.element_size() for t in kept) or None


def _same_shape(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden)
