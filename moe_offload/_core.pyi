# Types of the C++ module (csrc/bindings.cpp). Addresses are integers, as from Tensor.data_ptr().
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

MIN_SLOTS: int
MAX_ROUTED_TOKENS: int
MIN_HOST_FRAMES: int

def host_frame_bytes(page_bytes: int) -> int: ...
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

class CudaDevice:
    def __init__(self, ordinal: int = 0, library: str = "libcuda.so.1") -> None: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]: ...
    @property
    def driver_version(self) -> int: ...

class Ticket:
    def next(self) -> list[tuple[int, int]]: ...
    def release(self, indices: Sequence[int]) -> None: ...
    def close(self) -> None: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Ticket: ...
    def __exit__(self, *args: object) -> None: ...

def dense(x: NDArray[Any], w: NDArray[Any], isa: str = "") -> NDArray[Any]: ...
def packed_product(
    x: NDArray[Any], w: NDArray[Any], columns: int, isa: str = ""
) -> NDArray[Any]: ...
def dense_isas() -> list[str]: ...

PANEL: int

class RppStep:
    def __init__(
        self,
        tensors: dict[str, NDArray[Any]],
        head: NDArray[Any],
        blocks: Sequence[Sequence[NDArray[Any]]],
        memory: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        hidden: Sequence[float],
    ) -> None: ...
    def step(self, tokens: NDArray[Any], chances: bool) -> NDArray[Any]: ...

class Chances:
    def chance(self, score: float) -> float: ...
    def learn(self, score: float, used: bool) -> None: ...
    def fade(self) -> None: ...

class Ranking:
    def __init__(self, scores: NDArray[Any]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def chance(self) -> list[float]: ...
    @property
    def order(self) -> list[int]: ...
    def likely(self, chances: Chances, threshold: float, count: int) -> list[int]: ...
    def teach(self, chances: Chances, absent: list[int], used: NDArray[Any]) -> None: ...

class FoundPerLayer:
    def __init__(self, num_layers: int) -> None: ...
    def add(
        self, layer: int, ranking: Ranking, used: NDArray[Any], near: int, deep: int
    ) -> None: ...
    def sums(self) -> NDArray[Any]: ...

def fetch_ahead(
    pager: Pager,
    layer: int,
    ranking: Ranking,
    chances: Chances,
    threshold: float,
    most: int,
    budget: int,
    started: list[int],
) -> tuple[bool, list[int], int, bool, list[int]]: ...
def tell_policy(pager: Pager, layer: int, ranking: Ranking) -> None: ...

class PathPredictor:
    def __init__(self, num_experts: Sequence[int]) -> None: ...
    def observe(
        self,
        layer: int,
        experts: Sequence[int],
        num_tokens: int = 1,
        routes: Sequence[int] = (),
    ) -> None: ...
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
        queue_depth: int = 4,
        chunk_bytes: int = ...,
        wait_timeout_s: float = 120.0,
        cuda: CudaDevice | None = None,
        page_bytes: int = 0,
        copy_chunk_bytes: int = ...,
        host_bytes: int = 0,
        pin_in_background: bool = True,
        shift_pages: bool = False,
        swap_back: bool = False,
    ) -> None: ...
    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float] = (),
        num_tokens: int = 0,
        stream: int | None = None,
        routes: Sequence[int] = (),
    ) -> Ticket: ...
    def prefetch(self, layer: int, experts: Sequence[int]) -> int: ...
    def expect(self, layer: int, experts: Sequence[int]) -> list[int]: ...
    def read_ahead(self, layer: int) -> int: ...
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
    def engine_stats(self) -> dict[str, int]: ...
    def engine_limit(self) -> str: ...
    @property
    def num_live_tickets(self) -> int: ...
    @property
    def admit_limit(self) -> int: ...
    @property
    def slot_shifts(self) -> int: ...
    def slot_shift(self, slot: int) -> int: ...
    @property
    def uses_weights(self) -> bool: ...
    @property
    def uses_routes(self) -> bool: ...
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

# address of slot 0, bytes to the next slot, to the next row, to the next element of a row
View = tuple[int, int, int, int]

def sort_routes(
    *, ids: int, ids_are_int64: bool, num_routes: int, num_experts: int, maps: list[int]
) -> None: ...
def copy_rows(
    from_address: int, to_address: int, shape: tuple[int, int, int], strides: tuple[int, int]
) -> None: ...
def cpu_isas(dtype: str) -> list[str]: ...
def memory_roof(address: int, num_bytes: int, ahead: int) -> tuple[int, float]: ...
def multiply_roof(dtype: str, seconds: float, isa: str = "auto") -> tuple[int, float]: ...

# address of a weight, bytes from row to row, address of the bias or 0, features, address of y
_Projection = tuple[int, int, int, int, int]
# address of a weight, its size, epsilon, weight_offset, rounds_before_weight
_Norm = tuple[int, int, float, float, bool]

class RouterRule:
    def __init__(
        self,
        score: str,
        top_k: int,
        rounds_logits: bool,
        sorted: bool,
        normalises: bool,
        epsilon: float,
        scale: float,
        groups: tuple[int, int, int],
        masked: float,
        float_logits: bool,
        float_weights: bool,
    ) -> None: ...
    def fits(self, experts: int) -> bool: ...

class DenseKernels:
    def __init__(self, dtype: str, isa: str = "auto") -> None: ...
    @property
    def isa(self) -> str: ...
    def multiply(
        self,
        x: int,
        rows: int,
        in_features: int,
        out_features: int,
        weight: int,
        row_stride: int,
        bias: int,
        y: int,
        num_threads: int,
    ) -> None: ...
    def project(
        self,
        x: int,
        rows: int,
        in_features: int,
        query: _Projection,
        key: _Projection,
        value: _Projection,
        size: int,
        query_norm: _Norm | None,
        key_norm: _Norm | None,
        angles: tuple[int, int, int, int],
        num_threads: int,
    ) -> None: ...
    def rms_norm(
        self,
        x: int,
        rows: int,
        size: int,
        weight: int,
        epsilon: float,
        weight_offset: float,
        rounds_before_weight: bool,
        y: int,
        num_threads: int,
    ) -> None: ...
    def route(
        self,
        x: int,
        rows: int,
        hidden: int,
        experts: int,
        weight: int,
        bias: int,
        correction: int,
        rule: RouterRule,
        logits: int,
        weights: int,
        ids: int,
        num_threads: int,
    ) -> None: ...
    def attend(
        self,
        q: int,
        keys: int,
        values: int,
        out: int,
        shape: tuple[int, int, int, int, int, int],
        key_strides: tuple[int, int, int],
        value_strides: tuple[int, int, int],
        mask: tuple[int, str, int, int, int] | None,
        scale: float,
        num_threads: int,
    ) -> None: ...

class FfnWeights:
    def __init__(
        self,
        up: View,
        down: View,
        gate: View | None = None,
        up_bias: View | None = None,
        down_bias: View | None = None,
        gate_bias: View | None = None,
        format: str = "plain",
        up_scales: tuple[int, int] | None = None,
        down_scales: tuple[int, int] | None = None,
        gate_scales: tuple[int, int] | None = None,
        up_group: int = 0,
        down_group: int = 0,
        shifts: int = 0,
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
        rows_apart: bool = False,
    ) -> FfnRun: ...
