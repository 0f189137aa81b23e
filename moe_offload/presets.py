"""Named systems: a policy, a predictor and a schedule that belong together.

The published ones are put together from this package's parts, on one engine, so that what differs
between two rows of a comparison is what their papers differ in. All but the one that says `lossy`
are exact: what a predictor says is only fetched early, and the model's own routing decides what is
computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a preset sets.

    Attributes:
        about: one line.
        source: the paper.
        options: fields of `OffloadConfig`.
        schedule: what `batch_generate` does unless told otherwise.
        lossy: it changes tokens.
    """

    about: str
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "fifo"
    lossy: bool = False


PRESETS: dict[str, Preset] = {
    "cache-moe": Preset(
        "the least recently used experts of each layer, misses on demand",
        "mixtral-offloading 2312.17238, as ExpertFlow's Cache-MoE",
        {"policy": "lru-per-layer", "predictor": "none"},
    ),
    "cache-moe-swap-back": Preset(
        "cache-moe that copies each evicted expert back to host memory before the next one comes",
        "mixtral-offloading 2312.17238, which swaps storages",
        {"policy": "lru-per-layer", "predictor": "none", "swap_back": True},
    ),
    "se-moe": Preset(
        "whole layers arrive in turn in a ring of slots",
        "SE-MoE 2205.10034",
        {"policy": "layer-ring", "predictor": "ring"},
    ),
    "pregated-moe": Preset(
        "a trained gate in each layer names the next layer's experts; the rest on demand",
        "Pre-gated MoE 2308.12066, its gates as predictors",
        {"policy": "lru", "predictor": "pregate"},
    ),
    "lossy_pregated": Preset(
        "CHANGES TOKENS: what the gates named is executed, whatever the routers say",
        "Pre-gated MoE 2308.12066",
        {"policy": "lru", "predictor": "lossy_pregated"},
        lossy=True,
    ),
    "expertflow": Preset(
        "routing paths predicted from the tokens, slots by predicted use, like sequences together",
        "ExpertFlow 2410.17954",
        {"policy": "predictive", "predictor": "rpp"},
        "route",
    ),
    "auto": Preset(
        "the policy that follows the best of three shadow caches; docs/policies.md",
        "",
        {"policy": "auto", "predictor": "auto"},
        "route",
    ),
}


def with_preset(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a call, with those of its `preset` filled in.

    Raises:
        ValueError: an unknown preset, or an option given twice.
    """
    name = options.get("preset")
    if name is None:
        return options
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name].options
    twice = sorted(set(preset) & set(options))
    if twice:
        raise ValueError(
            f"preset={name!r} sets {twice[0]} already ({preset[twice[0]]!r}); leave one of the "
            "two out"
        )
    return {**preset, **options}
