"""The eviction policies by name: what each does, where it comes from, what it needs.

The code is in csrc/paging/policies; the live pager and the replay of a trace use the same objects.
docs/policies.md says more and has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """One eviction policy.

    Attributes:
        rule: which resident page leaves first.
        source: where it was published; "" for textbook rules.
        needs: what it has to be given to be itself, beyond the requests.
        live: False when it needs the future, so that only a replay can use it.
    """

    rule: str
    source: str = ""
    needs: str = ""
    live: bool = True


POLICIES: dict[str, Policy] = {
    "lru": Policy("least recently used, over all layers"),
    "lru-per-layer": Policy(
        "least recently used of the same layer; equal slots per layer",
        "Cache-MoE: mixtral-offloading, arXiv 2312.17238",
    ),
    "lfu": Policy("lowest decayed count of uses, over all layers"),
    "lfu-per-layer": Policy("lowest decayed count of uses of the same layer"),
    "static": Policy(
        "a fixed set stays, the rest least recently used", "Fiddler, KTransformers", "the set"
    ),
    "least-stale": Policy("layers this pass is done with first, then LRU", "SpecMD 2602.03921"),
    "layer-ring": Policy("the layer computed longest ago", "SE-MoE's ring 2205.10034"),
    "activation-ratio": Policy(
        "lowest share of its layer's activations in this sequence, deep layers first",
        "MoE-Infinity 2401.14361",
        "sequence boundaries",
    ),
    "score": Policy(
        "lowest exponential average of router weights", "HybriMoE 2504.05897", "router weights"
    ),
    "forecast": Policy(
        "farthest expected next use, with bypass; unnamed experts by their rate of use",
        "SeqMoE 2609.12978",
        "predictions up to 8 passes ahead; without them rates of use",
    ),
    "predictive": Policy(
        "farthest expected next use, with bypass; a prediction is taken at its word",
        "ExpertFlow's PLEC 2410.17954",
        "predictions of the present pass; without them rates of use",
    ),
    "learned": Policy(
        "lowest forecast of its next use, learned from this model's own routing, with bypass",
    ),
    "auto": Policy("follows the best of learned, lru and lru-per-layer on the requests so far"),
    "belady": Policy("used farthest in the future", "Belady's MIN", "the future", live=False),
    "belady-bypass": Policy(
        "used farthest in the future, arriving pages included",
        "Belady's MIN",
        "the future",
        live=False,
    ),
}

LIVE_POLICIES: tuple[str, ...] = tuple(name for name, policy in POLICIES.items() if policy.live)
