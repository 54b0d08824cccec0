"""Decoder layers run otherwise for a while: once instead of every step, or again in the backward.

Both replace `forward` of the layers' instances, for the calling thread only, and put back what was
there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bank_routing import checkpoint_contexts
from .errors import IncompatibleBaseError
from .targets import base_model, decoder_layers


class LowerLayers:
    """The layers below the first that a delta changes: they give the same at every step.

    Usage: `capture` while the model reads the whole batch, then `reused` for rows of it. The caller
    has to compare logits of both ways once, since a model may carry more between its layers than
    the hidden states.

    Args:
        names: of the maps that deltas are on.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._layers = _below(base_model(model), names)
        self._hidden: Tensor | None = None
        self._is_tuple = False

    @property
    def usable(self) -> bool:
        """Whether there is anything to reuse."""
        return self._hidden is not None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Keep what the last of the layers gives in a call inside."""
        if not self._layers:
            yield
            return
        keep = functools.partial(self._keep, threading.get_ident())
        handle = self._layers[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def forget(self) -> None:
        """Run all layers from now on."""
        self._hidden = None

    @contextmanager
    def reused(self, rows: Tensor) -> Iterator[None]:
        """Calls inside, on these rows `[n]` of the captured batch, skip the layers."""
        if self._hidden is None:
            yield
            return
        hidden = self._hidden.index_select(0, rows.to(self._hidden.device))
        output = (hidden,) if self._is_tuple else hidden
        with _replaced({layer: lambda *args, **kwargs: output for layer in self._layers}):
            yield

    def _keep(self, thread: int, module: nn.Module, args: object, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        self._is_tuple = isinstance(output, tuple)
        # What else a layer hands on (losses of experts) would be that of the whole batch.
        if self._is_tuple and len(output) != 1:
            return
        self._hidden = (output[0] if self._is_tuple else output).detach()


@contextmanager
def checkpointed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Layers inside keep only their inputs for the backward pass, and compute the rest again.

    The model's own checkpointing needs training mode, in which layers drop things out.
    """
    model = base_model(model)
    below = len(_below(model, names))
    layers = [model.get_submodule(name) for name in decoder_layers(model)[below:]]
    again = functools.partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)
    with _replaced({layer: functools.partial(again, layer.forward) for layer in layers}):
        yield


def _below(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    try:
        layers = decoder_layers(model)
    except IncompatibleBaseError:
        return []
    owners = [next((i for i, x in enumerate(layers) if _is_in(name, x)), 0) for name in names]
    return [model.get_submodule(name) for name in layers[: min(owners, default=0)]]


def _is_in(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


@contextmanager
def _replaced(calls: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules do something else when this thread calls them."""
    with ExitStack() as stack:
        for module, call in calls.items():
            stack.enter_context(_forward(module, call))
        yield


@contextmanager
def _forward(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate sets one on the instance
    usual, thread = module.forward, threading.get_ident()

    @functools.wraps(usual)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (call if threading.get_ident() == thread else usual)(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
