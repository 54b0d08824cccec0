"""One way to run a model of any format: whole passes, steps with a cache, greedy decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .programs import CACHE, DecoderStep, Inputs, KeysAndValues, WholePass, takes_positions

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Runner:
    """An exported model.

    Attributes:
        compute: named inputs (a decoder's with its cache) to named outputs and the longer cache.
        start: the cache of a batch of so many rows before the first token; None for none at all.
        positions: whether it wants `position_ids`.
    """

    compute: Callable[[Inputs], tuple[Outputs, KeysAndValues]]
    start: Callable[[int], KeysAndValues | None]
    positions: bool = False


def runner_of_module(module: nn.Module, kind: str, start: Any, positions: bool) -> Runner:
    """Of a `DecoderStep`, a `WholePass`, or the module of a program traced from one."""

    def compute(inputs: Inputs) -> tuple[Outputs, KeysAndValues]:
        with torch.no_grad():
            result = module(**inputs)
        return ({"logits": result[0]}, result[1]) if kind == "decoder" else (result, [])

    return Runner(compute, start, positions)


def runner_of_model(model: PreTrainedModel, kind: str) -> Runner:
    """Of a model in this process."""
    module = DecoderStep(model) if kind == "decoder" else WholePass(model)
    return runner_of_module(module, kind, lambda rows: None, takes_positions(model))


def stepwise_logits(runner: Runner, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Logits `[B, T, vocabulary]` of ids `[B, T]`: all but the last `steps` tokens at once, those
    one by one, each with the cache that the ones before it left."""
    prefill = ids.shape[1] - steps
    logits, cache = _advance(runner, ids[:, :prefill], mask[:, :prefill], _start(runner, ids))
    found = [logits]
    for i in range(prefill, ids.shape[1]):
        logits, cache = _advance(runner, ids[:, i : i + 1], mask[:, : i + 1], cache)
        found.append(logits)
    return torch.cat(found, 1)


def greedy(runner: Runner, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """The likeliest `tokens` tokens after each row, `[B, tokens]`, step by step."""
    found: list[Tensor] = []
    new, cache = ids, _start(runner, ids)
    for _ in range(tokens):
        logits, cache = _advance(runner, new, mask, cache)
        new = logits[:, -1].argmax(-1, keepdim=True)
        found.append(new)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    return torch.cat(found, 1)


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """What `generate` of transformers makes of it, `[B, tokens]`, greedy and without an end."""
    # Replaced, not passed: what a passed one leaves open is filled from the model's own.
    model.generation_config = GenerationConfig(pad_token_id=0)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def position_ids(mask: Tensor) -> Tensor:
    """Positions `[B, T]` of real tokens, counted from the first one, as `generate` counts."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _start(runner: Runner, ids: Tensor) -> KeysAndValues | None:
    return runner.start(ids.shape[0])


def _advance(
    runner: Runner, ids: Tensor, mask: Tensor, cache: KeysAndValues | None
) -> tuple[Tensor, KeysAndValues]:
    inputs: Inputs = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
    if runner.positions:
        inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
    outputs, cache = runner.compute(inputs)
    return outputs["logits"], cache
