"""Plain fine-tuning with a LoRA, to compare deltas with: the same maps, numbers and texts, and the
learning rate that suits it best.

What it lacks is what deltas add to it: one update for each fact, a loss on the answers alone, and
prompts that must not change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integration.placement import execution_device
from ..layers.modes import in_evaluation
from .bank import DeltaBank
from .delta import LowRankDelta
from .encoding_config import EncodingConfig
from .encoding_rows import answered_prompts
from .errors import ValidationError
from .fact_tokens import answer_ids, prompt_ids
from .facts import Fact
from .targets import base_model, in_out_features, target_modules

_ONLY = "lora"
# Rates that are tried: what suits the encoder can be too much or too little for plain fine-tuning.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class LoraControl(NamedTuple):
    """The update, the rate that it was trained with, and the loss on its own texts in nats per
    token."""

    delta: LowRankDelta
    learning_rate: float
    loss: float


class Texts(NamedTuple):
    """Prompts with their answers, padded on the right: `ids` and `mask` `[n, T]`."""

    ids: Tensor
    mask: Tensor


def lora_control(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: EncodingConfig | None = None,
    *,
    rank: int | None = None,
    seed: int | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> LoraControl:
    """One update of the maps of `config`, trained on the texts of all facts together.

    The loss is that of next tokens over whole texts, the optimiser Adam with the steps of `config`.
    It is trained anew with every rate, and the one with the least loss on these texts is kept: a
    control that was badly tuned would be none. The base stays as it is.

    Args:
        facts: at least one; those of their prompts are used that `config` would train on.
        rank: `config.rank` times the number of facts if not given, so that it has as many
            parameters as one delta for each fact; at most what the maps can have.
        seed: of the first factors; that of `config` if not given.
        learning_rates: at least one.

    Raises:
        ValidationError: no facts, no rates, or an answer that the tokenizer cannot write.
    """
    config = config or EncodingConfig()
    for name, given in (("fact", facts), ("learning rate", learning_rates)):
        if not given:
            raise ValidationError(f"lora_control: expected at least one {name}, got none")
    device = execution_device(model) or torch.device("cpu")
    texts = Texts(*(x.to(device) for x in _texts(tokenizer, facts, config)))
    names = target_modules(model, config.layers, config.targets)
    rank = config.rank * len(facts) if rank is None else rank
    seed = config.seed if seed is None else seed
    found = (
        _trained(model, texts, _initial(model, names, rank, seed), config.steps, learning_rate)
        for learning_rate in learning_rates
    )
    # What is no number is not the least.
    return min(found, key=lambda one: (math.isnan(one.loss), one.loss))


def _trained(
    model: nn.Module,
    texts: Texts,
    factors: dict[str, tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
) -> LoraControl:
    bank = DeltaBank(model, trainable=True)
    bank.add(_ONLY, LowRankDelta(factors))
    parameters = [x for pair in factors.values() for x in pair]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)

    def loss() -> Tensor:
        with bank.routed([[_ONLY]]):
            logits = model(input_ids=texts.ids, attention_mask=texts.mask).logits
        return _loss(logits, texts)

    with in_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            # Of these tensors only: the base may have gradients of its own, which stay.
            gradients = torch.autograd.grad(loss(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        with torch.no_grad():
            last = float(loss())
    delta = {name: (A.detach().cpu(), B.detach().cpu()) for name, (A, B) in factors.items()}
    return LoraControl(LowRankDelta(delta), learning_rate, last)


def _loss(logits: Tensor, texts: Texts) -> Tensor:
    """Mean negative log-likelihood of the next tokens, nats."""
    labels = texts.ids.masked_fill(texts.mask == 0, -100)[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100
    )


def _texts(tokenizer: Any, facts: Sequence[Fact], config: EncodingConfig) -> Texts:
    rows = [
        [*prompt_ids(tokenizer, prompt), *answer_ids(tokenizer, prompt, fact.answer)]
        for fact in facts
        for prompt in answered_prompts(fact, config)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Texts(ids, mask)


def _initial(
    model: nn.Module, names: Sequence[str], rank: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """`A` uniform, `B` zero, as in peft's LoRA (Hu et al. 2021)."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted(names):
        module = base_model(model).get_submodule(name)
        width_in, width_out = in_out_features(module)
        own = min(rank, width_in, width_out)
        A = torch.empty(own, width_in).uniform_(-1, 1, generator=generator) * width_in**-0.5
        device = next(module.parameters()).device
        B = torch.zeros(width_out, own, device=device)
        factors[name] = (nn.Parameter(A.to(device)), nn.Parameter(B))
    return factors
