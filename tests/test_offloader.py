"""The offloader over page files: exact bytes, resize, budgets, counters, failure, shutdown."""

import gc
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
from experts import random_routing, random_weights, write_page_file

from moe_offload import _core, budgets, pager
from moe_offload.budgets import plan_slots, smallest_budget
from moe_offload.config import OffloadConfig
from moe_offload.errors import BudgetError, PageReadError, StateError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.layer import OffloadedExperts
from moe_offload.offloader import Offloader
from moe_offload.pages import PageLayout, allocate_slab
from moe_offload.sources import CallbackPages, FilePages, Piece

LAYERS, EXPERTS = 3, 10


@pytest.fixture
def page_file(tmp_path):
    layers = [random_weights(EXPERTS, 32, 16, seed=seed) for seed in range(LAYERS)]
    path = tmp_path / "experts.bin"
    described, pages = write_page_file(path, layers)
    return path, layers, described, pages


def forward(offloader: Offloader, layers, layer: int, experts: list[int]) -> None:
    """Lock a working set and compare every delivered slot with the weights it should hold."""
    handle = offloader.handle(layer)
    with handle.pool.pager.acquire(handle.layer, experts) as ticket:
        seen = []
        while ready := ticket.next():
            for index, slot in ready:
                for name, tensor in handle.pool.page_views(slot).items():
                    assert torch.equal(tensor, layers[layer][name][experts[index]])
                seen.append(index)
            ticket.release([index for index, _ in ready])
        assert sorted(seen) == list(range(len(experts)))


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_resizes_and_failures_against_the_weights(page_file, seed, monkeypatch):
    """A dictionary of the true weights is the oracle; timing and failures are hostile."""
    if seed >= 3:  # pages begin where their files suggest
        monkeypatch.setattr(pager, "MIN_SHIFTED_BYTES", 1)
    _, layers, described, pages = page_file
    rng = random.Random(seed)
    options = {
        "policy": ["lru", "lfu", "static"][seed % 3],
        "direct_io": seed % 2 == 0,
        "chunk_bytes": rng.choice([4096, 8192, 1 << 20]),
        "io_threads": rng.choice([1, 3]),
        "io_engine": ["auto", "threads"][seed % 4 // 2],
        "io_depth": rng.choice([1, 5]),
    }
    with Offloader(described, pages, OffloadConfig(device_budget="30%", **options)) as offloader:
        failing = False
        failures = []
        for step in range(400):
            if step % 50 == 0:
                failing = step % 100 == 50
                offloader.chaos(
                    step,
                    max_delay_us=50,
                    reorder=True,
                    fail_probability=0.1 if failing else 0.0,
                    evict_probability=0.05,
                )
            if rng.random() < 0.03:
                offloader.resize(
                    rng.choice(["12%", "30%", "70%", "100%"]) if not failing else "30%"
                )
            layer = rng.randrange(LAYERS)
            experts = rng.sample(range(EXPERTS), rng.randrange(EXPERTS + 1))
            try:
                if rng.random() < 0.3:
                    offloader.prefetch(rng.randrange(LAYERS), rng.sample(range(EXPERTS), 3))
                forward(offloader, layers, layer, experts)
            except PageReadError as error:
                failures.append((failing, f"layers.{layer}.experts" in str(error)))
        assert failures
        assert all(failure == (True, True) for failure in failures)
        offloader.chaos()
        for layer in range(LAYERS):
            forward(offloader, layers, layer, list(range(EXPERTS)))
        stats = offloader.stats()
        assert (
            stats["lookups"] == stats["hits"] + stats["joined_prefetches"] + stats["demand_misses"]
        )


def test_everything_resident_reads_nothing_after_the_fill(page_file):
    _, layers, described, pages = page_file
    with Offloader(described, pages, OffloadConfig(device_budget="100%")) as offloader:
        payload = sum(tensor.nbytes for weights in layers for tensor in weights.values())
        stats = offloader.stats()
        assert stats["fill_bytes"] == payload
        assert stats["resident_pages"] == LAYERS * EXPERTS
        disk_bytes = stats["disk_bytes"]
        for layer in range(LAYERS):
            forward(offloader, layers, layer, list(range(EXPERTS)))
        stats = offloader.stats()
        assert (stats["hit_rate"], stats["demand_bytes"]) == (1.0, 0)
        assert stats["disk_bytes"] == disk_bytes


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_the_io_engine_is_reported(page_file, monkeypatch, engine):
    _, layers, described, pages = page_file
    if engine == "io_uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(f"no io_uring here: {reason}")
    with Offloader(described, pages, OffloadConfig(io_engine=engine)) as offloader:
        forward(offloader, layers, 0, list(range(EXPERTS)))
        stats = offloader.stats()
        assert (stats["io_engine"], stats["io_fallback"]) == (engine, None)
    with Offloader(described, pages, OffloadConfig()) as offloader:  # auto
        stats = offloader.stats()
        assert (stats["io_engine"] == "io_uring") == (_core.why_no_io_uring() == "")
        assert bool(stats["io_fallback"]) == (stats["io_engine"] == "threads")


def test_io_uring_for_experts_in_memory_is_refused():
    weights = random_weights(4, 32, 16)
    with pytest.raises(ValueError, match="io_uring reads files, and these experts come from mem"):
        OffloadedExperts(weights, device_budget="50%", io_engine="io_uring")


def test_counters_and_timeline_tell_what_happened(page_file, tmp_path):
    _, layers, described, pages = page_file
    with Offloader(described, pages, OffloadConfig(device_budget="50%")) as offloader:
        forward(offloader, layers, 1, [2, 3])
        forward(offloader, layers, 1, [3, 4])
        stats = offloader.stats()
        assert (stats["hits"], stats["demand_misses"], stats["lookups"]) == (1, 3, 4)
        per_page = sum(tensor[0].nbytes for tensor in layers[0].values())
        assert stats["demand_bytes"] == 3 * per_page
        assert stats["per_layer"][1]["hits"] == 1
        assert stats["per_layer"][0]["lookups"] == 0
        assert stats["io_mode"] in ("direct", "buffered")
        json.dumps(stats)
        path = tmp_path / "trace.json"
        assert offloader.timeline(path) > 0
        events = json.loads(path.read_text())["traceEvents"]
        copies = [event for event in events if event.get("cat") == "demand_copy"]
        assert sorted(event["args"]["expert"] for event in copies) == [2, 3, 4]
        assert all(event["dur"] >= 0 for event in copies)
        offloader.reset_stats()
        assert offloader.stats()["lookups"] == 0


def test_counters_survive_a_resize(page_file):
    _, layers, described, pages = page_file
    with Offloader(described, pages, OffloadConfig(device_budget="50%")) as offloader:
        forward(offloader, layers, 0, [1])
        offloader.resize("100%")
        assert offloader.stats()["demand_misses"] == 1
        assert offloader.stats()["num_slots"] == LAYERS * EXPERTS
        with pytest.raises(BudgetError):
            offloader.resize("1%")
        assert offloader.stats()["num_slots"] == LAYERS * EXPERTS
        handle = offloader.handle(0)
        with (
            handle.pool.pager.acquire(0, [1]),
            pytest.raises(StateError, match="a forward pass is using the slots"),
        ):
            offloader.resize("50%")
        forward(offloader, layers, 0, [1])


def test_more_slots_than_free_memory_are_refused_and_nothing_changes(page_file, monkeypatch):
    _, layers, described, pages = page_file
    config = OffloadConfig(device_budget="50%")
    total = LAYERS * EXPERTS * PageLayout.build(described[0].page).slot_stride
    monkeypatch.setattr(budgets, "available_memory_bytes", lambda: total // 2 - 1)
    with pytest.raises(BudgetError, match=r"device_budget: '50%' is .* only .* memory are free"):
        Offloader(described, pages, config)
    monkeypatch.setattr(budgets, "available_memory_bytes", lambda: total // 2)
    with Offloader(described, pages, config) as offloader:
        monkeypatch.setattr(budgets, "available_memory_bytes", lambda: total // 4)
        offloader.resize("70%")  # the old half goes first
        with pytest.raises(BudgetError, match=r"device_budget: '100%' is"):
            offloader.resize("100%")
        assert offloader.stats()["num_slots"] == 21
        forward(offloader, layers, 1, [1, 4])


def test_slots_take_memory_when_they_are_written():
    def resident_bytes() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident_bytes()
    slab = allocate_slab(1 << 12, 1 << 18)  # 1 GiB
    assert resident_bytes() - before < 64 << 20
    slab[: 256 << 20].fill_(1)
    assert resident_bytes() - before > 200 << 20
    assert not slab[-4096:].any()


def test_static_experts_are_kept(page_file):
    _, layers, described, pages = page_file
    kept = [(0, 1), (2, 5)]
    config = OffloadConfig(device_budget="20%", policy="static", static_experts=kept, fill=True)
    with Offloader(described, pages, config) as offloader:
        for layer in range(LAYERS):
            forward(offloader, layers, layer, list(range(EXPERTS)))
        offloader.reset_stats()
        forward(offloader, layers, 0, [1])
        forward(offloader, layers, 2, [5])
        assert offloader.stats()["hits"] == 2


def test_budgets_buy_slots_in_proportion_and_the_smallest_is_exact():
    small = PageLayout.build({"down_proj": ((1024,), torch.float32)})  # one 4096-byte slot each
    large = PageLayout.build({"down_proj": ((3072,), torch.float32)})
    assert plan_slots([small], [10], "50%") == [5]
    assert plan_slots([small, large], [10, 10], "50%") == [5, 5]
    assert plan_slots([small], [10], 10 * 4096) == [10]
    smallest = smallest_budget([small, large], [10, 4])
    assert all(slots >= 2 for slots in plan_slots([small, large], [10, 4], smallest))
    with pytest.raises(BudgetError, match=f"need at least {smallest} bytes"):
        plan_slots([small, large], [10, 4], smallest - 1)


def test_pages_with_padding_fit_a_budget_of_exactly_their_bytes():
    layout = PageLayout.build({"down_proj": ((1000,), torch.float32)})  # 4000 bytes in 4096
    assert plan_slots([layout], [10], 40_000) == [10]
    assert plan_slots([layout], [10], 39_999) == [9]


def test_pieces_must_cover_a_page_exactly(tmp_path):
    layer = ExpertLayer("experts", None, 1, {"down_proj": ((100,), torch.float32)})
    path = tmp_path / "f"
    path.write_bytes(bytes(1000))
    cases = {
        "gap": [(0, 200), (204, 196)],
        "overlap": [(0, 300), (200, 200)],
        "short": [(0, 200)],
        "beyond": [(0, 404)],
    }
    for case, spans in cases.items():
        pages = FilePages()
        pages.add(0, 0, [Piece("down_proj", start, str(path), 0, size) for start, size in spans])
        with pytest.raises(ValueError, match="must cover its 400 bytes once"):
            Offloader([layer], pages, OffloadConfig(device_budget="100%"))
        assert case


def test_truncated_and_missing_files_name_themselves(page_file):
    path, _, described, pages = page_file
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(PageReadError, match="is truncated: layer 0 expert 0 needs bytes"):
        Offloader(described, pages, OffloadConfig())
    path.unlink()
    with pytest.raises(PageReadError, match=f"cannot open {path}"):
        Offloader(described, pages, OffloadConfig())


def test_a_file_changed_while_running_is_an_error_and_putting_it_back_heals(page_file):
    path, layers, described, pages = page_file
    with Offloader(described, pages, OffloadConfig(device_budget="30%")) as offloader:
        forward(offloader, layers, 0, [0])
        times = os.stat(path)
        original = path.read_bytes()
        path.write_bytes(bytes(len(original)))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        with pytest.raises(PageReadError, match=r"layers\.0\.experts.*changed while in use"):
            forward(offloader, layers, 0, [0, 1])
        path.write_bytes(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        forward(offloader, layers, 0, [0, 1])
        path.unlink()
        forward(offloader, layers, 0, [5, 6])
        assert offloader.stats()["files_deleted"]


def test_errors_of_a_converter_reach_the_caller(page_file):
    _, layers, described, _ = page_file

    def make(layer: int, expert: int):
        if expert == 3:
            raise RuntimeError("no such scale")
        tensors = {name: tensor[expert] for name, tensor in layers[layer].items()}
        if expert == 4:
            tensors["down_proj"] = tensors["down_proj"].double()
        return tensors

    with Offloader(described, CallbackPages(make), OffloadConfig(device_budget="30%")) as offloader:
        forward(offloader, layers, 1, [0, 1, 2])
        with pytest.raises(
            PageReadError, match=r"layer 1 .* expert 3: RuntimeError: no such scale$"
        ):
            forward(offloader, layers, 1, [3])
        with pytest.raises(PageReadError, match=r"must be torch\.float32"):
            forward(offloader, layers, 1, [4])
        forward(offloader, layers, 1, [5, 6, 7])


def test_use_after_close_and_restore_without_a_model(page_file):
    _, layers, described, pages = page_file
    offloader = Offloader(described, pages, OffloadConfig())
    with pytest.raises(StateError, match="not attached to a model"):
        offloader.restore()
    offloader.close()
    offloader.close()
    for call in (
        offloader.stats,
        offloader.reset_stats,
        offloader.restore,
        lambda: offloader.resize("50%"),
        lambda: offloader.timeline("x"),
        lambda: offloader.prefetch(0, [1]),
    ):
        with pytest.raises(StateError, match="restored or closed"):
            call()
    with pytest.raises(StateError, match="after close"):
        forward(offloader, layers, 0, [1])
    assert "closed" in repr(offloader)


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_threads_end_with_the_offloader(page_file, engine):
    _, _, described, pages = page_file

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    gc.collect()  # offloaders of earlier tests
    before = threads()
    config = OffloadConfig(io_engine=engine, io_threads=5)
    offloader = Offloader(described, pages, config)
    workers = threads() - before
    assert len(workers) == 5 or offloader.stats()["io_engine"] == "io_uring"
    assert workers
    del offloader
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() & workers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads() & workers


def test_a_forked_child_gets_an_error_and_can_exit(page_file):
    _, layers, described, pages = page_file
    with Offloader(described, pages, OffloadConfig(device_budget="30%")) as offloader:
        forward(offloader, layers, 0, [0])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                forward(offloader, layers, 0, [0])
            except StateError as error:
                code = 0 if "forked child" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        forward(offloader, layers, 0, [0, 1])


def test_the_interpreter_exits_while_copies_are_under_way(tmp_path):
    script = """
import torch
from moe_offload.config import OffloadConfig
from moe_offload.expert_layer import ExpertLayer
from moe_offload.offloader import Offloader
from moe_offload.sources import CallbackPages
import time
def make(layer, expert):
    time.sleep(0.05)
    return {"down_proj": torch.zeros(8)}
layer = ExpertLayer("experts", None, 64, {"down_proj": ((8,), torch.float32)})
offloader = Offloader([layer], CallbackPages(make), OffloadConfig(device_budget="50%"))
offloader.prefetch(0, list(range(20)))
print("leaving")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def test_two_threads_can_resize_and_run_without_wrong_bytes(page_file):
    _, layers, described, pages = page_file
    stop = threading.Event()
    messages: list[str] = []
    with Offloader(described, pages, OffloadConfig(device_budget="30%")) as offloader:
        refused = []

        def resize() -> None:
            while not stop.is_set():
                for budget in ("60%", "30%"):
                    try:
                        offloader.resize(budget)
                    except StateError:
                        refused.append(1)

        thread = threading.Thread(target=resize)
        thread.start()
        for step in range(60):
            # a resize between acquire and use is refused; one before acquire is a clear error
            try:
                forward(offloader, layers, step % LAYERS, [step % 10, (step + 1) % 10])
            except StateError as error:
                messages.append(str(error))
        stop.set()
        thread.join()
    assert all("close" in message for message in messages)


def test_core_says_what_it_is():
    info = _core.build_info()
    assert int(info["cplusplus"]) >= 202002
    assert _core.MIN_SLOTS == 2


def test_routing_helper_is_distinct_per_token():
    ids, _ = random_routing(50, 8, 4, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in ids.tolist())
