"""What a consolidation does to the facts of its beliefs, and how much of that is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .bank import DeltaBank
from .delta import LowRankDelta
from .fact_metrics import evaluate_facts
from .facts import Fact
from .merging import MergedModule

# What the metadata of a consolidated belief calls the rows of its facts.
FACTS = "consolidated"
_MERGED = "merged"


@dataclass(frozen=True)
class Tolerance:
    """What a consolidation may cost.

    Args:
        lost_facts: facts that were answered exactly before and are not after.
        paraphrases: by how much the share of paraphrases with the right first token may fall.
        kl: mean KL in nats at the facts' unrelated prompts, unless it was more before.
    """

    lost_facts: int = 0
    paraphrases: float = 0.05
    kl: float = 0.05


@dataclass(frozen=True)
class ConsolidationReport:
    """What a consolidation did, or would do.

    Attributes:
        key: of the consolidated belief; belief_id: None where nothing was changed.
        sources: keys that it stands for.
        replaced: whether it was done; reason: in words, why or why not.
        modules: ranks and error of each map.
        parameters_before, parameters_after: of the source deltas and of the merged one.
        freed: free input directions that each map has more than before; of the registry where
            there is one, else of the deltas' own spans.
        facts: how many were measured; exact_before, exact_after: how many of them are answered
            exactly; paraphrases_before, paraphrases_after: mean share with the right first token;
            kl_before, kl_after: means at unrelated prompts, nats. None where nothing was measured.
        lost: ids of facts that are answered exactly before and not after.
    """

    key: str
    sources: tuple[str, ...]
    energy: float
    modules: dict[str, MergedModule]
    parameters_before: int
    parameters_after: int
    freed: dict[str, int]
    belief_id: str | None = None
    replaced: bool = False
    reason: str = ""
    facts: int = 0
    exact_before: int | None = None
    exact_after: int | None = None
    paraphrases_before: float | None = None
    paraphrases_after: float | None = None
    kl_before: float | None = None
    kl_after: float | None = None
    lost: tuple[str, ...] = ()
    per_fact: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        modules = {name: module._asdict() for name, module in self.modules.items()}
        return {**asdict(self), "modules": modules}


def facts_of(belief: Any) -> list[Fact]:
    """The facts that a belief stands for: its own, or those it was consolidated from."""
    if belief.fact is not None:
        return [belief.fact]
    return [Fact.from_row(row) for row in (belief.metadata or {}).get(FACTS, [])]


def measured(
    report: ConsolidationReport,
    store: Any,
    beliefs: Sequence[Any],
    facts: Sequence[Sequence[Fact]],
    delta: LowRankDelta,
) -> ConsolidationReport:
    """The report with every fact measured under its own belief's delta and under the merged one."""
    bank = DeltaBank(store.model)
    owner = {}
    for belief, own in zip(beliefs, facts, strict=True):
        bank.add(belief.id, belief.delta)
        owner.update({id(fact): belief.id for fact in own})
    bank.add(_MERGED, delta)
    flat = [fact for own in facts for fact in own]

    def evaluated(chosen: Callable[[int], str]) -> list[dict[str, Any]]:
        return evaluate_facts(
            store.model,
            store.tokenizer,
            flat,
            lambda rows: bank.routed([[chosen(id(row.fact))] for row in rows]),
        )

    before, after = evaluated(owner.__getitem__), evaluated(lambda _: _MERGED)
    pairs = list(zip(before, after, strict=True))
    return replace(
        report,
        facts=len(flat),
        exact_before=sum(b["exact"] for b in before),
        exact_after=sum(a["exact"] for a in after),
        paraphrases_before=_mean(before, "paraphrase_top1"),
        paraphrases_after=_mean(after, "paraphrase_top1"),
        kl_before=_mean(before, "kl_unrelated"),
        kl_after=_mean(after, "kl_unrelated"),
        lost=tuple(b["id"] for b, a in pairs if b["exact"] and not a["exact"]),
        per_fact=tuple({"id": b["id"], "before": b, "after": a} for b, a in pairs),
    )


def no_gain(report: ConsolidationReport) -> str:
    """Why merging would gain nothing; empty where it would."""
    if report.parameters_after < report.parameters_before:
        return ""
    ranks = sum(module.rank_after for module in report.modules.values())
    before = sum(module.rank_before for module in report.modules.values())
    return (
        f"nothing would be freed: {report.energy:.0%} of the energy of {len(report.sources)} "
        f"deltas takes rank {ranks} of {before}. They share no directions, as deltas that were "
        "made orthogonal do; a lower energy would lose facts instead"
    )


def faults_of(report: ConsolidationReport, tolerance: Tolerance) -> list[str]:
    """What was measured and is worse than allowed, in words."""
    faults = []
    if len(report.lost) > tolerance.lost_facts:
        shown = ", ".join(report.lost[:5]) + (" ..." if len(report.lost) > 5 else "")
        faults.append(f"{len(report.lost)} facts lost ({shown}), allowed {tolerance.lost_facts}")
    if report.paraphrases_before is not None and report.paraphrases_after is not None:
        fall = report.paraphrases_before - report.paraphrases_after
        if fall > tolerance.paraphrases:
            faults.append(f"paraphrases fell by {fall:.3f}, allowed {tolerance.paraphrases}")
    if report.kl_after is not None:
        allowed = max(tolerance.kl, report.kl_before or 0.0)
        if not report.kl_after <= allowed:
            faults.append(f"KL at unrelated prompts {report.kl_after:.4f}, allowed {allowed:.4f}")
    return faults


def _mean(measured: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in measured if row[name] is not None]
    return sum(values) / len(values) if values else None
