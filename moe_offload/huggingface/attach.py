"""Put a pager behind the experts modules of a transformers model, and take it away again.

The experts modules stay where they are: their class is swapped for a generated subclass of the
same name whose forward pages, their parameters leave, and meta tensors of the same shape stay as
plain attributes, so `.to()`, `state_dict()`, `repr` and `generate` see a normal model. Nothing
outside the model is patched. `restore()` undoes each step with the very same Parameter objects.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.config import OffloadConfig, format_bytes
from moe_offload.dense import use_dense_kernels
from moe_offload.errors import DeviceError, PredictorError, StateError, UnsupportedModelError
from moe_offload.expert_layer import ExpertLayer
from moe_offload.huggingface.adapters import experts_module, find_expert_layers
from moe_offload.huggingface.llama4 import unteach
from moe_offload.layer import run_experts
from moe_offload.offloader import Offloader
from moe_offload.predictors import make_predictor
from moe_offload.sources import CallbackPages, FilePages, TensorPages

_RESTORE = "moe_offload.get_offloader(model).restore()"


def offload(model: nn.Module, device_budget: int | str = "25%", **options: Any) -> Offloader:
    """Page the experts of a live transformers model.

    The experts' tensors stay in host memory (they are kept, not copied) and become the source the
    slots are filled from. `offloader.restore()` puts the same Parameter objects back.

    Args:
        model: a transformers MoE model in eval mode, without gradients, its experts on the CPU.
        device_budget: what experts may occupy in slots: bytes, "6GiB" or "25%" of all experts.
        **options: further fields of OffloadConfig (policy, device, ...). With device="cuda" the
            rest of the model is moved to the GPU, and back by restore; the experts stay in host
            memory and are pinned there.

    Returns:
        The Offloader; also reachable as `moe_offload.get_offloader(model)`.

    Raises:
        UnsupportedModelError: no experts that can be paged, or a form that is refused.
        StateError: training mode, gradients, or offloaded already.
        BudgetError: malformed, or too small for one wave.
        DeviceError: no GPU that can be used, or the model without experts does not fit there.
        PredictorError: a predictor that is none, or of another model.
        TypeError, ValueError: no such option, or a value it does not take.

    Example:
        >>> offloader = moe_offload.offload(model, device_budget="25%")
        >>> model.generate(**inputs, max_new_tokens=20)
        >>> offloader.restore()
    """
    config = OffloadConfig.from_options(device_budget=device_budget, **options)
    layers = find_expert_layers(model)
    try:
        _refuse_training(model, layers)
        pages = TensorPages()
        for index, layer in enumerate(layers):
            pages.add_layer(index, {name: _host(layer, name) for name in layer.tensors})
        attachment = Attachment(model, layers)
        offloader = attachment.start(pages, config)
    except BaseException:
        unteach(model)
        raise
    try:
        attachment.move_rest()
    except BaseException:
        offloader.restore()
        raise
    return offloader


def get_offloader(model: nn.Module) -> Offloader:
    """The Offloader of a model; StateError when the model is not offloaded."""
    offloader = get_attachment(model).offloader
    assert offloader is not None
    return offloader


def find_attachment(model: Any) -> Attachment | None:
    """What was changed in a model; None when it is not offloaded."""
    return vars(model).get("_moe_offload") if isinstance(model, nn.Module) else None


def find_offloader(model: Any) -> Offloader | None:
    """The Offloader of a model; None when it is not offloaded."""
    attachment = find_attachment(model)
    return None if attachment is None else attachment.offloader


def get_attachment(model: nn.Module) -> Attachment:
    """What was changed in an offloaded model; StateError when it is not offloaded."""
    attachment = find_attachment(model)
    if attachment is None:
        raise StateError(
            f"{type(model).__name__} is not offloaded. Use moe_offload.offload(model, "
            "device_budget=...) or moe_offload.from_pretrained(...), and pass that same model."
        )
    return attachment


def _refuse_training(model: nn.Module, layers: list[ExpertLayer]) -> None:
    if model.training or any(experts_module(layer).training for layer in layers):
        raise StateError(
            f"{type(model).__name__} is in training mode; paging is for inference. "
            "Call model.eval() first."
        )
    for layer in layers:
        for name in layer.tensors:
            if getattr(experts_module(layer), name).grad is not None:
                raise StateError(
                    f"{layer.name}.{name} holds a gradient; offloaded experts cannot be trained. "
                    "Finish the training step and call model.zero_grad(set_to_none=True) first."
                )


def _host(layer: ExpertLayer, name: str) -> Tensor:
    tensor = getattr(experts_module(layer), name).detach()
    if tensor.device.type != "cpu":
        hint = (
            "The model has no weights yet; use moe_offload.from_pretrained."
            if tensor.device.type == "meta"
            else 'Call model.to("cpu") first; with device="cuda" the rest of it is moved back.'
        )
        raise UnsupportedModelError(
            f"{layer.name}.{name} must be on the CPU, got {tensor.device}. {hint}"
        )
    return tensor.contiguous()


class Attachment:
    """What was changed in one model, and the way back. Holds no strong reference to the model.

    Args:
        model: the model whose experts are to be paged.
        layers: its experts modules, holding parameters (live model) or meta placeholders.
        load_tensors: `(layer index) -> {section: Tensor[E, ...]}`; makes the parameters when the
            modules hold placeholders (checkpoint models). Called by restore().
        before_restore: called first by restore(); what it raises leaves everything as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[ExpertLayer],
        load_tensors: Callable[[int], dict[str, Tensor]] | None = None,
        before_restore: Callable[[], None] | None = None,
    ) -> None:
        self.model = weakref.ref(model)
        self.layers = layers
        self.offloader: Offloader | None = None
        self.origin: Any = None  # how from_pretrained made the model, for verify()
        self._load_tensors = load_tensors
        self._before_restore = before_restore
        self._parameters = [dict(experts_module(layer)._parameters) for layer in layers]
        self._undo: list[Callable[[], Any]] = []

    @property
    def holds_parameters(self) -> bool:
        """Do the original Parameter objects exist in memory (a live model was offloaded)?"""
        return self._load_tensors is None

    def start(self, pages: FilePages | TensorPages | CallbackPages, config: Any) -> Offloader:
        """Build the pager, then change the model; a failing pager leaves the model untouched."""
        model = self.model()
        assert model is not None
        for layer in self.layers:
            module: Any = experts_module(layer)
            _offloaded_class(module.__class__)  # refuses odd signatures before any change
        predictor = make_predictor(
            config.predictor, _folder(model), self._disk_page_bytes(pages, config)
        )
        self.offloader = Offloader(self.layers, pages, config, on_restore=self._restore)
        if predictor is not None:
            try:  # before the model changes: a predictor that does not fit leaves it as it is
                self.offloader.predict_with(model, predictor)
            except PredictorError as error:
                if config.predictor != "auto":
                    self.offloader.close()
                    raise
                warnings.warn(
                    f'nothing is fetched ahead: {error} predictor="none" avoids this message.',
                    stacklevel=2,
                )
            except BaseException:
                self.offloader.close()
                raise
        for index in range(len(self.layers)):
            self._page(index)
        self._guard_model(model)
        if config.native_dense:
            self._undo.append(use_dense_kernels(model))
        vars(model)["_moe_offload"] = self
        closer = weakref.finalize(model, self.offloader.close)  # a dead model leaves no threads
        self._undo.append(closer.detach)
        return self.offloader

    def _disk_page_bytes(self, pages: Any, config: Any) -> int:
        """Bytes of the largest page, 0 where the CPU does not read pages from files."""
        if not isinstance(pages, FilePages) or torch.device(config.device).type != "cpu":
            return 0
        return max(layer.page_bytes for layer in self.layers)

    def move_rest(self) -> None:
        """Move everything but the experts to the device they are computed on; restore moves back.

        Raises:
            DeviceError: it does not fit there. What was moved is moved back.
        """
        model, offloader = self.model(), self.offloader
        assert model is not None
        assert offloader is not None
        device = offloader.device.torch_device
        tensors = [*model.parameters(), *model.buffers()]
        if device.type == "cpu" or all(tensor.device == device for tensor in tensors):
            return
        self._undo.append(functools.partial(_move, self.model, torch.device("cpu")))
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{type(model).__name__} without its experts does not fit on {device} beside "
                f"{format_bytes(offloader.device_budget_bytes)} of slots. Lower device_budget."
            ) from error

    def _page(self, index: int) -> None:
        """Swap the class of one experts module and leave placeholders for its parameters."""
        layer = self.layers[index]
        module: Any = experts_module(layer)
        for name in list(module._parameters):
            del module._parameters[name]
        for name, (shape, dtype) in layer.tensors.items():
            placeholder = torch.empty((layer.num_experts, *shape), dtype=dtype, device="meta")
            object.__setattr__(module, name, placeholder)
        assert self.offloader is not None
        object.__setattr__(module, "_moe_offload_handle", self.offloader.handle(index))
        module.__class__ = _offloaded_class(module.__class__)

    def _unpage(self, index: int, parameters: dict[str, nn.Parameter | None]) -> None:
        layer = self.layers[index]
        module = experts_module(layer)
        module.__class__ = vars(type(module))["_moe_offload_original"]
        for name in ("_moe_offload_handle", *layer.tensors):
            vars(module).pop(name, None)
        module._parameters.update(parameters)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Run the model on its own parameters for a while (live models only; used by verify)."""
        assert self.holds_parameters
        assert self.offloader is not None
        driver = self.offloader.predicting
        if driver is not None:
            driver.paused = True
        for index, parameters in enumerate(self._parameters):
            self._unpage(index, parameters)
        try:
            yield
        finally:
            for index in range(len(self.layers)):
                self._page(index)
            if driver is not None:
                driver.paused = False

    def _restore(self) -> None:
        """Offloader.restore() calls this; any error leaves the model offloaded and working."""
        model = self.model()
        if model is None:
            raise StateError("the model of this offloader no longer exists; nothing to restore")
        if self._before_restore is not None:
            self._before_restore()
        parameters = self._parameters
        if self._load_tensors is not None:
            parameters = [
                {name: nn.Parameter(tensor) for name, tensor in self._load_tensors(index).items()}
                for index in range(len(self.layers))
            ]
        for index, layer_parameters in enumerate(parameters):
            self._unpage(index, layer_parameters)
        for undo in self._undo:
            undo()
        unteach(model)
        del vars(model)["_moe_offload"]

    def _guard_model(self, model: nn.Module) -> None:
        """Refuse what would silently lose or mix experts; everything here is undone by restore."""
        layer_names = [layer.name for layer in self.layers]
        for name, module in model.named_modules():
            holds_experts = any(not name or layer.startswith(f"{name}.") for layer in layer_names)
            for method in ("save_pretrained", "push_to_hub"):
                if holds_experts and hasattr(module, method):
                    self._shadow(module, method, _refuse_save)
        dtypes = {dtype for layer in self.layers for _, dtype in layer.tensors.values()}
        self._shadow(model, "_apply", _guarded_apply(self.model, dtypes))
        assert self.offloader is not None
        hook = functools.partial(_announce_sequences, self.offloader)
        self._undo.append(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        limit = _context_length(model)
        if limit is not None:
            hook = functools.partial(_check_length, limit)
            self._undo.append(model.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _shadow(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        attributes, missing = vars(module), object()
        before = attributes.get(name, missing)
        attributes[name] = function

        def undo() -> None:
            if before is missing:
                del attributes[name]
            else:
                attributes[name] = before

        self._undo.append(undo)

    def __reduce__(self) -> Any:
        raise _no_copies()


def _move(reference: weakref.ref[nn.Module], device: torch.device) -> None:
    if (model := reference()) is not None:
        model.to(device)


def _refuse_save(*args: Any, **kwargs: Any) -> None:
    raise StateError(
        "save_pretrained and push_to_hub would write a checkpoint without its experts: they are "
        f"offloaded. Call {_RESTORE} first, then save."
    )


def _folder(model: nn.Module) -> str:
    """Where the model was loaded from, as far as it knows."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _no_copies() -> StateError:
    return StateError(
        "an offloaded model cannot be copied or pickled: its experts live in a pager. Call "
        f"{_RESTORE} first, or load a second model."
    )


