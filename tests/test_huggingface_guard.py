"""An unsupported or absent transformers is one clear error at import, not a crash in a load."""

from __future__ import annotations

import sys

import pytest

from moe_offload import huggingface


def test_installed_transformers_has_every_name_relied_on() -> None:
    assert huggingface.missing_names() == []


def test_a_vanished_name_is_reported_with_version_and_supported_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = {"transformers.core_model_loading": ["rename_source_key", "gone.away"]}
    monkeypatch.setattr(huggingface, "_NEEDED", needed)
    with pytest.raises(ImportError, match=r"needs transformers >= 5\.17.*gone\.away.*pip install"):
        huggingface._check_transformers()


def test_missing_transformers_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"not installed.*moe-offload\[hf\]"):
        huggingface._check_transformers()
