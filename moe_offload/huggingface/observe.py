"""Watch a model route: one place that turns module hooks into events, for traces and predictors.

    with observe(model, observer):
        model.generate(...)

An `Observer` sees, in the order they happen: a model call begins (its tokens are known), the input
of each decoder layer, the input of each MoE block, the router's decision, and the end of the call.
The seam is the experts module, which exists in the offloaded and in the resident model; so both are
observed alike. Hooks sit on this model's modules only and go away when the `with` block ends, also
by an exception. An event whose method the observer does not override costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from moe_offload.errors import UnsupportedModelError
from moe_offload.huggingface.adapters import _looks_like_experts
from moe_offload.layer import OffloadedExperts


@dataclass(frozen=True)
class ModelCall:
    """One forward call of the model, as known when it begins.

    Attributes:
        number: calls since `observe`, from 0.
        input_ids: [B, T] token ids, None when the model was given embeddings.
        attention_mask: [B, past + T] as given (0 marks padding), or None.
        batch: B sequences.
        length: T positions per sequence in this call; the experts see B * T rows, sequence by
            sequence.
        position: positions already in the KV cache; 0 when new sequences begin.
        phase: "decode" for one position on top of a cache, else "prefill".
    """

    number: int
    input_ids: Tensor | None
    attention_mask: Tensor | None
    batch: int
    length: int
    position: int
    phase: Literal["prefill", "decode"]


class Observer:
    """Override what you need. Tensors are the model's own: read them, do not change them.

    Layers count MoE layers only, from 0, in module order: the offloader's numbering.
    """

    def call_begins(self, call: ModelCall) -> None:
        """The tokens of this call are known; nothing has been computed."""

    def layer_begins(self, layer: int, hidden: Tensor) -> None:
        """Input of the decoder layer, before attention: [B, T, H]."""

    def block_begins(self, layer: int, hidden: Tensor) -> None:
        """Input of the MoE block, which its router sees: [B, T, H]."""

    def layer_routed(self, layer: int, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """The router's choice, before any expert is fetched: ids [R, A], weights [R, A]."""

    def call_ends(self, call: ModelCall) -> None:
        """The call returned or raised."""


@dataclass(frozen=True)
class RoutedLayer:
    """The modules of one MoE layer."""

    name: str  # of the experts module
    experts: nn.Module
    block: nn.Module  # router and experts
    decoder_layer: nn.Module  # attention and MoE block; the block itself where there is no such


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The MoE layers of a model, offloaded or resident, in module order.

    Raises:
        UnsupportedModelError: there are none.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if not (_looks_like_experts(module) or isinstance(module, OffloadedExperts)):
            continue
        block = modules[name.rpartition(".")[0]] if name else module
        found.append(RoutedLayer(name, module, block, _decoder_layer(modules, name, block)))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts to observe; expected a "
            "Mixture-of-Experts model that moe_offload supports."
        )
    return found


def _decoder_layer(modules: dict[str, nn.Module], name: str, block: nn.Module) -> nn.Module:
    """The outermost numbered ancestor: `model.layers.3` of `model.layers.3.mlp.experts`."""
    parts = name.split(".")
    for end, part in enumerate(parts):
        if part.isdecimal() and isinstance(modules[".".join(parts[:end])], nn.ModuleList):
            layer = modules[".".join(parts[: end + 1])]
            return layer if layer is not modules[name] else block
    return block


class observe:
    """Send the events of `model` to `observer`; a context manager, or `.close()` by hand.

    Args:
        model: a transformers MoE model, offloaded or resident, or any module around
            `OffloadedExperts`. One thread may call it at a time.
        observer: what its methods raise reaches the caller of the model.

    Raises:
        UnsupportedModelError: no routed experts.
    """

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self.layers = routed_layers(model)
        self._observer = observer
        self._call: ModelCall | None = None
        self._calls = 0
        self._handles: list[Any] = []

        def hook(module: nn.Module, method: str, function: Callable) -> None:
            if getattr(type(observer), method) is not getattr(Observer, method):
                handle = module.register_forward_pre_hook(function, with_kwargs=True)
                self._handles.append(handle)

        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))
        for index, layer in enumerate(self.layers):
            hook(layer.decoder_layer, "layer_begins", _hidden(observer.layer_begins, index))
            hook(layer.block, "block_begins", _hidden(observer.block_begins, index))
            hook(layer.experts, "layer_routed", _routed(observer, index, layer.experts))

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> observe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        shaped = tokens if tokens is not None else kwargs.get("inputs_embeds")
        batch, length = (1, 1) if shaped is None else _batch_and_length(shaped)
        cache = kwargs.get("past_key_values")
        position = int(cache.get_seq_length()) if cache is not None else 0
        is_ids = isinstance(tokens, Tensor) and tokens.dim() == 2
        self._call = ModelCall(
            number=self._calls,
            input_ids=tokens if is_ids else None,
            attention_mask=kwargs.get("attention_mask"),
            batch=batch,
            length=length,
            position=position,
            phase="decode" if length == 1 and position > 0 else "prefill",
        )
        self._calls += 1
        self._observer.call_begins(self._call)

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._observer.call_ends(call)


def _batch_and_length(tensor: Tensor) -> tuple[int, int]:
    # Token ids [B, T] or embeddings [B, T, H]; plain modules of ours take [T, H].
    if tensor.dim() == 2 and tensor.is_floating_point():
        return 1, tensor.shape[0]
    return tensor.shape[0], tensor.shape[1]


def _hidden(event: Callable[[int, Tensor], None], index: int) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Families name the argument differently; it is always the first.
        event(index, args[0] if args else next(iter(kwargs.values())))

    return hook


def _routed(observer: Observer, index: int, experts: nn.Module) -> Callable:
    original = getattr(type(experts), "_moe_offload_original", type(experts))
    names = list(inspect.signature(original.forward).parameters)[1:]

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [*args, *(kwargs[name] for name in names[len(args) :])]
        observer.layer_routed(index, given[1], given[2])

    return hook
