"""How much of dense attention a choice of keys keeps, beside choices that cost as much."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.sparse import KeyBudget, select_keys, selection_statistics
from .sparse_forward import SparseCall
from .sparse_settings import SparseSettings

# Width of the random vectors that choose by lot.
_LOT_WIDTH = 8


class Recall(NamedTuple):
    """Of the weights of dense attention the share on chosen keys, mean over layers, heads and
    queries. Chosen by the model's own `screening`; and as many by queries and keys themselves
    (`keys`), the last ones and the sinks alone (`window`), blocks by lot (`random`).

    `pairs`: the share of causal pairs that the exact pass computes; `cost`: that and the model's
    screening, in the same unit.
    """

    screening: float
    keys: float
    window: float
    random: float
    pairs: float
    cost: float

    @classmethod
    def mean(cls, recalls: list[Recall]) -> Recall:
        return cls(*(sum(values) / len(recalls) for values in zip(*recalls, strict=True)))


class RecallObserver:
    """Watches one attention module. `settings` None: the module's own."""

    def __init__(self, settings: SparseSettings | None, rows: int, seed: int) -> None:
        self.settings, self.rows, self.seed = settings, rows, seed
        self._seen: list[Tensor] = []

    def see(self, call: SparseCall) -> None:
        settings = self.settings or call.settings
        budget = settings.budget
        wide = replace(budget, window=budget.top_k - budget.sinks)
        lot = _by_lot(call, torch.Generator(call.query.device).manual_seed(self.seed))
        themselves = (call.query, call.key)
        own = themselves
        if settings.has_projections:
            own = call.module.screening(*themselves)  # type: ignore[operator]
        width = own[1].shape[-1]
        chosen = self._statistics(call, own, budget, width)
        others = [
            self._statistics(call, pair, size, None)[0]
            for pair, size in ((themselves, budget), (themselves, wide), (lot, budget))
        ]
        self._seen.append(torch.stack([chosen[0], *others, *chosen[1:]]).double())

    def _statistics(
        self,
        call: SparseCall,
        screen: tuple[Tensor, Tensor],
        budget: KeyBudget,
        width: int | None,
    ) -> list[Tensor]:
        """Mean recall, pair fraction, cost fraction; of the same rows each time."""
        chosen = select_keys(*screen, budget, metric=call.score.metric, mask=call.mask)
        found = selection_statistics(
            call.query,
            call.key,
            call.score,
            chosen,
            screen_dim=width,
            rows=self.rows,
            generator=torch.Generator(call.query.device).manual_seed(self.seed),
        )
        return [found.recall.mean(), found.pair_fraction, found.cost_fraction]

    def recall(self) -> Recall:
        if not self._seen:
            raise ValueError("measure_screening: expected batches that reach every sparse layer")
        return Recall(*torch.stack(self._seen).mean(0).tolist())


def _by_lot(call: SparseCall, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Screening vectors that have nothing to do with what they stand for."""
    made = [
        torch.randn(
            *x.shape[:3], _LOT_WIDTH, generator=generator, device=x.device, dtype=torch.float32
        )
        for x in (call.query, call.key)
    ]
    return made[0], made[1]
