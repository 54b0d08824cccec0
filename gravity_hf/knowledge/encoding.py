"""Facts into deltas: trained beside a frozen base, many at once, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .bank import DeltaBank
from .budget import base_parameters, check_budget
from .delta import LowRankDelta
from .encoding_config import EncodingConfig
from .encoding_rows import training_prompts, training_rows
from .encoding_training import DeltaJob, Projector, TrainedDelta, train_deltas
from .errors import ValidationError
from .fact_metrics import evaluate_facts
from .fact_rows import FactRow
from .facts import Fact
from .targets import target_modules

__all__ = ["BeliefEncoder", "EncodedBelief", "EncodingConfig"]


@dataclass(frozen=True)
class EncodedBelief:
    """A fact, its delta, and what the delta does.

    Args:
        report: goes into JSON. With the delta: the measures of `evaluate_facts` on prompts that it
            was not trained on, among them `top1`, `top5`, `exact`, `paraphrase_top1` and
            `kl_unrelated`. `rank_before`, `rank_after`, `answer_logprob_before`,
            `answer_logprob_after`, `top1_before`, `exact_before`, `paraphrase_top1_before`. How it
            was made: `training_prompts`, `params`, `params_fraction` (of the base), `norm`,
            `steps`, `converged` (the margin was reached) and `seconds` (the whole encoding divided
            by its facts).
    """

    fact: Fact
    delta: LowRankDelta
    report: dict[str, Any]


class BeliefEncoder:
    """Trains one low-rank delta for each fact; the base stays as it is.

    Args:
        model: a causal LM; gravity-patched, quantised or wrapped by peft or not. Its deltas are
            trained in float32.
        config: see `EncodingConfig`.
        projector: from a map's name to `(P_in [in, k], P_out [out, k])`, orthonormal columns or
            None each, that `A` and `B` stay orthogonal to at every step.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: EncodingConfig | None = None,
        projector: Projector | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or EncodingConfig()
        self.projector = projector

    def encode(self, facts: Sequence[Fact], progress: bool = True) -> list[EncodedBelief]:
        """One delta for each fact, in their order.

        A fact's delta does not depend on which others are encoded with it, but for the rounding of
        other batch shapes.

        Args:
            progress: show a bar.

        Raises:
            BudgetError: more parameters than `config.budget_fraction` of the base's.
            ValidationError: no facts, an answer that the tokenizer cannot write, no such layers.
        """
        return self._encode([(fact,) for fact in facts], progress)

    def encode_together(self, facts: Sequence[Fact], progress: bool = True) -> list[EncodedBelief]:
        """One delta for all of `facts`, which may cost as much as theirs would; it is in each of
        the results, which have a report for each fact.

        Raises:
            BudgetError, ValidationError: see `encode`.
        """
        return self._encode([tuple(facts)], progress)

    def _encode(self, groups: Sequence[tuple[Fact, ...]], progress: bool) -> list[EncodedBelief]:
        started = time.monotonic()
        jobs = self._jobs(groups)
        facts = [fact for group in groups for fact in group]
        before = self._measures(facts, None)
        trained = train_deltas(
            self.model,
            self.tokenizer,
            jobs,
            self.config,
            projector=self.projector,
            progress=progress,
        )
        owners = {id(fact): i for i, group in enumerate(groups) for fact in group}
        bank = DeltaBank(self.model)
        for i, result in enumerate(trained):
            bank.add(str(i), result.delta)

        def apply(rows: Sequence[FactRow]) -> AbstractContextManager[None]:
            return bank.routed([str(owners[id(row.fact)]) for row in rows])

        after = self._measures(facts, apply)
        seconds = (time.monotonic() - started) / len(facts)
        results = [trained[owners[id(fact)]] for fact in facts]
        return [
            EncodedBelief(fact, result.delta, self._report(fact, result, old, new, seconds))
            for fact, result, old, new in zip(facts, results, before, after, strict=True)
        ]

    def _jobs(self, groups: Sequence[tuple[Fact, ...]]) -> list[DeltaJob]:
        """What is to be trained; everything that can be refused is refused here."""
        if not groups or not all(groups):
            raise ValidationError("encode: expected at least one fact, got none")
        names = target_modules(self.model, self.config.layers, self.config.targets)
        for size in sorted({len(group) for group in groups}):
            check_budget(
                self.model, names, self.config.rank, self.config.budget_fraction, facts=size
            )
        jobs = []
        for group in groups:
            rows = [
                row for fact in group for row in training_rows(self.tokenizer, fact, self.config)
            ]
            jobs.append(DeltaJob(tuple(names), tuple(rows)))
        return jobs

    def _measures(self, facts: Sequence[Fact], apply: Any) -> list[dict[str, Any]]:
        return evaluate_facts(
            self.model,
            self.tokenizer,
            facts,
            apply,
            trained_paraphrases=self.config.training_paraphrases,
            trained_unrelated=self.config.training_unrelated,
        )

    def _report(
        self,
        fact: Fact,
        result: TrainedDelta,
        before: dict[str, Any],
        after: dict[str, Any],
        seconds: float,
    ) -> dict[str, Any]:
        measures = {k: v for k, v in after.items() if k not in ("id", "rank", "answer_logprob")}
        return measures | {
            "rank_before": before["rank"],
            "rank_after": after["rank"],
            "answer_logprob_before": before["answer_logprob"],
            "answer_logprob_after": after["answer_logprob"],
            "top1_before": before["top1"],
            "exact_before": before["exact"],
            "paraphrase_top1_before": before["paraphrase_top1"],
            "training_prompts": training_prompts(fact, self.config),
            "params": result.delta.parameters(),
            "params_fraction": result.delta.parameters() / base_parameters(self.model),
            "norm": result.delta.norm(),
            "steps": result.steps,
            "converged": result.converged,
            "seconds": seconds,
        }
