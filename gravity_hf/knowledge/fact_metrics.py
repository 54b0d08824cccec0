"""How well a model, with or without deltas, knows facts, and what else the deltas changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.modes import in_evaluation
from .errors import ValidationError
from .fact_rows import FactRow, answer_row, prompt_row, row_batch, row_batches, scored_logits
from .facts import Fact

# Rows of a batch -> the context in which the model has their deltas.
Apply = Callable[[Sequence[FactRow]], AbstractContextManager[Any]]


def evaluate_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    apply: Apply | None = None,
    *,
    trained_paraphrases: int = 0,
    trained_unrelated: int = 0,
    batch_rows: int = 64,
) -> list[dict[str, Any]]:
    """Measures of every fact, in their order.

    Args:
        apply: from the rows of a batch (each with its `fact`, `kind` and `prompt`) to a context in
            which the model has what is measured: `lambda rows: bank.routed([[ids[row.fact.id]] for
            row in rows])`, say. None: the model as it is.
        trained_paraphrases: so many of a fact's first paraphrases were trained on; left out here.
        trained_unrelated: the same of its unrelated prompts.

    Returns:
        For each fact a dict that goes into JSON: `id`; of its prompt `rank` (of the answer's first
        token, 0 = top), `top1`, `top5`, `answer_logprob` (of the whole answer, nats) and `exact`
        (greedy decoding gives the whole answer or a whole alias); `paraphrase_top1`,
        `paraphrase_exact` (shares of the held-out ones; None without any); `paraphrases` (how many
        these are); `kl_unrelated` (mean of `KL(without || with)` of the next token at held-out
        unrelated prompts, nats; None without any or without `apply`) and `unrelated_kept` (share
        of them with the same most likely token).

    Raises:
        ValidationError: an answer that the tokenizer cannot write.
    """
    rows: list[FactRow] = []
    owners: list[int] = []
    for position, fact in enumerate(facts):
        own = _rows(tokenizer, fact, trained_paraphrases)
        if apply is not None:
            own += [prompt_row(tokenizer, fact, x) for x in fact.unrelated[trained_unrelated:]]
        rows += own
        owners += [position] * len(own)
    with in_evaluation(model), torch.no_grad():
        measured = _measure(model, rows, apply, batch_rows)
    found: list[list[tuple[FactRow, dict[str, Any]]]] = [[] for _ in facts]
    for owner, row, values in zip(owners, rows, measured, strict=True):
        found[owner].append((row, values))
    return [_summary(fact, own) for fact, own in zip(facts, found, strict=True)]


def _rows(tokenizer: Any, fact: Fact, trained_paraphrases: int) -> list[FactRow]:
    """The prompt and the held-out paraphrases, each with the answer and then with its aliases."""
    rows = []
    for i, prompt in enumerate((fact.prompt, *fact.paraphrases[trained_paraphrases:])):
        kind = "paraphrase" if i else "prompt"
        rows.append(answer_row(tokenizer, fact, kind, prompt, fact.answer))
        for alias in fact.aliases:
            # What the tokenizer cannot write, greedy decoding cannot give.
            with suppress(ValidationError):
                rows.append(answer_row(tokenizer, fact, kind, prompt, alias))
    return rows


def _measure(
    model: nn.Module, rows: Sequence[FactRow], apply: Apply | None, batch_rows: int
) -> list[dict[str, Any]]:
    measured: list[dict[str, Any]] = [{} for _ in rows]
    for chosen in row_batches(rows, batch_rows):
        own = [rows[i] for i in chosen]
        batch = row_batch(model, own)
        with nullcontext() if apply is None else apply(own):
            log_p = scored_logits(model, batch).log_softmax(-1)
        for i, row, tokens, labels in zip(chosen, own, log_p, batch.labels, strict=True):
            if row.answer:
                measured[i] = _answer_measures(tokens[-row.answer :], labels[-row.answer :])
        unrelated = [j for j, row in enumerate(own) if not row.answer]
        if unrelated:
            base = scored_logits(model, row_batch(model, [own[j] for j in unrelated]))
            for j, before in zip(unrelated, base[:, -1].log_softmax(-1), strict=True):
                measured[chosen[j]] = _change(before, log_p[j, -1])
    return measured


def _answer_measures(log_p: Tensor, labels: Tensor) -> dict[str, Any]:
    """`log_p [answer, vocabulary]`, each at the position before its token."""
    own = log_p.gather(-1, labels[:, None])
    # Ties count against the answer: a model that says the same of all tokens knows nothing.
    ranks = (log_p >= own).sum(-1) - 1
    return {
        "rank": int(ranks[0]),
        "answer_logprob": float(own.double().sum()),
        "exact": bool((ranks == 0).all()),
    }


def _change(before: Tensor, after: Tensor) -> dict[str, Any]:
    before, after = before.double(), after.double()
    kl = float((before.exp() * (before - after)).sum().clamp_min(0))
    return {"kl": kl, "kept": bool(before.argmax() == after.argmax())}


def _summary(fact: Fact, found: list[tuple[FactRow, dict[str, Any]]]) -> dict[str, Any]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row, values in found:
        if row.answer:
            by_prompt.setdefault(row.prompt, []).append(values)
    changes = [values for row, values in found if not row.answer]
    asked = by_prompt.pop(fact.prompt)
    first = asked[0]
    others = list(by_prompt.values())
    return {
        "id": fact.id,
        "rank": first["rank"],
        "top1": first["rank"] == 0,
        "top5": first["rank"] < 5,
        "answer_logprob": first["answer_logprob"],
        "exact": _is_exact(asked),
        "paraphrase_top1": _mean([answers[0]["rank"] == 0 for answers in others]),
        "paraphrase_exact": _mean([_is_exact(answers) for answers in others]),
        "paraphrases": len(others),
        "kl_unrelated": _mean([values["kl"] for values in changes]),
        "unrelated_kept": _mean([values["kept"] for values in changes]),
    }


def _is_exact(answers: list[dict[str, Any]]) -> bool:
    return any(values["exact"] for values in answers)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
