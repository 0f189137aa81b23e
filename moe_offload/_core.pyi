# Types of the C++ module (csrc/bindings.cpp). Addresses are integers, as from Tensor.data_ptr().
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

MIN_SLOTS: int

def policy_names(live_only: bool) -> list[str]: ...
def replay(
    *,
    policy: str,
    num_experts: list[int],
    num_slots: int,
    kept: list[int],
    admit_limit: int,
    kinds: NDArray[Any],
    layers: NDArray[Any],
    counts: NDArray[Any],
    expert_offsets: NDArray[Any],
    experts: NDArray[Any],
    value_offsets: NDArray[Any],
    values: NDArray[Any],
) -> dict[str, Any]: ...
def build_info() -> dict[str, str | int]: ...
def copy_bytes(to: int, from_: int, nbytes: int) -> None: ...
def advise_huge_pages(address: int, nbytes: int) -> None: ...
def why_no_io_uring() -> str: ...
def disk_roof(
    paths: list[str],
    *,
    page_bytes: int,
    chunk_bytes: int,
    depth: int,
    seconds: float,
    seed: int = 0,
    io_uring: bool = False,
    huge_pages: bool = True,
) -> tuple[int, float, float]: ...

class PageSource: ...

class FileSource(PageSource):
    def __init__(self, paths: list[str], direct: bool) -> None: ...
    def add_page(
        self, layer: int, expert: int, segments: list[tuple[int, int, int, int]]
    ) -> None: ...
    @property
    def io_mode(self) -> str: ...
    def any_deleted(self) -> bool: ...

class MemorySource(PageSource):
    def __init__(self) -> None: ...
    def add_page(self, layer: int, expert: int, segments: list[tuple[int, int, int]]) -> None: ...
    def keep_alive(self, owners: object) -> None: ...

class CallbackSource(PageSource):
    def __init__(self, fill: Callable[[int, int, int], int], page_bytes: int) -> None: ...

class Ticket:
    def next(self) -> list[tuple[int, int]]: ...
    def release(self, indices: Sequence[int]) -> None: ...
    def close(self) -> None: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Ticket: ...
    def __exit__(self, *args: object) -> None: ...

class PathPredictor:
    def __init__(self, num_experts: Sequence[int]) -> None: ...
    def observe(self, layer: int, experts: Sequence[int]) -> None: ...
    def predict(self, layer: int) -> list[float]: ...

class Pager:
    def __init__(
        self,
        *,
        source: PageSource,
        num_experts: list[int],
        layer_names: list[str],
        slots: int,
        num_slots: int,
        slot_stride: int,
        policy: str = "lru",
        kept: list[tuple[int, int]] = ...,
        admit_limit: int = 0,
        io_engine: str = "auto",
        num_threads: int = 4,
        queue_depth: int = 8,
        chunk_bytes: int = ...,
        wait_timeout_s: float = 120.0,
    ) -> None: ...
    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float] = (),
        num_tokens: int = 0,
    ) -> Ticket: ...
    def prefetch(self, layer: int, experts: Sequence[int]) -> int: ...
    def expect(self, layer: int, experts: Sequence[int]) -> list[int]: ...
    def cancel_prefetches(self, layer: int = -1, keep: Sequence[int] = ...) -> None: ...
    def predict(
        self,
        layer: int,
        experts: Sequence[int],
        probabilities: Sequence[float],
        visits_ahead: int = 0,
    ) -> None: ...
    def begin_sequence(self) -> None: ...
    def set_recording(self, recording: bool) -> None: ...
    def recorded(self) -> dict[str, NDArray[Any]]: ...
    def fill(self, pages: list[tuple[int, int]]) -> int: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, list[int]]: ...
    def reset_counters(self) -> None: ...
    def timeline(self) -> tuple[list[tuple[str, int, int, int, int, int]], int]: ...
    def residents(self) -> list[tuple[int, int, int]]: ...
    @property
    def num_live_tickets(self) -> int: ...
    @property
    def admit_limit(self) -> int: ...
    @property
    def uses_weights(self) -> bool: ...
    @property
    def io_engine(self) -> str: ...
    @property
    def uses_predictions(self) -> bool: ...
    def set_chaos(
        self,
        seed: int = 0,
        max_delay_us: int = 0,
        reorder: bool = False,
        fail_probability: float = 0.0,
        evict_probability: float = 0.0,
    ) -> None: ...

View = tuple[int, int, int]  # address of slot 0, bytes to the next slot, bytes to the next row

def cpu_isas(dtype: str) -> list[str]: ...

class FfnWeights:
    def __init__(
        self,
        up: View,
        down: View,
        gate: View | None = None,
        up_bias: View | None = None,
        down_bias: View | None = None,
        gate_bias: View | None = None,
    ) -> None: ...

class FfnRun:
    @property
    def experts(self) -> list[int]: ...
    def compute(self, weights: FfnWeights, ready: Sequence[tuple[int, int]]) -> None: ...
    def compute_all(self, weights: FfnWeights) -> None: ...
    def finish(self, out: int) -> None: ...

class ExpertFfn:
    def __init__(
        self,
        *,
        hidden: int,
        inner: int,
        num_experts: int,
        dtype: str,
        activation: str,
        gated: bool,
        alpha: float = 1.0,
        limit: float = 0.0,
        offset: float = 0.0,
        isa: str = "auto",
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def start(
        self,
        hidden: int,
        topk_ids: int,
        ids_are_int64: bool,
        topk_weights: int,
        weights_dtype: str,
        num_tokens: int,
        top_k: int,
        num_threads: int,
    ) -> FfnRun: ...
