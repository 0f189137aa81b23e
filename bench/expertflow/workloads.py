"""The study's prompts: ExpertFlow's four tasks, in the packaged model's own formats.

Alpaca (chat), WMT16 newstest2016 (translation), SciTLDR (summaries; it stands in for XSUM, whose
articles may not be passed on) and AIME 2024 (competition maths). The texts are read from a folder
that users do not have, so a missing one is an error that says where it comes from. A user's own
XSUM file, JSON lines with the article in "document" (or in "text", or as the prompt of
FMInference's file in "article"), takes the place of SciTLDR by `xsum`.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKLOADS = ("alpaca", "wmt16", "scitldr", "aime2024")
MAX_WORDS = 60  # of a text put into a prompt: the packaged model has 1024 positions

_FILES = {
    "alpaca": "alpaca/alpaca_eval_5000.jsonl.gz",
    "wmt16": "wmt16/newstest2016.de-en.jsonl.gz",
    "scitldr": "summarisation_scitldr/scitldr_a_test.jsonl.gz",
    "aime2024": "aime2024/aime2024.jsonl",
}


def prompts(name: str, count: int, data: Path, xsum: Path | None = None) -> list[str]:
    """The first `count` prompts of a workload, repeated from the start where it has fewer.

    Args:
        name: one of WORKLOADS, "xsum", or "mixed" (the four in turn).
        data: folder with the texts (shared/data of this project's workplace).
        xsum: a user's own XSUM file, for "xsum".

    Raises:
        FileNotFoundError: the texts are not there.
        ValueError: unknown workload, or a file without the field it should have.
    """
    if name == "mixed":
        each = [prompts(task, -(-count // len(WORKLOADS)), data) for task in WORKLOADS]
        return [prompt for row in zip(*each, strict=True) for prompt in row][:count]
    if name == "xsum":
        if xsum is None:
            raise ValueError("xsum: give the path of your own XSUM file, JSON lines")
        rows = _read(xsum)
    elif name in _FILES:
        rows = _read(data / _FILES[name])
    else:
        raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}, mixed or xsum: {name}")
    found = [_format(name, row) for row in itertools.islice(rows, count)]
    if not found:
        raise ValueError(f"workload {name}: its file has no rows")
    return list(itertools.islice(itertools.cycle(found), count))


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. bench/expertflow/README.md lists the public texts the study "
            "reads; it never downloads anything."
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _format(name: str, row: dict[str, Any]) -> str:
    if name == "alpaca":
        return f"<|user|>{_cut(row['instruction'] + ' ' + row['input'])}<|assistant|>"
    if name == "wmt16":  # the packaged model translates from English
        return f"English: {_cut(row['en'])}\nGerman:"
    if name == "aime2024":
        return f"<|user|>{_cut(row['problem'])}<|assistant|>"
    text = next((row[key] for key in ("document", "article", "text") if key in row), None)
    if text is None:
        raise ValueError(f"{name}: expected a field document, article or text, got {sorted(row)}")
    return _cut(text) + "\n\nIn short:"


def _cut(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])
