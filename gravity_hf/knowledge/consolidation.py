"""Several beliefs as one delta: checked on every fact before anything changes, undone by rollback.

What is merged is the sum of the deltas (`merging`), so each fact is answered beside all others of
its group from then on. Whether it still is, is measured, on the prompt and the paraphrases of every
source fact; and where the merge would free nothing it is not done, as nothing would be gained for
what it costs: facts that can no longer be removed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from .consolidation_report import (
    FACTS,
    ConsolidationReport,
    Tolerance,
    facts_of,
    faults_of,
    measured,
    no_gain,
)
from .delta import LowRankDelta
from .errors import DuplicateKeyError, KnowledgeError, UnknownKeyError, ValidationError
from .facts import Fact
from .merging import merged
from .moments import prompt_moments

__all__ = ["ConsolidationReport", "Tolerance", "consolidate", "facts_of"]


def consolidate(
    store: Any,
    registry: Any = None,
    keys: Sequence[str] | None = None,
    *,
    domain: str | None = None,
    energy: float = 0.99,
    key: str | None = None,
    validate: bool = True,
    tolerance: Tolerance | None = None,
    dry_run: bool = False,
) -> ConsolidationReport:
    """Merge beliefs into one, if that frees something and every fact survives it.

    All or nothing: the store and the registry are as they were after any exception. The source
    beliefs are removed, not purged: `store.rollback(key, version)` brings each of them back.

    Args:
        store: a BeliefStore.
        registry: the store's Registry, if it has one; the sources that it knows leave it and the
            merged delta joins it, or nothing happens.
        keys: of the beliefs to merge; or `domain`: all whose facts are of it.
        energy: share of the squared norm of the sum that is kept at each map.
        key: of the merged belief; `consolidated/<domain or first key>` if not given.
        validate: measure all source facts before and after; False leaves that to you.
        tolerance: how much may be lost.
        dry_run: measure and report, change nothing.

    Returns:
        The report. `replaced` is False in a dry run, and where nothing would be freed.

    Raises:
        UnknownKeyError, DuplicateKeyError: keys that are not there, or one that is.
        ValidationError: fewer than two beliefs, beliefs without facts while `validate`, or facts
            that would be lost.
        InterferenceError, CapacityError: the registry refuses the merged delta.
    """
    beliefs = _chosen(store, keys, domain)
    name = key or f"consolidated/{domain or beliefs[0].key}"
    if name in store:
        raise DuplicateKeyError(
            f"consolidate: expected a new key for the merged belief, got {name!r}, which the store "
            "has. Pass another as key"
        )
    facts = [facts_of(belief) for belief in beliefs]
    if validate and (silent := [b.key for b, own in zip(beliefs, facts, strict=True) if not own]):
        raise ValidationError(
            f"consolidate: expected a fact with every belief, got none with {silent[0]!r}. It "
            "cannot be measured whether it survives; pass validate=False to merge it all the same"
        )
    deltas = [belief.delta for belief in beliefs]
    delta, modules = merged(deltas, energy)
    report = ConsolidationReport(
        key=name,
        sources=tuple(belief.key for belief in beliefs),
        energy=energy,
        modules=modules,
        parameters_before=sum(own.parameters() for own in deltas),
        parameters_after=delta.parameters(),
        freed={n: m.directions - m.rank_after for n, m in modules.items()},
    )
    if validate:
        report = measured(report, store, beliefs, facts, delta)
    report = replace(report, reason=no_gain(report))
    if report.reason:
        return report
    if faults := faults_of(report, tolerance or Tolerance()):
        if dry_run:
            return replace(report, reason=f"dry run: would be refused, {'; '.join(faults)}")
        raise ValidationError(
            f"consolidate: expected the facts to survive in {name!r}, got {'; '.join(faults)}. "
            f"Nothing was changed; keep more energy than {energy}, or merge fewer beliefs"
        )
    metadata = {
        FACTS: [fact.to_row() for own in facts for fact in own],
        "parents": [belief.id for belief in beliefs],
        "keys": list(report.sources),
        "energy": energy,
    }
    found = _belief_report(report, beliefs, facts)
    return _replace(report, store, registry, beliefs, delta, metadata, found, dry_run)


def _chosen(store: Any, keys: Sequence[str] | None, domain: str | None) -> list[Any]:
    if (keys is None) == (domain is None):
        raise ValidationError("consolidate: expected either keys or a domain, got both or neither")
    if isinstance(keys, str):
        raise ValidationError(f"consolidate: expected a list of keys, got {keys!r}")
    if keys is None:
        everything = (store.get(key) for key in sorted(store.keys()))
        chosen = [b for b in everything if domain in {fact.domain for fact in facts_of(b)}]
    else:
        missing = [key for key in keys if key not in store]
        if missing:
            raise UnknownKeyError(f"consolidate: expected keys of the store, got {missing[0]!r}")
        chosen = [store.get(key) for key in sorted(set(keys))]
    if len(chosen) < 2:
        raise ValidationError(
            f"consolidate: expected at least two beliefs, got {len(chosen)} "
            f"({'of the domain ' + repr(domain) if domain else 'keys'})"
        )
    return chosen


def _belief_report(
    report: ConsolidationReport, beliefs: Sequence[Any], facts: Sequence[Sequence[Fact]]
) -> dict[str, Any]:
    """What the merged belief says of itself. The prompts are those that it is found by."""
    prompts: list[str] = []
    for belief, own in zip(beliefs, facts, strict=True):
        prompts += belief.report.get("training_prompts") or [fact.prompt for fact in own]
    return {
        "training_prompts": list(dict.fromkeys(prompts)),
        "facts": report.facts,
        "exact_facts": report.exact_after,
        "paraphrase_top1": report.paraphrases_after,
        "kl_unrelated": report.kl_after,
        "params": report.parameters_after,
    }


class _DryRunEnds(Exception):
    """Leaves a transaction that was only there to be measured."""


def _replace(
    report: ConsolidationReport,
    store: Any,
    registry: Any,
    beliefs: Sequence[Any],
    delta: LowRankDelta,
    metadata: dict[str, Any],
    found: dict[str, Any],
    dry_run: bool,
) -> ConsolidationReport:
    """The beliefs out, the merged one in. The rename of the store's manifest is the last step."""
    try:
        with _both(store, registry):
            require_unchanged(store, beliefs)
            belief = store.add_delta(report.key, delta, metadata, None, found)
            for source in beliefs:
                store.remove(source.key)
            if registry is not None:
                freed = _reregister(store, registry, beliefs, belief.id, delta, metadata)
                report = replace(report, freed=freed)
            if dry_run:
                raise _DryRunEnds
            if registry is not None:
                registry.save()
    except _DryRunEnds:
        return replace(report, reason="dry run: nothing was changed")
    done = f"{len(beliefs)} beliefs are one; rollback of their keys brings them back"
    return replace(report, belief_id=belief.id, replaced=True, reason=done)


