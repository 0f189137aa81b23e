"""Who computes the experts: one small seam behind `layer.run_experts`.

A backend says whether it can compute a layer (`supports`), is bound to it once (`bind`: everything
that does not change from call to call is worked out there), and from then on makes one run per
call of the layer:

    run = experts.start(hidden, topk_ids, topk_weights)     which experts have rows: run.experts
    run.compute(pool, [(index in run.experts, slot), ...])  as pages arrive, in any portions
    out = run.finish()                                      combined in a fixed order, [T, H]

Results must not depend on the portions, on the slots, or on what other slots hold. To add a
backend, write a module with such a class and name it in `_KNOWN`, fastest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from moe_offload.backends.cuda import Cuda
from moe_offload.backends.grouped_mm import GroupedMM
from moe_offload.backends.native import Native
from moe_offload.backends.triton import TritonExperts
from moe_offload.errors import UnsupportedModelError

if TYPE_CHECKING:
    from moe_offload.pager import ExpertPool
    from moe_offload.pages import PageLayout

Ready = Sequence[tuple[int, int]]  # (index in run.experts, slot)


class ExpertRun(Protocol):
    """One call of one layer."""

    experts: list[int]  # distinct experts with rows; ids outside [0, E) are not in it

    def compute(self, pool: ExpertPool, ready: Ready) -> None:
        """Compute the rows of these experts; their slots may be given away when it returns."""

    def finish(self) -> Tensor:
        """[T, H] in the dtype of hidden; rows of ids outside [0, E) contribute nothing."""


class BoundExperts(Protocol):
    """A backend tied to one layer: activation, layout and sizes are settled."""

    def start(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ExpertRun:
        """hidden [T, H], topk_ids [T, A] integer, topk_weights [T, A] floating point."""


class ExpertBackend(Protocol):
    """A way to compute experts.

    It computes on the CPU, unless it has `devices`: the types of device whose slots it can read,
    such as ("cpu", "cuda"). `auto_devices` are those on which "auto" may take it, all by default.
    One that asks a pool where in its slot each page begins says so by `reads_shifted = True`; for
    all others pages begin where their slots do.
    """

    name: str

    def missing(self) -> str | None:
        """Why it cannot run on this machine or in this installation; None when it can."""

    def supports(self, module: Any, layout: PageLayout) -> str | None:
        """Why it cannot compute this layer; None when it can."""

    def bind(self, module: Any, layout: PageLayout, num_experts: int) -> BoundExperts:
        """Prepare for a layer that it supports.

        Args:
            module: `has_gate`, `has_bias`, `is_transposed`, and `_apply_gate` or `act_fn`, as
                transformers' experts modules have them.
            layout: where the sections of a page lie.
            num_experts: E.
        """


_KNOWN: tuple[ExpertBackend, ...] = (Native(), Cuda(), TritonExperts(), GroupedMM())
NAMES = tuple(backend.name for backend in _KNOWN)


def describe() -> dict[str, str | None]:
    """Every backend by name, and why it cannot run here (None: it can)."""
    return {backend.name: backend.missing() for backend in _KNOWN}


def choose(
    wanted: str, module: Any, layout: PageLayout, name: str, device: str = "cpu"
) -> tuple[ExpertBackend, str | None]:
    """The backend for one layer.

    Args:
        wanted: "auto" (the fastest that supports the layer) or a backend's name.
        module: as for `ExpertBackend.bind`.
        layout: of the layer's pages.
        name: of the layer, for messages.
        device: type of the device the slots are on.

    Returns:
        The backend, and why faster ones were passed over (None when none was).

    Raises:
        UnsupportedModelError: the backend asked for by name cannot compute this layer.
    """
    passed_over: list[str] = []
    for backend in _KNOWN:
        if wanted not in ("auto", backend.name):
            continue
        devices = getattr(backend, "devices", ("cpu",))
        if device in (getattr(backend, "auto_devices", devices) if wanted == "auto" else devices):
            reason = backend.missing() or backend.supports(module, layout)
        elif wanted == "auto":
            continue  # not made for this device: nobody misses it here
        else:
            reason = f"it does not compute on {device}"
        if reason is None:
            return backend, "; ".join(passed_over) or None
        passed_over.append(f"{backend.name}: {reason}")
    raise UnsupportedModelError(
        f"{name}: expert_backend={wanted!r} cannot compute it ({'; '.join(passed_over)}). Use "
        'expert_backend="auto".'
    )
