"""The mask function registered as `"gravity"`, and the masks it makes.

transformers makes one mask per kind and forward and hands it to every layer. Ours are the additive
masks of eager attention, the one kind that also serves modules which compute attention on their
own; but they remember what they say (`VisibleKeys`), so that the operator can skip hidden keys, and
they take no memory while nobody looks at their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.utils.import_utils import is_cuda_stream_capturing, is_tracing

from .autos import MODEL_TYPE_PREFIX
from .mask_patterns import MaskFunction
from .support import BOOLEAN_MASKS
from .visibility import MaskRequest, VisibleKeys, dense_visible_keys, read_visible_keys

_NOTE = "_gravity_note"


class _Note(NamedTuple):
    visible: VisibleKeys
    # Of the values that say so; None where it is not known: in a graph.
    version: int | None


# What may be asked of a deferred mask without its values: its properties but for these, and more.
_VALUES = ("data", "T", "H", "mT", "mH", "real", "imag")
_DESCRIPTIONS = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.element_size),
    *(Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor._is_view),
    *(Tensor.is_conj, Tensor.is_neg, Tensor._is_zerotensor, Tensor.__len__, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}


def _describes(func: Callable) -> bool:
    """Whether a call of torch's asks for no values of its tensor."""
    if getattr(func, "__name__", None) == "__get__":
        return func.__self__.__name__ not in _VALUES  # type: ignore[attr-defined]
    return func in _DESCRIPTIONS