def require_unchanged(store: Any, beliefs: Sequence[Any]) -> None:
    """Raise KnowledgeError where one of `beliefs` is no longer the one in force under its key; to
    be asked in a transaction, before what was worked out from them is written."""
    for belief in beliefs:
        if belief.key not in store or store.get(belief.key).id != belief.id:
            raise KnowledgeError(
                f"{belief.key}: expected version {belief.version} in force, which was measured, "
                "got another: it was changed meanwhile. Try again"
            )


@contextmanager
def _both(store: Any, registry: Any) -> Iterator[None]:
    """The store's transaction inside of the registry's: where the store cannot commit, the registry
    is put back."""
    around: AbstractContextManager[Any]
    around = nullcontext() if registry is None else registry.transaction()
    with around, store.transaction():
        yield


def _reregister(
    store: Any,
    registry: Any,
    beliefs: Sequence[Any],
    belief_id: str,
    delta: LowRankDelta,
    metadata: dict[str, Any],
) -> dict[str, int]:
    """The sources leave the registry, the merged delta joins; by how much each map gained."""
    names = sorted({name for own in beliefs for name in own.delta.factors})
    before = registry.capacity(names)
    for source in beliefs:
        if source.id in registry:
            registry.unregister(source.id)
    prompts = [prompt for row in metadata[FACTS] for prompt in (row["prompt"], *row["paraphrases"])]
    moments = None
    if prompts:
        moments = prompt_moments(store.model, store.tokenizer, list(delta.factors), prompts)
    registry.register(belief_id, delta, moments)
    after = registry.capacity(names)
    return {name: after[name] - before[name] for name in names}
