"""`experts_implementation="moe_offload"`: a resident transformers model on this package's kernels.

It computes a layer as `OffloadConfig.expert_backend="auto"` does, natively where that can be and
with transformers' grouped_mm elsewhere, so that an offloaded model and a resident one agree bit for
bit. Registering adds one name to transformers' table of expert functions.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moe_offload import _core
from moe_offload.backends.native import BoundLayer, Native, NativeRun
from moe_offload.huggingface.adapters import section_names
from moe_offload.layer import inference_only
from moe_offload.pages import PageLayout

NAME = "moe_offload"

# What was worked out for a module, and for which tensors. Keyed weakly and not stored on the
# module, where it would stand in the way of copying and pickling.
_Prepared = tuple[tuple[int, ...], "tuple[BoundLayer, _core.FfnWeights] | None"]
_prepared: weakref.WeakKeyDictionary[Any, _Prepared] = weakref.WeakKeyDictionary()


def register() -> None:
    """Make the name known to transformers; harmless when repeated."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def implementation_of(expert_backend: str) -> str:
    """The experts_implementation whose resident results an offloaded model has."""
    return "grouped_mm" if expert_backend == "grouped_mm" else NAME


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of an experts module on its own parameters, as transformers calls it."""
    names = section_names(module)
    key = tuple(getattr(module, name).data_ptr() for name in names)
    known = _prepared.get(module)
    if known is None or known[0] != key:
        known = _prepared[module] = (key, _prepare(module, names, hidden_states))
    prepared = known[1]
    if prepared is None:
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    layer, weights = prepared

    def compute() -> Tensor:
        call = NativeRun(layer, hidden_states, top_k_index, top_k_weights)
        call.run.compute_all(weights)
        return call.finish()

    return inference_only(
        compute, f"experts of {type(module).__name__}", hidden_states, top_k_weights
    )


def _prepare(
    module: Any, names: list[str], hidden_states: Tensor
) -> tuple[BoundLayer, _core.FfnWeights] | None:
    tensors = {name: getattr(module, name).detach() for name in names}
    on_cpu = all(t.device.type == "cpu" for t in (hidden_states, *tensors.values()))
    if not on_cpu or any(t.dim() == 3 and t.stride(2) != 1 for t in tensors.values()):
        return None
    layout = PageLayout.build({name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()})
    native = Native()
    if native.supports(module, layout) is not None:
        return None
    layer = native.bind(module, layout, len(tensors[names[0]]))
    return layer, layer.weights(tensors)
