"""Ways to have deltas active, what they change, and deltas that should do nothing."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

NAMES = ("rank", "top1", "top5", "exact", "answer_logprob", "paraphrase_top1", "paraphrase_exact")
MEASURES = (*NAMES, "kl_unrelated", "unrelated_kept")


def measured(model: Any, tokenizer: Any, facts: Sequence[Any], apply: Any) -> list[dict[str, Any]]:
    """`evaluate_facts` on prompts that neither training nor thresholds have seen. What
    `sets_threshold` has no neighbours left."""
    from belief_runs import HELD_PARAPHRASES

    from gravity_hf.knowledge.fact_metrics import evaluate_facts

    rows = evaluate_facts(
        model,
        tokenizer,
        facts,
        apply,
        trained_paraphrases=HELD_PARAPHRASES,
        trained_unrelated=1,
        batch_rows=256 if next(model.parameters()).is_cuda else 32,
    )
    for fact, row in zip(facts, rows, strict=True):
        if sets_threshold(fact):
            row |= {"kl_unrelated": None, "unrelated_kept": None}
    return [{name: row[name] for name in MEASURES} for row in rows]


def by_fact(bank: Any, ids: dict[str, str]) -> Any:
    """Each row has the delta of its fact's id in `ids`."""
    return lambda rows: bank.routed([ids[row.fact.id] for row in rows])


def always(bank: Any, ids: Sequence[str]) -> Any:
    """Each row has all of `ids`."""
    return lambda rows: bank.routed([list(ids)])


class ByRouter:
    """Each row has what the router finds for its prompt."""

    def __init__(self, bank: Any, router: Any) -> None:
        self.bank, self.router = bank, router
        self.known: dict[str, list[str]] = {}

    def __call__(self, rows: Sequence[Any]) -> AbstractContextManager[None]:
        new = list(dict.fromkeys(row.prompt for row in rows if row.prompt not in self.known))
        self.known.update(zip(new, self.router.rows(new), strict=True))
        return self.bank.routed([self.known[row.prompt] for row in rows])


def store_of(folder: str, model: Any, tokenizer: Any, encoded: Sequence[Any]) -> Any:
    """A store of encoded facts, by their ids."""
    from gravity_hf.knowledge.store import BeliefStore

    store = BeliefStore.create(folder, model, tokenizer)
    with store.transaction():
        for one in encoded:
            store.add_delta(one.fact.id, one.delta, None, one.fact, one.report)
    return store


def sets_threshold(fact: Any) -> bool:
    """Of a third of the facts all neighbours set the router's threshold, none is measured on."""
    return zlib.crc32(fact.id.encode()) % 3 == 0


def neighbours(facts: Sequence[Any], threshold: bool) -> list[str]:
    """Prompts near to facts and about none of them, to set the threshold with or to measure on.

    Both are of all kinds: worded alike about another subject, and about the same subject otherwise.
    """
    chosen = {
        use: {x for fact in facts if sets_threshold(fact) is use for x in fact.unrelated[not use :]}
        for use in (True, False)
    }
    found = chosen[True] if threshold else chosen[False] - chosen[True]
    return sorted(found - {prompt for fact in facts for prompt in fact.prompts})


# Of the texts that are routed, neighbours and paraphrases in about equal numbers, this share is to
# be routed right. Chosen among 0.95, 0.9 and 0.8 with the queries of seed 0 in view.
PRECISION = 0.9


def calibrated_router(
    store: Any,
    facts: Sequence[Any],
    encoder: str = "hidden:quarter",
    subjects: bool = True,
    precision: float = PRECISION,
) -> Any:
    """A router whose threshold is set on paraphrases and neighbours that are used for nothing
    else."""
    from belief_runs import TRAINED_PARAPHRASES

    from gravity_hf.knowledge.routing import Router

    router = Router(store, encoder, subjects=subjects)
    known = [(fact.paraphrases[TRAINED_PARAPHRASES], fact.id) for fact in facts]
    # Of very few facts, none may be chosen.
    near = neighbours(facts, threshold=True) or sorted({fact.unrelated[0] for fact in facts})
    router.calibrate(known, near, precision)
    return router


def change_elsewhere(
    model: Any, tokenizer: Any, prompts: Sequence[str], fact: Any, apply: Any
) -> dict[str, float]:
    """KL(without || with) of the next token at prompts that must not change: mean, and the share
    whose likeliest token stayed. `fact` stands in for the one that rows belong to."""
    import torch

    from gravity_hf.knowledge.fact_rows import prompt_row, row_batch, row_batches, scored_logits
    from gravity_hf.layers.modes import in_evaluation

    rows = [prompt_row(tokenizer, fact, prompt) for prompt in prompts]
    divergences, kept = [], 0
    with in_evaluation(model), torch.no_grad():
        for chosen in row_batches(rows, 64):
            own = [rows[i] for i in chosen]
            batch = row_batch(model, own)
            before = scored_logits(model, batch)[:, -1].double().log_softmax(-1)
            with apply(own):
                after = scored_logits(model, batch)[:, -1].double().log_softmax(-1)
            divergences += (before.exp() * (before - after)).sum(-1).clamp_min(0).tolist()
            kept += int((before.argmax(-1) == after.argmax(-1)).sum())
    return {"kl": sum(divergences) / len(rows), "kept": kept / len(rows), "prompts": len(rows)}


def text_loss(model: Any, windows: Any, context: AbstractContextManager[Any] | None) -> list[float]:
    """Nats per token of each window `[n, T]`."""
    import torch

    losses = []
    with context or nullcontext(), torch.no_grad():
        ids = windows.to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        for row, wanted in zip(logits, ids[:, 1:], strict=True):
            losses.append(float(torch.nn.functional.cross_entropy(row, wanted)))
    return losses


def random_like(delta: Any, seed: int) -> Any:
    """A delta of the same ranks, of the same size on each map, in random directions."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (A, B) in delta.factors.items():
        a, b = (torch.randn(x.shape, generator=generator) for x in (A, B))
        size = float((B.float() @ A.float()).norm()) / float((b @ a).norm())
        factors[name] = (a, b * size)
    return type(delta)(factors)


def others(facts: Sequence[Any], seed: int) -> dict[str, Any]:
    """For each fact's id another fact with another answer, the next one in an order drawn by lot.

    Raises:
        ValueError: all facts have the same answer.
    """
    order = list(facts)
    random.Random(seed).shuffle(order)
    found = {}
    for i, fact in enumerate(order):
        following = (*order[i + 1 :], *order[:i])
        other = next((x for x in following if not set(x.answers) & set(fact.answers)), None)
        if other is None:
            raise ValueError(f"--banks: expected facts with several answers, got {fact.answer!r}")
        found[fact.id] = other
    return found
