"""The experts of one layer as a single, opaque node for torch.compile.

Which pages `moe_offload::run_experts` copies depends on the routed ids,
which the host reads, so its inside cannot be traced or captured into a CUDA graph (it is tagged
cudagraph_unsafe: inductor leaves it out of its graphs). Tracing needs only the shape of the result.
Outside of torch.compile the layer calls its function directly, without the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload.errors import StateError
from moe_offload.pager import find_layer

_LIBRARY = torch.library.Library("moe_offload", "FRAGMENT")
# torch 2.7 does not have the tag yet; there, mode="reduce-overhead" fails with our refusal.
_TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None))]
_LIBRARY.define(
    "run_experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, int layer) -> Tensor",
    tags=tuple(_TAGS),
)


def _run_experts(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int) -> Tensor:
    """hidden [T, H], topk_ids [T, A], topk_weights [T, A] -> [T, H], see `layer.run_experts`.

    `layer` is `PagedLayer.key`.
    """
    from moe_offload.layer import run_paged

    handle = find_layer(layer)
    if handle is None:
        raise StateError(
            "run_experts: the offloader this code was compiled with no longer exists. Compile the "
            "model again after offloading it."
        )
    return run_paged(handle, hidden, topk_ids, topk_weights).contiguous()


def _run_experts_fake(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int) -> Tensor:
    return hidden.new_empty(hidden.shape)


_LIBRARY.impl("run_experts", _run_experts, "CompositeExplicitAutograd")
torch.library.register_fake("moe_offload::run_experts", _run_experts_fake, lib=_LIBRARY)
