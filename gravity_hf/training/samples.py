"""What a model writes after given beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .measures import evaluating


def generation_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
) -> tuple[dict[str, str], ...]:
    """What `model` writes after each prompt: dicts with `prompt` and `text`.

    Every prompt starts from `seed`, so that a sample does not depend on those before it; the random
    state of the process is left as it was. Temperature 0 always takes the likeliest token.
    """
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature}
    device = next(model.parameters()).device
    samples = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        start = inputs["input_ids"].shape[1]
        if not start:
            raise ValueError("prompts: expected prompts of at least one token, got an empty one")
        devices = [device] if device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=_padding(tokenizer),
                **how,
            )
        text = tokenizer.decode(output[0, start:], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
    return tuple(samples)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
