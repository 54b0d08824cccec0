"""Which beliefs a text is about: one decision for each text, by fact."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .abstention import OperatingPoint, is_stale, operating_point
from .errors import ValidationError
from .routing_index import RoutingIndex, build_index, indexed_texts, make_scorer

_FORMAT = "gravity-router/1"


class Hit(NamedTuple):
    """A belief that a text may be about."""

    key: str
    score: float


class Decision(NamedTuple):
    """What one text is routed to.

    Attributes:
        hits: the beliefs, best first; none where nothing is near.
        ids: of those beliefs.
        nearest: scores of the two nearest beliefs, routed or not.
    """

    hits: list[Hit]
    ids: list[str]
    nearest: list[float]


@dataclass(frozen=True)
class RouterCalibration:
    """The threshold of a router and the queries' outcome that it comes from.

    Attributes:
        encoder: name of the router's encoder; scores of another one mean something else.
        subjects: whether texts had to name a subject; without, scores mean something else too.
        target: precision that was asked for.
        point: threshold, precision and recall on the queries it was calibrated on.
        known, unknown: numbers of queries about a belief and about none.
        false_activations: of the unknown queries, how many still reach the threshold.
        beliefs: `<id>-v<version>` of what the store held.
    """

    encoder: str
    target: float
    point: OperatingPoint
    known: int
    unknown: int
    false_activations: int
    beliefs: tuple[str, ...]
    subjects: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values. A precision of nothing kept is null."""
        point = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in dataclasses.asdict(self.point).items()
        }
        return {"format": _FORMAT, **dataclasses.asdict(self), "point": point}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RouterCalibration:
        """The inverse of `to_json`.

        Raises:
            ValidationError: another format, or fields that are missing or too many.
        """
        fields = dict(values)
        if fields.pop("format", None) != _FORMAT:
            raise ValidationError(f"router calibration: expected the format {_FORMAT}")
        try:
            point: dict[str, Any] = {
                name: math.nan if value is None else value
                for name, value in fields.pop("point").items()
            }
            fields["beliefs"] = tuple(fields["beliefs"])
            return cls(point=OperatingPoint(**point), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValidationError(f"router calibration: wrong fields ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> RouterCalibration:
        """From a file of JSON."""
        return cls.from_json(json.loads(Path(path).read_text("utf-8")))


class Router:
    """Routes each text to the beliefs it is about.

    A belief scores by its nearest indexed text, and below 0 where that text names the fact's
    subject and the query does not. What is routed are the `top_k` best that reach the
    threshold, with a weight of 1 each, as they were trained. The index follows the store: a belief
    that was removed is never routed, one that was added is found at once.

    Args:
        store: beliefs, `store.model` and `store.tokenizer`.
        encoder: `"hidden:quarter"` (or `mid`, `last`, a number of layers) for states of the base
            model; as baselines `"tfidf"`, `"untrained"` (the same with fresh weights, and 0 layers
            unless it says how many) and `"majority"`; or a callable from a list of texts to vectors
            `[n, d]`, such as a SentenceTransformer.
        top_k: most beliefs a text is routed to.
        threshold: lowest score; `"calibrated"` takes that of `calibrate`.
        pooling: see `HiddenStates`.
        shrinkage: see `Whitening`.
        texts_of: the texts a belief is found by; `indexed_texts` if not given.
        subjects: whether a text has to name the subject of a belief, word for word, to be near it.
            `"majority"` looks at no text, and at no subject.

    Raises:
        ValidationError: an unknown encoder, a `top_k` below 1, a threshold of another kind.
    """

    def __init__(
        self,
        store: Any,
        encoder: str | Callable[..., Any] = "hidden:quarter",
        *,
        top_k: int = 5,
        threshold: str | float = "calibrated",
        pooling: str = "content",
        shrinkage: float = 0.1,
        texts_of: Callable[[Any], Sequence[str]] = indexed_texts,
        subjects: bool = True,
        calibration: RouterCalibration | None = None,
    ) -> None:
        if top_k < 1:
            raise ValidationError(f"Router.top_k: expected at least 1, got {top_k!r}")
        if isinstance(threshold, str) and threshold != "calibrated":
            raise ValidationError(
                f"Router.threshold: expected calibrated or a number, got {threshold!r}"
            )
        self.store, self.top_k, self.threshold = store, top_k, threshold
        self.encoder = encoder if isinstance(encoder, str) else type(encoder).__name__
        self._scorer = make_scorer(encoder, store, pooling=pooling, shrinkage=shrinkage)
        self._texts_of = texts_of
        self.subjects = subjects and encoder != "majority"
        self._index: RoutingIndex | None = None
        self._lock = threading.Lock()
        self._calibration: RouterCalibration | None = None
        if calibration is not None:
            self.calibration = calibration

    @property
    def index(self) -> RoutingIndex:
        """Of the store's present revision."""
        with self._lock:
            if self._index is None or self._index.revision != self.store.revision:
                self._index = build_index(
                    self.store, self._scorer, self._texts_of, self._index, subjects=self.subjects
                )
                # What is known of the old texts is worth keeping for the next index.
                self._scorer = self._index.scorer or self._scorer
            return self._index

    @property
    def calibration(self) -> RouterCalibration | None:
        """What `calibrate` found; set it to use one that was kept."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: RouterCalibration) -> None:
        if calibration.encoder != self.encoder:
            raise ValidationError(
                f"router calibration: expected one of the encoder {self.encoder}, got one of "
                f"{calibration.encoder}. Calibrate this router"
            )
        if calibration.subjects != self.subjects:
            raise ValidationError(
                f"router calibration: expected one with subjects={self.subjects}, got one with "
                f"subjects={calibration.subjects}. Calibrate this router"
            )
        self._calibration = calibration

    @property
    def threshold_value(self) -> float:
        """The lowest score that is routed.

        Raises:
            ValidationError: it is to be the calibrated one, and there is none.
        """
        if not isinstance(self.threshold, str):
            return float(self.threshold)
        if self._calibration is None:
            raise ValidationError(
                "Router: expected a calibrated threshold, got none yet. Call "
                "calibrate(known, unknown), set calibration, or pass threshold=<a score>"
            )
        return self._calibration.point.threshold

    @property
    def stale(self) -> bool:
        """Whether more than a tenth of the beliefs changed since the calibration."""
        return self._calibration is not None and is_stale(
            self._calibration.beliefs, self.index.versions
        )

    def rank(self, texts: Sequence[str], limit: int | None = None) -> list[list[Hit]]:
        """Of every text the beliefs, best first, whatever they score; ties by key."""
        index = self.index
        return [_ranked(index, text, limit) for text in _checked(texts)]

    def decide(self, texts: Sequence[str]) -> list[Decision]:
        """Of every text what it is routed to, all from one revision of the store.

        Raises:
            ValidationError: the threshold is to be the calibrated one, and there is none.
        """
        threshold, index = self.threshold_value, self.index
        ids = {belief.key: belief.id for belief in index.beliefs}
        decisions = []
        for text in _checked(texts):
            ranked = _ranked(index, text, max(2, self.top_k))
            hits = [hit for hit in ranked[: self.top_k] if hit.score >= threshold]
            nearest = [hit.score for hit in ranked[:2]]
            decisions.append(Decision(hits, [ids[hit.key] for hit in hits], nearest))
        return decisions

    def route(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Of every text the beliefs it is routed to, best first; none where nothing is near."""
        return [decision.hits for decision in self.decide(texts)]

    def rows(self, texts: Sequence[str]) -> list[list[str]]:
        """The ids for `DeltaBank.routed`, one list for each text."""
        return [decision.ids for decision in self.decide(texts)]

    def score(self, text: str, ids: Sequence[str]) -> list[float]:
        """Of beliefs by id, how near `text` is to each; 0 for one that nothing can find."""
        index = self.index
        names = [belief.id for belief in index.beliefs]
        scores = dict(zip(names, index.scores(text).tolist(), strict=True))
        return [s if (s := scores.get(name, 0.0)) > -math.inf else 0.0 for name in ids]

    def calibrate(
        self,
        known: Sequence[tuple[str, str]],
        unknown: Sequence[str],
        precision: float = 0.95,
    ) -> RouterCalibration:
        """Find the threshold above which the best belief is the right one as often as asked.

        Args:
            known: queries with the key they are about; prompts that were not indexed.
            unknown: queries about no belief of the store.
            precision: share of the queries that reach the threshold whose best belief is right.
        """
        _check_known(known, self.index)
        queries = [text for text, _ in known] + list(unknown)
        truths = [key for _, key in known] + [None] * len(unknown)
        best = [hits[0] for hits in self.rank(queries, 1)]
        right = [hit.key == truth for hit, truth in zip(best, truths, strict=True)]
        point = operating_point([hit.score for hit in best], right, precision)
        false = sum(hit.score >= point.threshold for hit in best[len(known) :])
        self._calibration = RouterCalibration(
            encoder=self.encoder,
            target=precision,
            point=point,
            known=len(known),
            unknown=len(unknown),
            false_activations=false,
            beliefs=self.index.versions,
            subjects=self.subjects,
        )
        return self._calibration


def _ranked(index: RoutingIndex, text: str, limit: int | None) -> list[Hit]:
    scored = zip(index.beliefs, index.scores(text).tolist(), strict=True)
    hits = [Hit(belief.key, score) for belief, score in scored if belief.texts]
    # They are in the order of their keys, and sorting keeps that among equal scores.
    return sorted(hits, key=lambda hit: -hit.score)[:limit]


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValidationError("Router: expected a list of texts, got one text. Put it in a list")
    return texts


def _check_known(known: Sequence[tuple[str, str]], index: RoutingIndex) -> None:
    missing = sorted({key for _, key in known} - set(index.keys))
    if missing or not known:
        raise ValidationError(
            "Router.calibrate: expected known queries as (text, key of a belief in the store), got "
            + (f"the unknown key {missing[0]!r}" if missing else "none")
        )
