"""The first layers of a decoder as a model of their own: same modules, nothing copied."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .errors import KnowledgeError
from .targets import decoder_layers


def hidden_state(body: Any, ids: Tensor, layer: int) -> Tensor:
    """What `layer` layers of `body` make of `ids` `[1, T]`, `[T, hidden]`: 0 are the embeddings.

    Raises:
        KnowledgeError: the model does not return its hidden states.
    """
    states = body(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    if states is None or len(states) <= layer:
        raise KnowledgeError(
            f"hidden states: expected {type(body).__name__} to return those of {layer} layers, got "
            f"{'none' if states is None else len(states) - 1}. Route with another encoder"
        )
    return states[layer][0]


class FirstLayers:
    """`body` up to a layer. It gives the bits of the whole body, or the whole body is used.

    Args:
        model: a causal LM; `body` its base model.
        layer: number of the hidden state that is wanted.
        probe: ids `[1, T]` that the two are compared on once.
    """

    def __init__(self, model: Any, layer: int, probe: Tensor) -> None:
        self._layer = layer
        self._body = getattr(model, model.base_model_prefix, model)
        # First the whole body: transformers marks the modules it watches at the first such call.
        whole = hidden_state(self._body, probe, layer)
        part = _first_layers(model, self._body, layer + 1)
        if part is not None and _same(part, probe, layer, whole):
            self._body = part

    def __call__(self, ids: Tensor) -> Tensor:
        """`[1, T]` -> `[T, hidden]`."""
        return hidden_state(self._body, ids, self._layer)


def _first_layers(model: Any, body: nn.Module, count: int) -> Any | None:
    """`body` with `count` of its layers; one more than are needed, since the last one's output is
    often returned after the final norm. None where there is nothing to leave out."""
    try:
        names = decoder_layers(model)
    except KnowledgeError:
        return None
    layers = model.get_submodule(names[0].rpartition(".")[0])
    path = next((name for name, part in body.named_modules() if part is layers), "")
    return _shortened(body, path.split("."), count) if path and count < len(names) else None


def _shortened(module: nn.Module, path: list[str], count: int) -> nn.Module:
    twin = copy.copy(module)
    # The copy shares its dictionaries with the original, which has to keep its layers.
    twin.__dict__["_modules"] = dict(module._modules)
    child: Any = module._modules[path[0]]
    inside = child[:count] if len(path) == 1 else _shortened(child, path[1:], count)
    twin._modules[path[0]] = inside
    return twin


def _same(part: Any, probe: Tensor, layer: int, whole: Tensor) -> bool:
    try:
        return torch.equal(hidden_state(part, probe, layer), whole)
    except Exception:  # whatever a model of another build raises, the whole body still works
        return False
