"""Figures of a replay: hit rate and bytes over capacity, misses per layer; PNG and one HTML page.

matplotlib is an optional extra (`pip install "moe-offload[plots]"`). The HTML page embeds its
figures, so it can be mailed or archived and needs no network.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.replay import Batch, ReplayResult
from moe_offload.traces import Trace

# Belady's lines are drawn in black: the bound, not a contender.
_BOUNDS = {"belady": ":", "belady-bypass": "--"}


def write_report(
    trace: Trace, results: Sequence[ReplayResult], folder: str | Path, page_bytes: float = 0.0
) -> Path:
    """Write hit_rate.png, copies.png, layers.png and report.html into a folder.

    Args:
        trace: for the title.
        results: of `replay_grid`; curves need several caps.
        folder: made if missing.
        page_bytes: bytes of one expert; 0 leaves the traffic in pages.

    Returns:
        Path of report.html.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no results.
    """
    if not results:
        raise ValueError("write_report: expected at least one replayed row, got none")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "hit_rate": hit_rate_figure(results),
        "copies": copies_figure(results, page_bytes),
        "layers": layers_figure(results),
    }
    images = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        images[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(buffer.getvalue())
    path = folder / "report.html"
    path.write_text(_page(trace, results, images), encoding="utf-8")
    return path


def hit_rate_figure(results: Sequence[ReplayResult]) -> Any:
    """Hit rate against capacity, one panel per batch, one line per policy, Belady in black."""
    return _curves(results, "hit rate, %", lambda result: 100 * result.hit_rate)


def copies_figure(results: Sequence[ReplayResult], page_bytes: float = 0.0) -> Any:
    """Traffic per token against capacity: pages, or MiB when the page size is given."""
    if page_bytes > 0:
        scale, label = page_bytes / 2**20, "MiB moved per token"
    else:
        scale, label = 1.0, "pages moved per token"
    return _curves(results, label, lambda result: result.copies_per_token * scale, zero=True)


def layers_figure(results: Sequence[ReplayResult]) -> Any:
    """Hit rate per layer (columns) and policy (rows), at the middle cap and the first batch."""
    batch = results[0].batch
    caps = sorted({result.cap for result in results})
    cap = caps[len(caps) // 2]
    chosen = [result for result in results if (result.batch, result.cap) == (batch, cap)]
    rates = [
        100 * np.array(r.per_layer["hits"]) / np.maximum(1, r.per_layer["lookups"]) for r in chosen
    ]
    figure = _figure(max(5.0, 0.28 * len(rates[0]) + 2.5), 0.36 * len(chosen) + 1.6)
    axes = figure.add_subplot()
    image = axes.imshow(np.array(rates), aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axes.set_yticks(range(len(chosen)), [result.policy for result in chosen])
    axes.set_xlabel("MoE layer")
    axes.set_title(f"hit rate per layer, cap {cap:.1%}, batch {batch}")
    figure.colorbar(image, ax=axes, label="%")
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "moe-offload[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _curves(results: Sequence[ReplayResult], label: str, value: Any, zero: bool = False) -> Any:
    batches: list[Batch] = list(dict.fromkeys(result.batch for result in results))
    policies = list(dict.fromkeys(result.policy for result in results))
    figure = _figure(4.2 * len(batches) + 1.8, 4.0)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    contenders = [policy for policy in policies if policy not in _BOUNDS]
    markers = "osD^vP*Xhp"
    for axes, batch in zip(panels, batches, strict=True):
        for policy in policies:
            points = sorted(
                (100 * r.cap, value(r)) for r in results if (r.policy, r.batch) == (policy, batch)
            )
            style: dict[str, Any] = {"color": "black", "linestyle": _BOUNDS.get(policy, "-")}
            if policy in contenders:
                index = contenders.index(policy)
                style = {"color": f"C{index % 10}", "marker": markers[index % len(markers)]}
            axes.plot(*zip(*points, strict=True), label=policy, markersize=4, **style)
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("slots, % of all experts")
        axes.grid(alpha=0.3)
        if zero:
            axes.set_ylim(bottom=0)
    panels[0].set_ylabel(label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def _page(trace: Trace, results: Sequence[ReplayResult], images: dict[str, bytes]) -> str:
    titles = {
        "hit_rate": "Hit rate against capacity",
        "copies": "Traffic per token against capacity",
        "layers": "Hit rate per layer",
    }
    name = html.escape(trace.model or "routing trace")
    sections = "".join(
        f"<h2>{titles[key]}</h2><img alt='{titles[key]}' "
        f"src='data:image/png;base64,{base64.b64encode(image).decode()}'>"
        for key, image in images.items()
    )
    rows = [result.row() for result in results]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>Replay of {name}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Replay of {name}</h1>"
        f"<p>{len(trace)} rows, {trace.num_sequences} sequences, {trace.num_layers} MoE layers of "
        f"{max(trace.num_experts)} experts, {trace.top_k} per token. A step is one model call; "
        "hits count distinct experts per layer and step. Black lines are Belady's bounds: dotted "
        "without bypass, dashed with.</p>"
        f"{sections}<h2>All rows</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></body></html>"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:13px}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)
