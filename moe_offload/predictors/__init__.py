"""Predictors: which experts will be needed next. They only ever start copies early.

| name | what it looks at |
| --- | --- |
| `previous` | what the previous token used |
| `recall` | what followed the most similar passes of the past |
| `lookahead-0` | a layer's own router on the layer's input, before its attention |
| `lookahead`, `lookahead-2`, `lookahead-3` | the next layers' own routers on the present state |
| `ring` | nothing: every expert of the layers that come next (SE-MoE) |
| folder of a trained `preattention` | the layer's input, before its attention |
| folder of a trained `pregate` | what a layer's router sees; for the next layer (Pre-gated MoE) |
| folder of a trained `rpp` | the token sequence (ExpertFlow's Routing Path Predictor) |
| `Oracle` | a recording of the same run: the bound |

`base.Predictor` is what to derive from, `driver.PrefetchDriver` turns what they say into copies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.errors import PredictorError

if TYPE_CHECKING:
    from moe_offload.predictors.base import Predictor

_NAMES = (
    "none",
    "auto",
    "previous",
    "recall",
    "lookahead-0",
    "lookahead",
    "lookahead-2",
    "lookahead-3",
    "ring",
)
# Trained ones that are looked for beside a model, in its folder's predictors/<name>.
_TRAINED = ("rpp", "preattention", "pregate")
# Pre-gates that decide what is executed: changes tokens, so never by a path or by default.
_LOSSY = "lossy_pregated"
# What "auto" means for pages on disk of at least so many bytes, "none" for others: it pays at
# 12 MiB and does not at 96 KiB (docs/predictors.md); between them nothing was measured.
AUTO, AUTO_PAGE_BYTES = "lookahead-0", 4 << 20


def check_predictor(spec: Any) -> None:
    """Refuse what `make_predictor` cannot make, before any work.

    Raises:
        PredictorError: neither a name, nor an existing path, nor a predictor.
    """
    if isinstance(spec, str | os.PathLike):
        if spec in (*_NAMES, *_TRAINED, _LOSSY) or Path(spec).exists():
            return
    elif callable(getattr(spec, "bind", None)) and callable(getattr(spec, "layer_routed", None)):
        return
    raise PredictorError(
        f"predictor: expected one of {', '.join((*_NAMES, *_TRAINED))}, the folder of a trained "
        f"predictor, or a moe_offload.predictors.base.Predictor, got {spec!r}"
    )


def make_predictor(spec: Any, model_folder: str = "", disk_page_bytes: int = 0) -> Predictor | None:
    """The predictor that `OffloadConfig.predictor` names; None for "none".

    Args:
        spec: see `check_predictor`.
        model_folder: where the model's own trained predictors are looked for.
        disk_page_bytes: of the largest page on disk, which decides what "auto" is.

    Raises:
        PredictorError: see `check_predictor`; or the path holds no trained predictor.
    """
    check_predictor(spec)
    if not isinstance(spec, str | os.PathLike):
        made: Predictor = spec
        return made
    name = spec
    if spec == "auto":
        name = AUTO if disk_page_bytes >= AUTO_PAGE_BYTES else "none"
    if name == "none":
        return None
    if name == "previous":
        from moe_offload.predictors.previous import PreviousToken

        return PreviousToken()
    if name == "recall":
        from moe_offload.predictors.recall import Recall

        return Recall()
    if name == "ring":
        from moe_offload.predictors.ring import LayerRing

        return LayerRing()
    if name in _NAMES:
        from moe_offload.predictors.lookahead import GateLookahead, OwnLookahead

        if name == "lookahead-0":
            return OwnLookahead()
        return GateLookahead(depth=int(str(name).partition("-")[2] or 1))
    if name == _LOSSY:
        return _lossy(Path(model_folder, "predictors"))
    from moe_offload.predictors.artefact import load_predictor

    if name in _TRAINED and not Path(name).exists():
        folder = Path(model_folder, "predictors", name)
        if not folder.is_dir():
            raise PredictorError(
                f"predictor {name!r}: none was trained for this model, there is no folder "
                f"{folder}. Train one with `moe-offload train-predictor {name}` and pass its "
                "folder, or put it there."
            )
        return load_predictor(folder)
    return load_predictor(Path(name))


def _lossy(folder: Path) -> Predictor:
    """Gates fine-tuned to be executed where there are such, else those trained to predict."""
    from moe_offload.predictors.lossy_pregated import LossyPregated
    from moe_offload.predictors.pregate import PreGate

    gates = next((folder / n for n in (_LOSSY, "pregate") if (folder / n).is_dir()), None)
    if gates is None:
        raise PredictorError(
            f"predictor {_LOSSY!r}: this model has no pre-gates, there is no folder "
            f"{folder / 'pregate'}. Train some with `moe-offload train-predictor pregate` and put "
            "them there."
        )
    found = make_predictor(str(gates))
    assert isinstance(found, PreGate)
    return LossyPregated(found.gates, str(gates))