class DeferredMask(Tensor):
    """An additive mask `[B, 1, Tq, Tk]` whose values are made when somebody uses them.

    To everyone else it is an ordinary tensor: operations get its values and give ordinary tensors.
    Its own storage is a single NaN, so that code which went around this class would be noticed.
    """

    _make: Callable[[], Tensor]
    _filled: Tensor | None
    _visible: VisibleKeys

    @staticmethod
    def of(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        make: Callable[[], Tensor],
        visible: VisibleKeys,
    ) -> DeferredMask:
        """`make` gives the values, in that shape, dtype and on that device."""
        nothing = torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=device)
        nothing.as_strided((), ()).fill_(float("nan"))
        mask = Tensor._make_subclass(DeferredMask, nothing)
        mask._make, mask._filled, mask._visible = make, None, visible
        return mask

    def filled(self) -> Tensor:
        """The mask as an ordinary tensor, made once."""
        if self._filled is None:
            self._filled = _noted(self._make(), self._visible)
        return self._filled

    def visible(self) -> VisibleKeys | None:
        """What the mask says; None where its values may have been changed since they were made."""
        if self._filled is None:
            return self._visible
        return None if torch.compiler.is_compiling() else visible_keys_of(self._filled)

    def _moved(self, *args: Any, **kwargs: Any) -> DeferredMask | None:
        """`Tensor.to`, still deferred; None where the values are needed for it."""
        visible = self.visible()
        if visible is None or kwargs.keys() - {"device", "dtype", "non_blocking"}:
            return None
        example = torch.empty((), dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (example.dtype, example.device) == (self.dtype, self.device):
            return self
        if not example.is_floating_point():
            return None
        return DeferredMask.of(
            tuple(self.shape),
            example.dtype,
            example.device,
            lambda: self.filled().to(example.device, example.dtype),
            visible.to(example.device),
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _describes(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.detach:
            return args[0]  # checkpointing detaches its inputs; masks have no gradient
        if func is Tensor.to and isinstance(args[0], DeferredMask):
            moved = args[0]._moved(*args[1:], **kwargs)
            if moved is not None:
                return moved
        return func(*_with_values(args), **_with_values(kwargs))


def gravity_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """transformers' mask signature: the additive mask of `eager_mask`, with a memory; the boolean
    one of `sdpa_mask` for hosts that can read no other.

    Waits for the device once where there is a 2-D mask, to see whether it hides anything. Inside
    `torch.compile`, `torch.export` and CUDA graph capture it does not.

    Returns:
        `[B, 1, Tq, Tk]`; None where nothing is hidden and the caller allows it.
    """
    request = MaskRequest(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        use_vmap,
        device,
    )
    skip = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    if _is_boolean(others.get("config")):
        return sdpa_mask(**request._asdict(), allow_is_causal_skip=False, **skip)
    # Hosts that have only token ids at hand name their dtype, which means nothing for scores.
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    compiling = torch.compiler.is_compiling()
    capturing = not compiling and is_cuda_stream_capturing()
    example = torch.empty((), device=device) if attention_mask is None else attention_mask
    unknown = set(others) - {"allow_is_causal_skip", "local_size", "config"}
    if unknown or not (compiling or capturing) and is_tracing(example):
        return eager_mask(**request._asdict(), **skip, **others, dtype=dtype)

    visible = read_visible_keys(request, check=not (compiling or capturing or example.is_meta))
    shown = None
    if visible is None:
        shown = request.dense()
        visible = dense_visible_keys(shown)
    if allow_is_bidirectional_skip and visible.everything:
        return None
    if compiling:  # what a graph does not use it drops
        return _noted(_additive(request, shown, dtype), visible)
    if isinstance(q_offset, Tensor):  # the cache counts on in this tensor
        request = request._replace(q_offset=q_offset.clone())
    if request.attention_mask is not None:  # its owner may edit it before the values are made
        request = request._replace(attention_mask=request.attention_mask.clone())
    make = functools.partial(_additive, request, shown, dtype)
    if q_length == 1 or batch_size == 0:
        # A single row is small, and `generate` may hand it to a compiled forward.
        return _noted(make(), visible)
    return DeferredMask.of((batch_size, 1, q_length, kv_length), dtype, device, make, visible)


def causal_mask(query: Tensor, keys: int) -> Tensor:
    """Query i of `[B, H, Tq, D]` sees keys up to i, counted from the first of both: `[1, 1, Tq,
    Tk]`, additive and deferred where the operator's flag, which counts from the last, says it."""
    queries, device = query.shape[2], query.device

    def shown() -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]

    if torch.compiler.is_compiling() or queries != keys:
        return _noted(shown(), VisibleKeys(causal=True)) if queries == keys else shown()

    def values() -> Tensor:
        # Only tensors made outside of inference mode count their changes.
        with torch.inference_mode(False):
            nothing = torch.zeros((), dtype=query.dtype, device=device)
            return torch.where(shown(), nothing, torch.finfo(query.dtype).min)

    shape = (1, 1, queries, keys)
    return DeferredMask.of(shape, query.dtype, device, values, VisibleKeys(causal=True))


def visible_keys_of(mask: Tensor | None) -> VisibleKeys | None:
    """What `gravity_mask` noted about this very mask; None for any other tensor, also for what was
    computed from one, and for a mask that was changed in place."""
    if isinstance(mask, DeferredMask):
        return mask.visible()
    note = getattr(mask, _NOTE, None)
    if note is None:
        return None
    # In a graph versions are not known; no model of transformers changes a mask in place.
    unchanged = torch.compiler.is_compiling() or note.version == mask._version  # type: ignore[union-attr]
    return note.visible if unchanged else None


def ordinary(mask: Tensor | None) -> Tensor | None:
    """The mask as a tensor that has its values."""
    return mask.filled() if isinstance(mask, DeferredMask) else mask


def _is_boolean(config: Any) -> bool:
    """Whether masks for a model part of this config must be boolean."""
    model_type = getattr(config, "model_type", None) or ""
    return model_type.removeprefix(MODEL_TYPE_PREFIX) in BOOLEAN_MASKS


def _noted(mask: Tensor, visible: VisibleKeys) -> Tensor:
    version = None if torch.compiler.is_compiling() else mask._version
    setattr(mask, _NOTE, _Note(visible, version))
    return mask


def _additive(request: MaskRequest, shown: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `eager_mask`: 0 where a key is seen, the dtype's lowest value where it is hidden."""
    if torch.compiler.is_compiling():
        return _additive_values(request, shown, dtype)
    # Only tensors made outside of inference mode count their changes.
    with torch.inference_mode(False):
        return _additive_values(request, shown, dtype)


def _additive_values(request: MaskRequest, shown: Tensor | None, dtype: torch.dtype) -> Tensor:
    shown = request.dense() if shown is None else shown
    nothing = torch.zeros((), dtype=dtype, device=shown.device)
    return torch.where(shown, nothing, torch.finfo(dtype).min)


def _with_values(value: Any) -> Any:
    """`value` with the deferred masks in it replaced, in lists, tuples and dicts too."""
    if isinstance(value, DeferredMask):
        return value.filled()
    if isinstance(value, dict):
        return {key: _with_values(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_values(item) for item in value)
    return value