def _guarded_apply(reference: weakref.ref[nn.Module], dtypes: set[torch.dtype]) -> Callable:
    """Stand-in for `Module._apply`, which `.to(dtype)`, `.half()`, `.bfloat16()` end in."""

    def _apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        model = reference()
        assert model is not None
        for dtype in dtypes:
            if fn(torch.empty(0, dtype=dtype)).dtype != dtype:
                raise StateError(
                    f"changing the dtype of an offloaded model would leave its experts in {dtype}. "
                    f"Call {_RESTORE} first, or load with from_pretrained(..., dtype=...)."
                )
        return type(model)._apply(model, fn, recurse)

    return _apply


def _context_length(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _announce_sequences(
    offloader: Offloader, model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    """A call on an empty cache begins new sequences, which some policies start counting anew at."""
    cache = kwargs.get("past_key_values")
    if (cache is None or cache.get_seq_length() == 0) and not offloader.closed:
        for pool in offloader.pools:
            pool.pager.begin_sequence()


def _check_length(limit: int, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a prompt the model has no positions for; costs nothing on single-token steps.

    Single tokens generated past the limit are left to transformers, which warns about them.
    """
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[1] == 1:
        return
    cache = kwargs.get("past_key_values")
    length = tokens.shape[1] + (int(cache.get_seq_length()) if cache is not None else 0)
    if length <= limit:
        return
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and int(positions.max()) < limit:
        return  # mostly padding: no token stands beyond the limit
    raise ValueError(
        f"{type(model).__name__}: a prompt of {length} tokens exceeds the model's context of "
        f"{limit} (max_position_embeddings). Shorten the prompt, or truncate it in the tokenizer "
        f"with truncation=True, max_length={limit}."
    )


@functools.cache
def _offloaded_class(cls: Any) -> Any:
    """The paging twin of an experts class: same name, module and repr, another forward."""
    parameters = list(inspect.signature(cls.forward).parameters)[1:]
    if len(parameters) != 3:
        raise UnsupportedModelError(
            f"{cls.__name__}.forward takes {parameters}; expected three arguments (hidden states, "
            "expert ids, expert weights). This family is not supported yet."
        )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 3:  # gpt-oss names its arguments differently; bind by its names
            args = _bind(parameters, args, kwargs)
        return run_experts(self._moe_offload_handle, self, *args)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        raise _no_copies()

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_moe_offload_original": cls,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
    }
    return type(cls.__name__, (cls,), body)


def _bind(names: list[str], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(given) != set(names) or len(args) + len(kwargs) != 3:
        raise TypeError(
            f"experts: expected the arguments {', '.join(names)}, got {len(args)} by position and "
            f"{sorted(kwargs)} by name"
        )
    return tuple(given[name] for name in names)
