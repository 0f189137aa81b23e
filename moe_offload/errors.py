"""The exceptions users can catch.

Each also derives from the built-in class a Python programmer would expect (`ValueError` for bad
arguments, `OSError` for reads, `RuntimeError` for wrong state), so code that knows nothing of
moe_offload still handles them. A message says who, what was expected, what came, what to do.
"""


class MoEOffloadError(Exception):
    """Base class of everything moe_offload raises on purpose."""


class BudgetError(MoEOffloadError, ValueError):
    """A device budget is malformed or too small to hold one wave."""


class CheckpointError(MoEOffloadError, ValueError):
    """A checkpoint is missing, truncated, malformed or inconsistent."""


class InputError(MoEOffloadError, ValueError):
    """What the command line was given cannot be used."""


class TraceError(MoEOffloadError, ValueError):
    """A routing trace is empty, malformed, or of another model."""


class UnsupportedModelError(MoEOffloadError, ValueError):
    """The model has no experts this package can page, or is in a form it refuses."""


class PageReadError(MoEOffloadError, OSError):
    """Reading an expert's page failed; names layer, expert, file and offset."""


class StateError(MoEOffloadError, RuntimeError):
    """A call that the present state forbids: use after close, double offload, fork, training."""


class DeviceError(MoEOffloadError, RuntimeError):
    """The compute device or its driver refused: missing, too old, out of memory, a failed call."""


class PredictorError(MoEOffloadError, ValueError):
    """A predictor does not fit the model, its file is not one, or it cannot be trained."""
