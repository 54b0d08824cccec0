"""Inputs with which a tiny model runs, made from its config and the signature of its forward."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from integration.sweep.input_makers import (
    UnknownInput,
    beside_text,
    extra_inputs,
    missing_inputs,
)
from integration.sweep.input_modalities import combinations
from integration.sweep.input_overrides import override_of
from integration.sweep.input_scene import Scene
from integration.sweep.input_text import Inputs, decoder_ids, text_options
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf.integration.sites import routes_through_interface

# Sets of inputs that are tried, and runs that may reach nothing new before the search ends.
_TRIALS = 100
_PATIENCE = 8
_TEXTS = 6  # kinds of text that `text_options` may yield
_EXTENDED = 2  # sets that are tried with the optional inputs too


class NoInputs(ValueError):  # noqa: N818 - it is an answer of the sweep, as `NotBuilt` is
    """No inputs were found with which the model runs; the message is the reason."""


def tiny_inputs_of(model: PreTrainedModel, seed: int = 0) -> Inputs:
    """Keyword arguments of `model`, a batch of two, that reach its routed attention modules.

    Several readings of the config are tried by running the model; of those that run, the one that
    reaches the most routed modules is taken, the first where several do.

    Raises:
        NoInputs: the model ran with none of them; the message is the first error.
    """
    wanted = sum(routes_through_interface(type(m)) for m in model.modules())
    best: tuple[int, Inputs] | None = None
    in_vain = 0
    errors: list[str] = []
    for inputs in itertools.islice(_candidates(Scene(model, seed), errors), _TRIALS):
        try:
            reached = count_reached(model, inputs)
        except Exception as error:  # whatever a host raises on what it was not made for
            errors.append(f"{type(error).__name__}: {error}")
            continue
        if best is None or reached > best[0]:
            best, in_vain = (reached, inputs), 0
        else:
            in_vain += 1
        if reached >= wanted or in_vain >= _PATIENCE:
            break
    if best is None:
        reason = errors[0] if errors else "its forward names no input that is known here"
        raise NoInputs(f"{type(model).__name__}: {reason}")
    return best[1]


def count_reached(model: nn.Module, inputs: Inputs) -> int:
    """Routed attention modules that one forward without gradients calls."""
    reached: set[int] = set()
    routed = [m for m in model.modules() if routes_through_interface(type(m))]
    hooks = [m.register_forward_pre_hook(lambda m, _: reached.add(id(m))) for m in routed]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return len(reached)


def _candidates(scene: Scene, errors: list[str]) -> Iterator[Inputs]:
    """Whole sets of inputs, the likeliest first; `errors` receives why some cannot be made."""
    override = override_of(scene)
    if override is not None:
        yield override
    towers = list(combinations(scene))
    decoder = decoder_ids(scene)
    made: list[Inputs] = []
    # Every way of feeding the towers with the likeliest text, before the less likely texts.
    for turn in range(_TEXTS):
        for inputs, spans in towers:
            text = next(itertools.islice(text_options(scene, spans), turn, None), None)
            if text is None:
                continue
            given = {**inputs, **decoder, **text}
            given |= beside_text(scene, given)
            given = {k: v for k, v in given.items() if k in scene.accepts}
            try:
                made.append({**given, **missing_inputs(scene, given)})
            except UnknownInput as error:
                errors.append(str(error))
                continue
            yield made[-1]
        for inputs in made[-len(towers) :][:_EXTENDED]:
            for extra in extra_inputs(scene, inputs):
                yield {**inputs, **extra}


def main_output(output: Any, inputs: Inputs | None = None) -> Tensor:
    """What is compared between two runs: hidden states where the output has them, else logits.

    Of a composite output, the hidden states of all its parts, flattened to `[B, N]`. With `inputs`
    the places that their `attention_mask` hides are zero: what stands there is nobody's promise.

    Raises:
        ValueError: the output has no floating tensor.
    """
    found = [_visible(t, inputs) for t in _main_tensors(output)]
    if not found:
        raise ValueError(f"expected a floating tensor in the output, got {type(output).__name__}")
    if len(found) == 1:
        return found[0]
    return torch.cat([t.flatten(1) for t in found if t.shape[0] == found[0].shape[0]], 1)


# The second: of composites whose other states are those of towers without attention.
_HIDDEN = ("last_hidden_state", "transformer_decoder_last_hidden_state")
_HEADS = ("logits", "prediction_logits", "reconstruction", "predicted_depth", "pred_masks")


def _main_tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    fields = _fields(output)
    for name in (*_HIDDEN, *_HEADS):
        if isinstance(value := fields.get(name), Tensor):
            return [value]
    parts = [v for v in fields.values() if isinstance(v, dict) and v]
    hidden = [t for part in parts for t in _main_tensors(part)]
    if hidden:
        return hidden
    floating = [t for t in floating_tensors(output) if t.dim() > 1]
    return sorted(floating, key=Tensor.numel)[-1:] or list(floating_tensors(output))[:1]


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, dict):
        return dict(output)
    if dataclasses.is_dataclass(output):
        return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return {}


def _visible(tensor: Tensor, inputs: Inputs | None) -> Tensor:
    # A score of -inf marks what a head rules out; it is no number to compare.
    tensor = tensor.masked_fill(tensor.isinf(), 0.0)
    mask = (inputs or {}).get("attention_mask")
    if mask is None or mask.dim() != 2 or tensor.dim() < 2 or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor * mask.reshape(*mask.shape, *[1] * (tensor.dim() - 2)).to(tensor.dtype)


def gradient_target(output: Any) -> Tensor:
    """A scalar for backward: the weighted sum of squares of every floating tensor with a gradient.

    The weights, between 0.5 and 1.5, differ from element to element: the plain sum of squares of a
    normalised state is a constant, whose gradient would be zero whatever came before.

    Raises:
        ValueError: no tensor of the output has a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for tensor in floating_tensors(output):
        if not tensor.requires_grad:
            continue
        finite = tensor.masked_fill(tensor.isinf(), 0.0).float()
        weights = 0.5 + torch.rand(tensor.shape, generator=generator).to(tensor.device)
        part = (weights * finite.square()).sum()
        total = part if total is None else total + part
    if total is None:
        raise ValueError(f"expected a tensor with a gradient in {type(output).__name__}, got none")
    return total


def floating_tensors(output: Any) -> Iterator[Tensor]:
    """Every floating tensor of an output once, in order; caches are left out."""
    seen: set[int] = set()
    todo = [output]
    while todo:
        value = todo.pop(0)
        if isinstance(value, Tensor):
            if value.is_floating_point() and id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, (list, tuple)):
            todo = [*value, *todo]
        else:
            todo = [*_fields(value).values(), *todo]
