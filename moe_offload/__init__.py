"""moe_offload: run Mixture-of-Experts models whose experts do not fit, exactly.

    model = moe_offload.from_pretrained("some-moe", device_budget="6GiB")
    model.generate(...)          # the same tokens, a fraction of the memory

Importing this package starts, compiles and prints nothing: every name below is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_offload.dense import use_dense_kernels
    from moe_offload.huggingface import from_pretrained, get_offloader, offload
    from moe_offload.layer import OffloadedExperts, OffloadedMoE
    from moe_offload.offloader import Offloader
    from moe_offload.planning import plan
    from moe_offload.scheduling import batch_generate
    from moe_offload.trace_recorder import record
    from moe_offload.verification import verify

__version__ = "0.1.0"

_HOMES = {
    "offload": "moe_offload.huggingface",
    "from_pretrained": "moe_offload.huggingface",
    "get_offloader": "moe_offload.huggingface",
    "Offloader": "moe_offload.offloader",
    "OffloadedExperts": "moe_offload.layer",
    "OffloadedMoE": "moe_offload.layer",
    "batch_generate": "moe_offload.scheduling",
    "plan": "moe_offload.planning",
    "record": "moe_offload.trace_recorder",
    "use_dense_kernels": "moe_offload.dense",
    "verify": "moe_offload.verification",
}

__all__ = [
    "OffloadedExperts",
    "OffloadedMoE",
    "Offloader",
    "batch_generate",
    "from_pretrained",
    "get_offloader",
    "offload",
    "plan",
    "record",
    "use_dense_kernels",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_offload' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
