"""What a delta changes where it was not asked for: at the prompts of others, in what comes out.

Leakage by moments (`leakage`) looks at single maps; this looks at the model's next token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers.modes import in_evaluation
from .bank import DeltaBank
from .delta import LowRankDelta
from .fact_rows import prompt_row, row_batch, row_batches, scored_logits
from .facts import Fact


class OutputLeakage(NamedTuple):
    """At the prompts and paraphrases of some facts, without and with a delta that is not theirs.

    Args:
        kl: mean of `KL(without || with)` of the next token, nats. kl_max: the largest.
        kept: share of prompts with the same most likely token.
        prompts: how many there were.
    """

    kl: float
    kl_max: float
    kept: float
    prompts: int


def output_leakage(
    model: nn.Module,
    tokenizer: Any,
    delta: LowRankDelta,
    others: Sequence[Fact],
    *,
    own: LowRankDelta | None = None,
    batch_rows: int = 64,
) -> OutputLeakage:
    """What `delta` changes at the prompts of `others`.

    Args:
        others: facts that are not the delta's.
        own: the delta of `others`, which is then on both times: what is measured is how much
            `delta` disturbs its answers.

    Raises:
        ValidationError: a prompt without tokens.
    """
    if not others:
        return OutputLeakage(0.0, 0.0, 1.0, 0)
    rows = [prompt_row(tokenizer, fact, prompt) for fact in others for prompt in fact.prompts]
    bank = DeltaBank(model)
    bank.add("new", delta)
    before_ids = [] if own is None else ["own"]
    if own is not None:
        bank.add("own", own)
    divergences: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    with in_evaluation(model), torch.no_grad():
        for chosen in row_batches(rows, batch_rows):
            batch = row_batch(model, [rows[i] for i in chosen])
            with bank.routed([before_ids]):
                before = scored_logits(model, batch)[:, -1].double().log_softmax(-1)
            with bank.routed([[*before_ids, "new"]]):
                after = scored_logits(model, batch)[:, -1].double().log_softmax(-1)
            divergences.append((before.exp() * (before - after)).sum(-1).clamp_min(0))
            kept.append(before.argmax(-1) == after.argmax(-1))
    all_kl, all_kept = torch.cat(divergences), torch.cat(kept)
    share = float(all_kept.double().mean())
    return OutputLeakage(float(all_kl.mean()), float(all_kl.max()), share, len(rows))


def output_leakage_table(
    model: nn.Module,
    tokenizer: Any,
    deltas: Mapping[str, LowRankDelta],
    facts: Mapping[str, Sequence[Fact]],
) -> dict[str, dict[str, OutputLeakage]]:
    """`table[a][b]`: what delta `a` changes at the prompts of the facts of `b`; a row for itself is
    what it was made for.

    Args:
        deltas, facts: by id; facts may have more ids, of those without a delta.
    """
    return {
        a: {b: output_leakage(model, tokenizer, delta, own) for b, own in sorted(facts.items())}
        for a, delta in sorted(deltas.items())
    }
