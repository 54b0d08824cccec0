"""What deltas learn from n facts: the facts themselves, other wordings, and facts never shown.

Memorising and generalising are measured apart, on facts and wordings that training never saw, over
several draws of which facts are shown. Beside the deltas stand plain fine-tuning with a LoRA of as
many parameters on the same texts, and the base as it is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .bank import DeltaBank
from .delta import LowRankDelta
from .encoding import BeliefEncoder, EncodingConfig
from .errors import ValidationError
from .fact_metrics import Apply, evaluate_facts
from .facts import Fact
from .lora_control import lora_control
from .statistics import McNemar, Rate, Spread, mcnemar, rate, spread

# How the model is when it is measured: as it is; with each fact's own delta; with all of them at
# once; with one delta that was trained on all facts; with the fine-tuned LoRA.
METHODS = ("base", "named", "all", "together", "lora")
# What is measured: prompts that were trained on, held-out wordings of these facts, facts not shown.
MEASURES = ("memorised", "paraphrases", "unseen")
# In the bank, beside the ids of facts.
_JOINT, _LORA = "(together)", "(lora)"


@dataclass(frozen=True)
class FewShotRun:
    """One method on one draw of facts.

    Attributes:
        memorised: of the facts shown, whether the prompt that was trained on is answered exactly.
        paraphrases: of the same, the share of held-out paraphrases with the right first token.
        unseen: of facts not shown, whether their prompt is answered exactly; with "named" there is
            no delta for them, so it is that of the base.
        kl_unrelated: mean KL at held-out unrelated prompts of the facts shown, nats; 0 of the base.
        parameters: of all deltas or of the LoRA. seconds: of training.
        shown, hidden: ids of the facts, in the order of the lists above.
    """

    method: str
    count: int
    seed: int
    memorised: tuple[bool, ...]
    paraphrases: tuple[float, ...]
    unseen: tuple[bool, ...]
    kl_unrelated: float
    parameters: int
    seconds: float
    shown: tuple[str, ...]
    hidden: tuple[str, ...]


@dataclass(frozen=True)
class FewShotSummary:
    """One method at one number of facts, over all draws.

    Attributes:
        memorised, unseen: with Wilson's interval over all facts of all draws; paraphrases: the
            same, a fact counting where more than half of its paraphrases are right.
        seeds: of each measure, the mean, lowest and highest over draws.
        versus_lora: of `memorised`, paired by fact; paraphrases_versus_lora: of paraphrases.
        kl_unrelated: over draws.
    """

    method: str
    count: int
    memorised: Rate
    paraphrases: Rate
    unseen: Rate
    seeds: dict[str, Spread]
    versus_lora: McNemar
    paraphrases_versus_lora: McNemar
    kl_unrelated: Spread
    parameters: int


@dataclass(frozen=True)
class FewShotSweep:
    """All runs and their summaries."""

    runs: tuple[FewShotRun, ...]
    summaries: tuple[FewShotSummary, ...]
    config: dict[str, Any]

    def of(self, method: str, count: int) -> FewShotSummary:
        """The summary of a method at a number of facts. ValidationError where there is none."""
        found = [s for s in self.summaries if (s.method, s.count) == (method, count)]
        if not found:
            raise ValidationError(f"FewShotSweep: expected a measured pair, got {method}, {count}")
        return found[0]

    def fewest(self, method: str, measure: str = "paraphrases", share: float = 0.5) -> int | None:
        """The smallest number of facts at which Wilson's lower bound reaches `share`, or None."""
        reached = [
            s.count
            for s in self.summaries
            if s.method == method and getattr(s, measure).low >= share
        ]
        return min(reached, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "config": self.config,
            "per_item": [asdict(run) for run in self.runs],
            "summary": [_plain(summary) for summary in self.summaries],
        }


