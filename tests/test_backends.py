"""The backend seam: who computes a layer, who says so, and what a refusal looks like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts import random_routing, random_weights

from moe_offload import OffloadedExperts, backends, doctor
from moe_offload.backends.grouped_mm import GroupedMM
from moe_offload.errors import UnsupportedModelError


class Refusing(GroupedMM):
    """A backend that computes nothing, to see how that is reported."""

    name = "refusing"

    def supports(self, module: Any, layout: Any) -> str | None:
        return "it refuses every layer"


class Absent(GroupedMM):
    name = "absent"

    def missing(self) -> str | None:
        return "no such hardware"


def test_stats_and_doctor_say_who_computes_and_why() -> None:
    module = OffloadedExperts(random_weights(4, 32, 16), device_budget="50%")
    stats = module.offloader.stats()
    assert stats["expert_backend"] in backends.NAMES
    assert stats["per_layer"][0]["expert_backend"] == stats["expert_backend"]
    report = doctor.examine()
    assert set(report["moe_offload"]["expert_backends"]) == set(backends.NAMES)
    for name in backends.NAMES:
        assert name in doctor.render(report)


def test_auto_passes_over_what_cannot_compute_and_reports_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "_KNOWN", (Absent(), Refusing(), GroupedMM()))
    weights = random_weights(4, 32, 16)
    module = OffloadedExperts(weights, device_budget="50%")
    (row,) = module.offloader.stats()["per_layer"]
    assert row["expert_backend"] == "grouped_mm"
    assert row["passed_over"] == "absent: no such hardware; refusing: it refuses every layer"
    generator = torch.Generator().manual_seed(0)
    ids, topk = random_routing(3, 4, 2, generator)
    assert module(torch.randn(3, 32), ids, topk).isfinite().all()
    assert backends.describe()["absent"] == "no such hardware"
    assert "absent (not here: no such hardware)" in doctor._backends_text(backends.describe())


def test_a_backend_asked_for_by_name_is_not_replaced(monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "_KNOWN", (Refusing(), GroupedMM()))
    form = OffloadedExperts(random_weights(4, 32, 16), device_budget="50%").offloader.layers[0]
    with pytest.raises(UnsupportedModelError, match=r"layer 3: expert_backend='refusing' cannot"):
        backends.choose("refusing", form.module, None, "layer 3")  # type: ignore[arg-type]
