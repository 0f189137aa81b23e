"""Budgets and options: what is accepted, and that each refusal names the right thing."""

import pytest

from moe_offload.config import OffloadConfig, format_bytes, parse_budget
from moe_offload.errors import BudgetError


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("1KiB", 1024),
        ("1 kb", 1000),
        ("6GiB", 6 * 1024**3),
        ("0.5 MiB", 524288),
        ("25%", 250),
        (" 100 % ", 1000),
        ("0.1%", 1),
    ],
)
def test_budgets_mean_what_they_say(budget, expected):
    assert parse_budget(budget, 1000) == expected


@pytest.mark.parametrize(
    "budget",
    [0, -1, True, None, 1.5, "", "lots", "6 GiBs", "-5%", "101%", "0%", "5 %%", "GiB", "0.0001 B"],
)
def test_malformed_budgets_are_refused(budget):
    with pytest.raises(BudgetError, match="device_budget"):
        parse_budget(budget, 1000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"polcy": "lru"}, TypeError, "unknown option 'polcy'; known options: device_budget"),
        (
            {"policy": "mru"},
            ValueError,
            "policy: expected one of lru, lru-per-layer, lfu, .*, got 'mru'",
        ),
        ({"policy": "belady"}, ValueError, "policy: expected one of lru, .*, got 'belady'"),
        ({"device": "tpu"}, ValueError, 'expected "cpu", "cuda" or "cuda:N", got \'tpu\''),
        ({"expert_backend": "x"}, ValueError, "expert_backend: expected one of"),
        ({"prefetch_threshold": 0}, ValueError, "prefetch_threshold: expected a chance above 0"),
        ({"fill": "yes"}, ValueError, "fill: expected True, False"),
        ({"io_threads": 0}, ValueError, "io_threads: expected 1 to 64, got 0"),
        ({"io_depth": 257}, ValueError, "io_depth: expected 1 to 256, got 257"),
        ({"io_engine": "aio"}, ValueError, "io_engine: expected one of auto, io_uring, threads"),
        ({"chunk_bytes": 5000}, ValueError, "multiple of 4096, got 5000"),
        ({"wait_timeout_s": 0}, ValueError, "seconds > 0"),
        ({"static_experts": [(0, 1)]}, ValueError, 'needs policy="static"'),
        ({"device_budget": "2 parsecs"}, BudgetError, "'2 parsecs'"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        OffloadConfig.from_options(**options)


def test_sizes_are_written_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
    ]
