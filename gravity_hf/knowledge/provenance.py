"""Where an answer comes from and how far to trust it, recorded while it is generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .abstention import AbstainBelow
from .bank import DeltaBank
from .components import mean_pair_score
from .confidence import ConfidenceModel
from .errors import ValidationError
from .provenance_record import Provenance, Source, provenance_of
from .recording import Recording, RowPlan, WatchedRow
from .routing import Router
from .targets import base_model

__all__ = ["Provenance", "ProvenanceRecorder", "Source", "provenance_of"]

_Chosen = tuple[list[str], list[float], list[float]]


class ProvenanceRecorder:
    """Routes prompts, lets `generate` run, and says afterwards what each answer rests on.

        recorder = ProvenanceRecorder(store, bank, router, calibration)
        with recorder.routed(prompts):
            model.generate(**inputs, logits_processor=[recorder.processor()],
                           stopping_criteria=[recorder.abstain()])
        recorder.results

    The scores of the generation stay as they are, bit for bit: what the sources do is computed
    beside it, on a cache of its own. Each thread has its own recording.

    Args:
        store: beliefs, `store.model` and `store.tokenizer`.
        bank: with the deltas of the store's beliefs; `store.compile_bank()` if not given.
        router: needed for prompts that come without the beliefs to use.
        calibration: a `ConfidenceModel`, or the path of its file.
        every: look at every n-th token of an answer after the first; 0: at the first only.
    """

    def __init__(
        self,
        store: Any,
        bank: DeltaBank | None = None,
        router: Router | None = None,
        calibration: ConfidenceModel | str | Path | None = None,
        *,
        every: int = 0,
    ) -> None:
        if every < 0:
            raise ValidationError(f"ProvenanceRecorder.every: expected 0 or more, got {every!r}")
        if isinstance(calibration, str | Path):
            calibration = ConfidenceModel.load(calibration)
        self.store, self.router, self.calibration, self.every = store, router, calibration, every
        self.bank = store.compile_bank() if bank is None else bank
        self._local = threading.local()

    @contextmanager
    def routed(
        self,
        prompts: Sequence[str] | None = None,
        *,
        rows: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[None]:
        """Model calls inside use the beliefs of each prompt, for one `generate`.

        Args:
            prompts: texts to route by, one for each row of the batch.
            rows: ids of the beliefs to use instead, one list for each row; with `prompts` too, the
                router scores them.

        Raises:
            ValidationError: neither prompts nor rows, unequal numbers of both, prompts without a
                router, ids that are not of active beliefs.
        """
        beliefs = {belief.id: belief for belief in map(self.store.get, self.store.keys())}
        chosen = self._chosen(prompts, rows)
        missing = sorted({i for ids, _, _ in chosen for i in ids} - beliefs.keys())
        if missing:
            raise ValidationError(
                f"provenance: expected ids of active beliefs, got {missing[0]!r}. It was removed "
                "or updated; route again"
            )
        plans = [self._plan(*row) for row in chosen]
        self._local.current = _Watched(self._new_recording(plans), beliefs)
        with self.bank.routed([list(plan.ids) for plan in plans]):
            yield

    def processor(self, attention_mask: Tensor | None = None) -> Recording:
        """For `generate`'s `logits_processor`.

        Args:
            attention_mask: `[B, T]` of the prompts. Without it, leading padding tokens
                are taken for padding: right unless a prompt itself begins with that token.
        """
        recording = self._current().recording
        recording.attention_mask = attention_mask
        return recording

    def abstain(self, below: float | None = None) -> AbstainBelow:
        """For `generate`'s `stopping_criteria`: rows of too low a confidence stop after one token.

        Args:
            below: confidence to stop below; None: the calibrated threshold.

        Raises:
            ValidationError: the threshold is to be the calibrated one, and there is none.
        """
        if below is None:
            if self.calibration is None:
                raise ValidationError(
                    "provenance.abstain: expected a threshold or a calibration, got neither. Pass "
                    "below=, or give the recorder a ConfidenceModel"
                )
            below = min(1.0, self.calibration.point.threshold)
        watched = self._current()
        return AbstainBelow(lambda: self._judge(watched, below), below)

    @property
    def results(self) -> list[Provenance]:
        """Of the last `routed` of this thread, one for each row that was generated."""
        watched = self._current()
        if not watched.recording.rows:
            raise ValidationError(
                "provenance: expected a generate call inside routed(), got none. Give it "
                "logits_processor=[recorder.processor()]"
            )
        return [self._provenance(watched, row) for row in watched.recording.rows]

    @property
    def result(self) -> Provenance:
        """Of the only row. ValidationError where there are more."""
        results = self.results
        if len(results) != 1:
            raise ValidationError(
                f"provenance.result: expected one row, got {len(results)}. Use results"
            )
        return results[0]

    def _current(self) -> _Watched:
        watched = getattr(self._local, "current", None)
        if watched is None:
            raise ValidationError(
                "provenance: expected a recording, got none in this thread. Use it inside "
                "`with recorder.routed(prompts):`"
            )
        return watched

    def _chosen(
        self, prompts: Sequence[str] | None, rows: Sequence[Sequence[str]] | None
    ) -> list[_Chosen]:
        """Of each row its ids and their scores, best first, and the scores of the nearest two."""
        if prompts is not None and rows is not None and len(rows) != len(prompts):
            raise ValidationError(
                f"provenance.routed: expected as many rows as prompts, got {len(rows)} and "
                f"{len(prompts)}"
            )
        router = self.router
        if rows is not None and (prompts is None or router is None):
            return [(list(row), [1.0] * len(row), [1.0] * min(2, len(row))) for row in rows]
        if prompts is None or router is None:
            raise ValidationError(
                "provenance.routed: expected prompts and a router, or rows of ids, got "
                f"{'no router' if prompts is not None else 'neither'}"
            )
        if rows is not None:
            return [_by_name(router, *pair) for pair in zip(prompts, rows, strict=True)]
        decisions = router.decide(prompts)
        return [(x.ids, [hit.score for hit in x.hits], x.nearest) for x in decisions]

    def _plan(self, ids: list[str], scores: list[float], nearest: list[float]) -> RowPlan:
        pairs = mean_pair_score([self.bank[belief] for belief in ids])
        return RowPlan(tuple(ids), tuple(scores), tuple(nearest), pairs)

    def _new_recording(self, plans: list[RowPlan]) -> Recording:
        model: Any = base_model(self.store.model)
        settings = model.generation_config
        ends = settings.eos_token_id
        pads = (self.store.tokenizer.pad_token_id, settings.pad_token_id)
        return Recording(
            model,
            self.bank,
            plans,
            every=self.every,
            pad_id=next((pad for pad in pads if pad is not None), None),
            end_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        )

    def _judge(self, watched: _Watched, below: float) -> list[float]:
        """The confidence of every row, once it is known; it does not change after that."""
        for row in watched.recording.rows:
            if row.confidence is None:
                row.confidence = self._provenance(watched, row).confidence
                row.abstained = row.confidence < below
        return [row.confidence or 0.0 for row in watched.recording.rows]

    def _provenance(self, watched: _Watched, row: WatchedRow) -> Provenance:
        return provenance_of(
            row.plan,
            row.effects,
            watched.beliefs,
            self.bank,
            self.calibration,
            active=len(watched.beliefs),
            versions=watched.versions,
            abstained=row.abstained,
        )


@dataclass(frozen=True)
class _Watched:
    """One `routed` block: its recording, and the store's beliefs by id as they were."""

    recording: Recording
    beliefs: dict[str, Any]

    @property
    def versions(self) -> list[str]:
        return [f"{belief.id}-v{belief.version}" for belief in self.beliefs.values()]


def _by_name(router: Router, prompt: str, ids: Sequence[str]) -> _Chosen:
    scored = zip(router.score(prompt, ids), ids, strict=True)
    ordered = sorted(scored, key=lambda pair: (-pair[0], pair[1]))
    nearest = [hit.score for hit in router.rank([prompt], 2)[0]]
    return [name for _, name in ordered], [score for score, _ in ordered], nearest
