"""One run of the forge: on a copy of the registry, which becomes the registry at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from .consolidation import FACTS, facts_of
from .encoding import BeliefEncoder, EncodingConfig
from .errors import BudgetError
from .facts import Fact
from .forge_batches import Batch, Candidate
from .forge_results import ForgedDelta, Rejected
from .forge_sharing import Sharing
from .forge_strategies import (
    FREE,
    INTERFERES,
    NO_ROOM,
    NOT_VALID,
    NULL,
    PROJECTED,
    TOO_COSTLY,
    Ladder,
)
from .moments import prompt_moments
from .output_leakage import output_leakage
from .registry import Registry
from .registry_projection import Projector, sliced, softened
from .registry_verdict import CAPACITY, RegistryVerdict
from .targets import in_out_features, target_modules
from .validation import Validation

# Facts of other deltas whose prompts are looked at after each one.
_OTHERS = 32


@dataclass(frozen=True, eq=False)
class ForgeSettings:
    """As `Forge` got them, checked; see there."""

    ladder: Ladder
    encoding: EncodingConfig
    validation: Validation
    sharing: Sharing
    round_size: int
    quiet: float
    penalty: float
    most_attempts: int


class ForgeRun:
    """Trains, judges and, at the end, registers.

    Args:
        text: that deltas must not disturb; None: what the registry has measured counts.

    Attributes:
        forged, rejected: so far; the former are registered by `commit` only.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        registry: Registry,
        settings: ForgeSettings,
        text: Sequence[str] | None,
    ) -> None:
        self.model, self.tokenizer, self.registry = model, tokenizer, registry
        self.settings, self.text = settings, text
        self.shadow = registry.copy()
        self.forged: list[ForgedDelta] = []
        self.rejected: list[Rejected] = []
        self._others = _stored_facts(registry)

    def train(self, batches: Sequence[Batch], progress: bool | None = None) -> None:
        """Train and judge all batches, a round at a time; changes nothing but this run."""
        hidden = None if progress is None else not progress
        with tqdm(total=len(batches), desc="forge", unit="delta", disable=hidden) as bar:
            for start in range(0, len(batches), self.settings.round_size):
                own = list(batches[start : start + self.settings.round_size])
                self._round(own)
                bar.update(len(own))

    def commit(self, domain: str) -> None:
        """Register what was forged, in the store too, all of it or nothing.

        What no longer fits, because another process registered something meanwhile, is rejected.
        """
        ids = self._commit_here(domain) if self.registry.store is None else self._in_store(domain)
        kept = []
        for forged, (belief_id, reason) in zip(self.forged, ids, strict=True):
            if belief_id is None:
                self.rejected.append(Rejected(forged.facts, reason, forged.metrics))
            else:
                kept.append(dataclasses.replace(forged, id=belief_id))
        self.forged = kept

    def _round(self, batches: list[Batch]) -> None:
        """Train side by side, judge in order; those that failed and may try again do so, until
        none is left."""
        while batches:
            for batch in batches:
                self._measure(self._names(batch))
            found = self._side_by_side(batches)
            batches = [b for b, c in zip(batches, found, strict=True) if self._goes_on(b, c)]

    def _side_by_side(self, batches: Sequence[Batch]) -> list[Candidate]:
        projectors = [self._projector(b, i, len(batches)) for i, b in enumerate(batches)]
        return self.settings.sharing.map(
            lambda i: self._trained(batches[i], projectors[i]), len(batches)
        )

    def _goes_on(self, batch: Batch, candidate: Candidate) -> bool:
        """Judge; whether another attempt follows."""
        failure, reason, metrics, verdict = self._judged(batch, candidate)
        batch.note(metrics, failure, reason)
        if not failure:
            self._accept(batch, candidate, metrics, verdict)
            return False
        conflicts = verdict.conflicts if verdict is not None else ()
        following = self.settings.ladder.after(batch.attempt, failure, conflicts)
        if following is None or len(batch.tried) >= self.settings.most_attempts:
            self.rejected.append(batch.rejected())
            return False
        batch.attempt = following
        return True

    def _judged(
        self, batch: Batch, candidate: Candidate
    ) -> tuple[str, str, dict[str, Any], RegistryVerdict | None]:
        """Kind of failure (empty: none), why, what was measured, and the registry's verdict where
        the validation passed."""
        if candidate.delta is None:
            return (*candidate.failure, {}, None)
        validation = self.settings.validation
        metrics = validation.summary(candidate.reports)
        if not (failures := validation.failures(metrics)):
            found = output_leakage(self.model, self.tokenizer, candidate.delta, self._neighbours())
            metrics["kl_others"], metrics["others"] = found.kl, found._asdict()
            failures = validation.failures(metrics)
        if failures:
            return NOT_VALID, "; ".join(failures), metrics, None
        verdict = self.shadow.check(candidate.delta, candidate.moments)
        if verdict.accepted:
            return "", "", metrics, verdict
        kind = NO_ROOM if CAPACITY in verdict.kinds else INTERFERES
        return kind, "; ".join(map(str, verdict.reasons)), metrics, verdict

    def _accept(
        self, batch: Batch, candidate: Candidate, metrics: dict[str, Any], verdict: Any
    ) -> None:
        delta: Any = candidate.delta  # judged, so it is there
        self.shadow.register(batch.key, delta, candidate.moments)
        metrics = {**metrics, "attempts": batch.tried}
        told = verdict.to_dict()
        self.forged.append(
            ForgedDelta(batch.key, batch.key, batch.facts, delta, batch.attempt, metrics, told)
        )
        self._others += batch.facts

    def _trained(self, batch: Batch, projector: Projector | None) -> Candidate:
        """Everything that costs time, and depends on nothing but its arguments."""
        attempt, names = batch.attempt, self._names(batch)
        if projector is not None and attempt.space != FREE:
            full = [name for name in names if self._room(projector, name) < attempt.rank]
            if full:
                reason = f"{full[0]}: fewer than {attempt.rank} input directions are left"
                return Candidate(None, [], {}, (NO_ROOM, reason))
        config = self.settings.encoding.with_changes(rank=attempt.rank, layers=attempt.layers)
        encoder = BeliefEncoder(self.model, self.tokenizer, config, projector)
        try:
            encoded = encoder.encode_together(batch.facts, progress=False)
        except BudgetError as error:
            return Candidate(None, [], {}, (TOO_COSTLY, str(error)))
        prompts = [prompt for fact in batch.facts for prompt in fact.prompts]
        moments = prompt_moments(self.model, self.tokenizer, names, prompts)
        return Candidate(encoded[0].delta, [one.report for one in encoded], moments)

    def _names(self, batch: Batch) -> list[str]:
        return target_modules(self.model, batch.attempt.layers, self.settings.encoding.targets)

    def _room(self, projector: Projector, name: str) -> int:
        into, _ = projector(name)
        features = in_out_features(self.shadow.model.get_submodule(name))[0]
        return features - (0 if into is None else into.shape[1])

    def _projector(self, batch: Batch, part: int, of: int) -> Projector | None:
        """What the batch has to keep clear of; its slice where several train side by side."""
        attempt = batch.attempt
        if attempt.space == NULL:
            against = [key for key in attempt.against if key in self.shadow]
            project = self.shadow.null_space_projector(self.settings.quiet, against)
        elif attempt.space == PROJECTED:
            project = self.shadow.projector
        elif self.settings.penalty:
            return softened(self.shadow.projector, self.settings.penalty)
        else:
            return None
        model = self.shadow.model
        sizes = {n: in_out_features(model.get_submodule(n))[0] for n in self._names(batch)}
        return sliced(project, sizes, part, of)

    def _measure(self, names: Sequence[str]) -> None:
        if self.text is not None:
            self.shadow.measure_generic(self.tokenizer, self.text, names, progress=False)

    def _neighbours(self) -> list[Fact]:
        """Some of the facts that have other deltas, spread evenly over all."""
        step = -(-len(self._others) // _OTHERS) or 1
        return self._others[::step]

    def _commit_here(self, domain: str) -> list[tuple[str | None, str]]:
        with self.registry.transaction():
            self.registry.adopt_generic(self.shadow)
            for forged in self.forged:
                moments = self.shadow[forged.key].moments
                self.registry.register(forged.key, forged.delta, moments)
        return [(forged.key, "") for forged in self.forged]

    def _in_store(self, domain: str) -> list[tuple[str | None, str]]:
        ids = self.settings.sharing.from_main(lambda: self._write(domain))
        if not self.settings.sharing.is_main:
            self.registry.store.reload()
            self.registry.reload()
        return ids

    def _write(self, domain: str) -> list[tuple[str | None, str]]:
        store, registry = self.registry.store, self.registry
        ids: list[tuple[str | None, str]] = []
        # The manifest's renaming comes last: until then nothing has happened.
        with registry.transaction(), store.transaction():
            registry.refresh()
            registry.adopt_generic(self.shadow)
            for forged in self.forged:
                moments = self.shadow[forged.key].moments
                verdict = registry.check(forged.delta, moments)
                if not verdict.accepted:
                    ids.append((None, f"{INTERFERES}: {verdict.error()}"))
                    continue
                metadata = _metadata(forged, domain)
                belief = store.add_delta(forged.key, forged.delta, metadata)
                registry.register(belief.id, forged.delta, moments)
                ids.append((belief.id, ""))
            registry.save()
        return ids


def _metadata(forged: ForgedDelta, domain: str) -> dict[str, Any]:
    return {
        FACTS: [fact.to_row() for fact in forged.facts],
        "source": f"forge:{domain}",
        "domain": domain,
        "attempt": forged.attempt.to_dict(),
        "metrics": forged.metrics,
        "verdict": forged.verdict,
    }


def _stored_facts(registry: Registry) -> list[Fact]:
    """Of the registered beliefs, where there is a store."""
    store = registry.store
    if store is None:
        return []
    own = set(registry.ids)
    beliefs = [store.get(key) for key in sorted(store.keys())]
    return [fact for belief in beliefs if belief.id in own for fact in facts_of(belief)]
