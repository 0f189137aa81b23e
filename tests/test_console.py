"""What commands write to a terminal."""

from __future__ import annotations

import sys

import pytest

from moe_offload.console import aligned, progress


def test_names_start_and_numbers_end_in_their_column() -> None:
    rows = [["policy", "hits"], ["lru", "7"], ["lru-per-layer", "12345"]]
    assert aligned(rows) == [
        "policy          hits",
        "lru                7",
        "lru-per-layer  12345",
    ]
    assert aligned(rows, left=(0, 1))[1] == "lru            7"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        aligned([["a", "b"], ["c"]])


def test_bars_show_only_to_a_person(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress(range(3), desc="Replay")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress(range(3), desc="Replay")) == [0, 1, 2]
    assert "Replay" in capsys.readouterr().err
