"""Synthetic routing with the statistics of real models, for tests and what-if studies.

The model (after section 5 of the project's survey of published routing statistics):

    logits[t, l, e] = popularity(l, e) + tilt(request, l, e) + gain * (A_l z_t)(e) + Gumbel noise

Each layer's popularity is Zipf, in an order of its own. A request tilts it (its hot set). The
latent z_t, an AR(1) process, is what neighbouring tokens share; A_l turns slowly from layer to
layer, so the next layer is easier to predict than a far one. All three are weaker in the first
and last layers, as in real models. Token t uses the A largest logits.

No model's text is behind these rows: use real traces where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.traces import DECODE, Trace, _trace

_LATENT = 16  # dimensions of z


@dataclass(frozen=True)
class Routing:
    """Parameters of the generator.

    Attributes:
        num_layers, num_experts, top_k: L, E, A.
        zipf: exponent of the popularity in the middle layers.
        tilt: standard deviation of a request's change to the log popularity.
        gain: weight of the latent state.
        rho: share of the latent state a token inherits from the one before, 0 to 1.
        first, last: strength of all of these in the first and last layer, 1 in the middle third.
        turn: how far the latent's projection turns per layer, 0 (same for all) to 1 (independent).
    """

    num_layers: int
    num_experts: int
    top_k: int
    zipf: float = 0.7
    tilt: float = 1.0
    gain: float = 1.0
    rho: float = 0.8
    first: float = 0.5
    last: float = 1.0
    turn: float = 0.2


# Fitted by random search to published statistics; docs/traces.md shows what each meets, and which
# published numbers exclude each other. "flat" and "switch" are plausible, not fitted.
PRESETS: dict[str, Routing] = {
    "greedy": Routing(48, 128, 8, 1.06, 2.4, 2.28, 0.61, first=1.12, last=0.58),
    "teacher_forced": Routing(48, 128, 8, 0.67, 0.16, 0.16, 0.17, first=0.81, last=1.09),
    "code": Routing(48, 128, 8, 0.92, 2.27, 2.71, 0.78, first=1.0, last=1.0),
    "olmoe": Routing(16, 64, 8, 1.4, 0.0, 2.08, 0.53, first=0.47, last=1.2),
    "mixtral": Routing(32, 8, 2, 0.25, 0.86, 0.7, 0.32, first=0.03, last=0.07),
    "flat": Routing(26, 64, 6, 0.3),
    "switch": Routing(12, 32, 1),
}


def generate_trace(
    preset: str | Routing,
    num_tokens: int = 4096,
    tokens_per_sequence: int = 512,
    seed: int = 0,
    **changes: Any,
) -> Trace:
    """Draw a trace of decode steps.

    Args:
        preset: a name in PRESETS, or parameters of your own.
        num_tokens: N rows.
        tokens_per_sequence: requests of this length, one after the other.
        seed: the same seed gives the same trace.
        **changes: fields of `Routing` to change, e.g. `num_layers=8`.

    Raises:
        ValueError: unknown preset, or sizes that do not fit.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    routing = replace(PRESETS[preset] if isinstance(preset, str) else preset, **changes)
    if num_tokens < 1 or tokens_per_sequence < 1:
        raise ValueError(
            f"generate_trace: expected at least one token per sequence and in all, got "
            f"{tokens_per_sequence} and {num_tokens}"
        )
    if not 1 <= routing.top_k <= routing.num_experts:
        raise ValueError(
            f"generate_trace: expected 1 to {routing.num_experts} choices, got {routing.top_k}"
        )
    random = np.random.default_rng(seed)
    popularity = _popularity(routing, random)
    projections = _projections(routing, random)
    ids = np.empty((num_tokens, routing.num_layers, routing.top_k), np.int16)
    weights = np.empty(ids.shape, np.float16)
    for start in range(0, num_tokens, tokens_per_sequence):
        rows = slice(start, min(start + tokens_per_sequence, num_tokens))
        ids[rows], weights[rows] = _sequence(
            routing, popularity, projections, rows.stop - start, random
        )
    name = preset if isinstance(preset, str) else "custom"
    return _trace(
        ids,
        weights,
        np.arange(num_tokens) // tokens_per_sequence,
        np.full(num_tokens, -1),
        np.full(num_tokens, DECODE),
        np.arange(num_tokens),
        [routing.num_experts] * routing.num_layers,
        model=f"synthetic {name}",
    )


def _strength(routing: Routing) -> NDArray[np.float64]:
    """[L] from `first` over 1 in the middle third to `last`."""
    depth = np.linspace(0, 1, routing.num_layers)
    return np.interp(depth, [0, 1 / 3, 2 / 3, 1], [routing.first, 1, 1, routing.last])


def _popularity(routing: Routing, random: np.random.Generator) -> NDArray[np.float64]:
    """Log popularity [L, E]."""
    ranks = np.log(np.arange(1, routing.num_experts + 1))
    exponents = routing.zipf * _strength(routing)
    return np.array([random.permutation(-exponent * ranks) for exponent in exponents])


def _projections(routing: Routing, random: np.random.Generator) -> NDArray[np.float32]:
    """A_l, [L, E, latent], each row of unit length, turning from layer to layer."""
    shape = (routing.num_experts, _LATENT)
    current = random.standard_normal(shape)
    result = []
    for _ in range(routing.num_layers):
        result.append(current / np.linalg.norm(current, axis=1, keepdims=True))
        keep = np.sqrt(1 - routing.turn)
        current = keep * current + np.sqrt(routing.turn) * random.standard_normal(shape)
    return np.array(result, np.float32)


def _sequence(
    routing: Routing,
    popularity: NDArray[np.float64],
    projections: NDArray[np.float32],
    length: int,
    random: np.random.Generator,
) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
    strength = _strength(routing)
    tilt = routing.tilt * random.standard_normal(popularity.shape)
    tilted = popularity + strength[:, None] * tilt
    state = random.standard_normal(_LATENT)
    states = np.empty((length, _LATENT), np.float32)
    fresh = np.sqrt(1 - routing.rho**2)
    for token in range(length):
        states[token] = state
        state = routing.rho * state + fresh * random.standard_normal(_LATENT)
    ids = np.empty((length, routing.num_layers, routing.top_k), np.int16)
    weights = np.empty(ids.shape, np.float16)
    for layer in range(routing.num_layers):
        noise = random.gumbel(size=(length, routing.num_experts))
        shared = states @ projections[layer].T
        logits = tilted[layer] + routing.gain * strength[layer] * shared + noise
        best = np.argpartition(-logits, routing.top_k - 1, axis=1)[:, : routing.top_k]
        values = np.take_along_axis(logits, best, 1)
        order = np.argsort(-values, axis=1)
        ids[:, layer] = np.take_along_axis(best, order, 1)
        scores = np.exp(np.take_along_axis(values, order, 1))
        weights[:, layer] = scores / scores.sum(1, keepdims=True)
    return ids, weights


def overlap(trace: Trace, lag: int = 1) -> NDArray[np.float64]:
    """[L] share of a token's experts that the token `lag` earlier in its sequence used too."""
    now, before = trace.ids[lag:], trace.ids[:-lag]
    same = trace.sequence[lag:] == trace.sequence[:-lag]
    shared = (now[..., :, None] == before[..., None, :]).any(-1)[same]
    return shared.mean(axis=(0, 2))
