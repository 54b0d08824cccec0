"""Which beliefs a request is answered with, and what they turn out to have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..attribution import Attribution, TokenEffect
from ..bank import DeltaBank
from ..confidence import ConfidenceModel
from ..provenance_record import Provenance, provenance_of
from ..recording import RowPlan
from ..routing import Router
from .snapshot import Snapshot

# Tokens that attribution may read for one answer: one prompt with, without and less each source.
_MOST_ATTRIBUTED = 16_384


@dataclass(frozen=True)
class Selection:
    """The beliefs of one text.

    Attributes:
        ids: of the deltas, best first.
        plan: their scores, and those of the nearest beliefs.
        is_named: whether the client named them.
        revision: of the store that they are from.
    """

    ids: tuple[str, ...]
    plan: RowPlan
    is_named: bool
    revision: int


class Selector:
    """Chooses beliefs by name or by routing, and judges them. Used by the model's thread only.

    Args:
        model: the base.
        bank: deltas of the beliefs.
        router: finds beliefs by text, once it has a threshold.
        confidence: the calibrated model; None: none.
    """

    def __init__(
        self, model: Any, bank: DeltaBank, router: Router, confidence: ConfidenceModel | None
    ) -> None:
        self.model, self.bank, self.router, self.confidence = model, bank, router, confidence

    @property
    def can_route(self) -> bool:
        """Whether texts find beliefs by themselves."""
        router = self.router
        return router.calibration is not None or not isinstance(router.threshold, str)

    def select(self, text: str, names: Sequence[str] | None, store: Snapshot) -> Selection:
        """The beliefs for `text`: those of `names` (keys or ids), or those it is about.

        Raises:
            UnknownKeyError: a name that is not in the store.
        """
        if names is None:
            return self._routed(text, store)
        # One belief asked for by key and by id is one belief.
        ids = tuple(dict.fromkeys(store.find(name).id for name in names))
        scores = tuple(self.router.score(text, ids)) if ids else ()
        nearest = tuple(hit.score for hit in self.router.rank([text], 2)[0]) if ids else ()
        return Selection(ids, RowPlan(ids, scores, nearest), True, store.revision)

    def assess(
        self, selection: Selection, prompt_ids: Sequence[int], store: Snapshot
    ) -> Provenance:
        """What the chosen beliefs do to the first token, and how far to trust the answer."""
        effect = self._effect(selection.ids, prompt_ids)
        return provenance_of(
            selection.plan,
            [] if effect is None else [effect],
            {name: store.find(name) for name in selection.ids},
            self.bank,
            self.confidence,
            active=len(store.beliefs),
            versions=store.versions,
        )

    def _routed(self, text: str, store: Snapshot) -> Selection:
        if not self.can_route or not store.beliefs:
            return Selection((), RowPlan((), (), ()), False, store.revision)
        (decision,) = self.router.decide([text])
        ids, nearest = tuple(decision.ids), tuple(decision.nearest)
        scores = tuple(hit.score for hit in decision.hits)
        return Selection(ids, RowPlan(ids, scores, nearest), False, store.revision)

    def _effect(self, ids: Sequence[str], prompt_ids: Sequence[int]) -> TokenEffect | None:
        variants = 2 + (len(ids) if len(ids) > 1 else 0)
        if not ids or variants * len(prompt_ids) > _MOST_ATTRIBUTED:
            return None
        return Attribution(self.model, self.bank, ids).effect(list(prompt_ids), 0)
