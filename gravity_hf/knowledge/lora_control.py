"""Plain fine-tuning with a LoRA, to compare deltas with: the same maps, numbers and texts.

What it lacks is what deltas add to it: one update for each fact, a loss on the answers alone, and
prompts that must not change.
"""

from __future__ import annotations

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
) -> LowRankDelta:
    """One update of the maps of `config`, trained on the texts of all facts together.

    The loss is that of next tokens over whole texts, the optimiser Adam with the steps and the
    learning rate of `config`. The base stays as it is.

    Args:
        facts: at least one; those of their prompts are used that `config` would train on.
        rank: `config.rank` times the number of facts if not given, so that it has as many
            parameters as one delta for each fact; at most what the maps can have.
        seed: of the first factors; that of `config` if not given.

    Raises:
        ValidationError: no facts, or an answer that the tokenizer cannot write.
    """
    config = config or EncodingConfig()
    if not facts:
        raise ValidationError("lora_control: expected at least one fact, got none")
    device = execution_device(model) or torch.device("cpu")
    texts = Texts(*(x.to(device) for x in _texts(tokenizer, facts, config)))
    names = target_modules(model, config.layers, config.targets)
    rank = config.rank * len(facts) if rank is None else rank
    factors = _initial(model, names, rank, config.seed if seed is None else seed)
    bank = DeltaBank(model, trainable=True)
    bank.add(_ONLY, LowRankDelta(factors))
    parameters = [x for pair in factors.values() for x in pair]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    with in_evaluation(model), torch.inference_mode(False), torch.enable_grad():
        for _ in range(config.steps):
            with bank.routed([[_ONLY]]):
                logits = model(input_ids=texts.ids, attention_mask=texts.mask).logits
            # Of these tensors only: the base may have gradients of its own, which stay.
            gradients = torch.autograd.grad(_loss(logits, texts), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return LowRankDelta(
        {name: (A.detach().cpu(), B.detach().cpu()) for name, (A, B) in factors.items()}
    )


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