def few_shot_sweep(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    counts: Sequence[int] = (1, 3, 5, 10, 25),
    seeds: Sequence[int] = range(5),
    hidden: int = 20,
    config: EncodingConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> FewShotSweep:
    """Teach `count` facts and measure them, their paraphrases, and `hidden` others; for every
    count, seed and method.

    Args:
        facts: what is drawn from. For every seed the facts are shuffled; the last `hidden` are
            never shown, and of the others the first `count` are.
        seeds: of the draws and of the first factors; at least five for numbers to publish.
        config: of the encoder and, but for the rate, of the LoRA. Its prompts for training and
            those left for measuring are disjoint.
        progress: called with a line of text before each draw.

    Raises:
        ValidationError: too few facts for the largest count and `hidden`, facts whose paraphrases
            are all trained on, or no counts or seeds.
    """
    config = config or EncodingConfig()
    _check(facts, counts, seeds, hidden, config)
    runs: list[FewShotRun] = []
    for seed in seeds:
        order = list(facts)
        random.Random(seed).shuffle(order)
        shown, never = order[: len(order) - hidden], order[len(order) - hidden :]
        for count in sorted(set(counts)):
            if progress is not None:
                progress(f"{count} facts, seed {seed}")
            draw = _Draw(model, tokenizer, shown[:count], never, replace(config, seed=seed))
            runs += draw.runs()
    summaries = [
        _summary([run for run in runs if (run.method, run.count) == (method, count)], runs)
        for count in sorted(set(counts))
        for method in METHODS
    ]
    described = {"encoder": config.to_dict(), "counts": sorted(set(counts)), "seeds": list(seeds)}
    return FewShotSweep(tuple(runs), tuple(summaries), {**described, "hidden": hidden})


def _check(
    facts: Sequence[Fact],
    counts: Sequence[int],
    seeds: Sequence[int],
    hidden: int,
    config: EncodingConfig,
) -> None:
    if not counts or not seeds or min(counts) < 1 or hidden < 1:
        raise ValidationError(
            "few_shot_sweep: expected counts of at least 1, seeds, and at least 1 hidden fact, got "
            f"{list(counts)}, {list(seeds)}, {hidden}"
        )
    if len(facts) < max(counts) + hidden:
        raise ValidationError(
            f"few_shot_sweep: expected at least {max(counts) + hidden} facts to show "
            f"{max(counts)} and hide {hidden}, got {len(facts)}"
        )
    short = [fact.id for fact in facts if len(fact.paraphrases) <= config.training_paraphrases]
    if short:
        raise ValidationError(
            f"few_shot_sweep: {short[0]}: expected more than the {config.training_paraphrases} "
            "paraphrases that are trained on"
        )


class _Draw:
    """Which facts are shown and which are not, and what each method makes of that."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        shown: Sequence[Fact],
        hidden: Sequence[Fact],
        config: EncodingConfig,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.shown, self.hidden = shown, hidden
        self.bank = DeltaBank(model)

    def runs(self) -> list[FewShotRun]:
        own, own_seconds = self._timed(self._encoded)
        joint, joint_seconds = self._timed(self._encoded_together)
        lora, lora_seconds = self._timed(self._fine_tuned)
        every = list(own)
        parameters = sum(delta.parameters() for delta in own.values())
        for name, delta in {**own, _JOINT: joint, _LORA: lora}.items():
            self.bank.add(name, delta)
        named = self._routed(lambda fact: [fact] if fact in own else [])
        return [
            self._run("base", None, 0, 0.0),
            self._run("named", named, parameters, own_seconds),
            self._run("all", self._routed(lambda fact: every), parameters, own_seconds),
            self._run("together", self._always(_JOINT), joint.parameters(), joint_seconds),
            self._run("lora", self._always(_LORA), lora.parameters(), lora_seconds),
        ]

    def _routed(self, ids_of: Callable[[str], list[str]]) -> Apply:
        return lambda rows: self.bank.routed([ids_of(row.fact.id) for row in rows])

    def _always(self, name: str) -> Apply:
        return self._routed(lambda fact: [name])

    def _encoded(self) -> dict[str, LowRankDelta]:
        encoder = BeliefEncoder(self.model, self.tokenizer, self.config)
        return {x.fact.id: x.delta for x in encoder.encode(self.shown, progress=False)}

    def _encoded_together(self) -> LowRankDelta:
        encoder = BeliefEncoder(self.model, self.tokenizer, self.config)
        return encoder.encode_together(self.shown, progress=False)[0].delta

    def _fine_tuned(self) -> LowRankDelta:
        return lora_control(self.model, self.tokenizer, self.shown, self.config).delta

    @staticmethod
    def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
        started = time.monotonic()
        return make(), time.monotonic() - started

    def _run(self, method: str, apply: Apply | None, parameters: int, seconds: float) -> FewShotRun:
        shown = self._measured(self.shown, apply)
        hidden = self._measured(self.hidden, apply)
        changes = [row["kl_unrelated"] for row in shown if row["kl_unrelated"] is not None]
        return FewShotRun(
            method=method,
            count=len(self.shown),
            seed=self.config.seed,
            memorised=tuple(row["exact"] for row in shown),
            paraphrases=tuple(row["paraphrase_top1"] for row in shown),
            unseen=tuple(row["exact"] for row in hidden),
            kl_unrelated=sum(changes) / len(changes) if changes else 0.0,
            parameters=parameters,
            seconds=seconds,
            shown=tuple(fact.id for fact in self.shown),
            hidden=tuple(fact.id for fact in self.hidden),
        )

    def _measured(self, facts: Sequence[Fact], apply: Apply | None) -> list[dict[str, Any]]:
        return evaluate_facts(
            self.model,
            self.tokenizer,
            facts,
            apply,
            trained_paraphrases=self.config.training_paraphrases,
            trained_unrelated=self.config.training_unrelated,
        )


def _summary(own: Sequence[FewShotRun], runs: Sequence[FewShotRun]) -> FewShotSummary:
    first = own[0]
    lora = {run.seed: run for run in runs if (run.method, run.count) == ("lora", first.count)}
    others = [lora[run.seed] for run in own]
    return FewShotSummary(
        method=first.method,
        count=first.count,
        memorised=rate(_flags(own, "memorised")),
        paraphrases=rate(_flags(own, "paraphrases")),
        unseen=rate(_flags(own, "unseen")),
        seeds={
            name: spread([sum(values) / len(values) for values in (getattr(x, name) for x in own)])
            for name in MEASURES
        },
        versus_lora=mcnemar(_flags(own, "memorised"), _flags(others, "memorised")),
        paraphrases_versus_lora=mcnemar(_flags(own, "paraphrases"), _flags(others, "paraphrases")),
        kl_unrelated=spread([run.kl_unrelated for run in own]),
        parameters=first.parameters,
    )


def _flags(runs: Sequence[FewShotRun], measure: str) -> list[bool]:
    return [value > 0.5 for run in runs for value in getattr(run, measure)]


def _plain(summary: FewShotSummary) -> dict[str, Any]:
    values = {name: getattr(summary, name) for name in summary.__dataclass_fields__}
    values["seeds"] = {name: own._asdict() for name, own in summary.seeds.items()}
    return {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in values.items()}
