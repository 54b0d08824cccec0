"""How well a router finds facts, on queries that it was not given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ValidationError
from .routing import Hit, Router
from .statistics import Rate, rate

_RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class RoutedQuery:
    """One query and what became of it.

    Attributes:
        text: of the query; key: the belief it is about, None for one about no belief.
        rank: of that belief among all, from 1, whatever the threshold; None without one.
        score: of the best belief.
        routed: keys that reach the threshold, best first, at most `top_k`.
    """

    text: str
    key: str | None
    rank: int | None
    score: float
    routed: tuple[str, ...]


@dataclass(frozen=True)
class RoutingReport:
    """Rates with Wilson's 95 % intervals.

    Attributes:
        encoder: of the router; beliefs: how many it chooses among.
        threshold: that it routes above.
        top1: known queries whose best belief is the right one, whatever it scores.
        recall: share of the known queries with the right belief among the `k` best, by `k`.
        mrr: mean of `1 / rank` over the known queries.
        activated: known queries that are routed to the right belief, among others or not.
        first_right: known queries whose first routed belief is the right one.
        relation_precision, domain_precision: of the beliefs that known queries are routed to, the
            share that is of the right relation and of the right domain.
        relation_chance, domain_chance: the same of beliefs drawn blindly.
        false_activation: unknown queries that are routed to anything.
        precision: of the queries of both kinds that are routed, those whose first belief is right.
        items: every query.
    """

    encoder: str
    beliefs: int
    threshold: float
    top1: Rate
    recall: dict[int, Rate]
    mrr: float
    activated: Rate
    first_right: Rate
    relation_precision: Rate
    domain_precision: Rate
    relation_chance: float
    domain_chance: float
    false_activation: Rate
    precision: Rate
    items: tuple[RoutedQuery, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, NaN as null; `recall` by the number as text."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = _plain(value)
        values["recall"] = {str(k): _plain(share) for k, share in self.recall.items()}
        values["items"] = [vars(item) | {"routed": list(item.routed)} for item in self.items]
        return values


def routing_report(
    router: Router, known: Sequence[tuple[str, str]], unknown: Sequence[str] = ()
) -> RoutingReport:
    """Route queries and count.

    Args:
        router: calibrated, or with a threshold. Calibrate it on other queries than these.
        known: texts with the key of the belief that they are about.
        unknown: texts about no belief.

    Raises:
        ValidationError: no known queries, or a key that the router cannot find.
    """
    index = router.index
    categories = {belief.key: belief.category for belief in index.beliefs if belief.texts}
    missing = sorted({key for _, key in known} - categories.keys())
    if missing or not known:
        raise ValidationError(
            "routing_report: expected known queries as (text, key of a belief), got "
            + (f"the unknown key {missing[0]!r}" if missing else "none")
        )
    queries = [*known, *((text, None) for text in unknown)]
    threshold = router.threshold_value
    ranked = router.rank([text for text, _ in queries])
    items = [_item(*pair, router.top_k, threshold) for pair in zip(queries, ranked, strict=True)]
    about, foreign = items[: len(known)], items[len(known) :]
    ranks = [item.rank for item in about if item.rank is not None]
    relations = [(categories[x.key], categories[key]) for x in about if x.key for key in x.routed]
    fired = [item for item in items if item.routed]
    truths = [categories[key] for _, key in known]
    every = list(categories.values())
    return RoutingReport(
        encoder=router.encoder,
        beliefs=len(categories),
        threshold=threshold,
        top1=rate(r == 1 for r in ranks),
        recall={k: rate(r <= k for r in ranks) for k in _RECALL_AT},
        mrr=math.fsum(1 / r for r in ranks) / len(ranks),
        activated=rate(item.key in item.routed for item in about),
        first_right=rate(item.routed[:1] == (item.key,) for item in about),
        relation_precision=rate(a == b for a, b in relations),
        domain_precision=rate(_domain(a) == _domain(b) for a, b in relations),
        relation_chance=_chance(truths, every),
        domain_chance=_chance(list(map(_domain, truths)), list(map(_domain, every))),
        false_activation=rate(bool(item.routed) for item in foreign),
        precision=rate(item.routed[0] == item.key for item in fired),
        items=tuple(items),
    )


def _item(
    query: tuple[str, str | None], ranked: list[Hit], top_k: int, threshold: float
) -> RoutedQuery:
    text, key = query
    keys = [hit.key for hit in ranked]
    routed = tuple(hit.key for hit in ranked[:top_k] if hit.score >= threshold)
    rank = keys.index(key) + 1 if key is not None else None
    return RoutedQuery(text, key, rank, ranked[0].score, routed)


def _domain(category: str) -> str:
    return category.partition("/")[0]


def _chance(truths: Sequence[str], every: Sequence[str]) -> float:
    """Mean over queries of the share of beliefs that are of their kind."""
    return math.fsum(every.count(truth) / len(every) for truth in truths) / len(truths)


def _plain(value: Any) -> Any:
    if isinstance(value, Rate):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return None if isinstance(value, float) and math.isnan(value) else value
