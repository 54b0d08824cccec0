"""How likely an answer is right, from how it came about: a calibrated logistic regression."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .abstention import OperatingPoint, is_stale, operating_point
from .errors import ValidationError

FEATURES = (
    "best_similarity",
    "margin",
    "routed",
    "coherence",
    "coverage",
    "validation",
    "first_token_kl",
)
_FORMAT = "gravity-confidence/1"
_FOLDS = 5
_NEWTON_STEPS = 100


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a right case scores above a wrong one; equal scores count half.

    Raises:
        ValidationError: lists of unequal length, or only one kind of case.
    """
    positive = [s for s, ok in _pairs("auroc", scores, labels) if ok]
    negative = [s for s, ok in zip(scores, labels, strict=True) if not ok]
    if not positive or not negative:
        raise ValidationError("auroc: expected right and wrong cases, got only one kind")
    below = torch.tensor(sorted(negative), dtype=torch.float64)
    at = torch.tensor(positive, dtype=torch.float64)
    less = torch.searchsorted(below, at).sum()
    not_more = torch.searchsorted(below, at, right=True).sum()
    return float(less + not_more) / 2 / (len(positive) * len(negative))


def expected_calibration_error(
    probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10
) -> float:
    """Mean distance between confidence and accuracy over `bins` of equal width, weighted by cases.

    (Guo et al., 2017, equation 5.) A probability of exactly 1 is in the last bin.
    """
    pairs = _pairs("expected_calibration_error", probabilities, labels)
    total = 0.0
    for number in range(bins):
        inside = [(p, ok) for p, ok in pairs if min(int(p * bins), bins - 1) == number]
        total += abs(math.fsum(p for p, _ in inside) - sum(bool(ok) for _, ok in inside))
    return total / len(pairs)


@dataclass(frozen=True)
class ConfidenceQuality:
    """How good a confidence is, on cases that it was not fitted to.

    Attributes:
        auroc: NaN where the cases are of one kind.
        ece: expected calibration error, 10 bins.
        brier: mean squared distance to the outcome.
        cases, right: how many.
    """

    auroc: float
    ece: float
    brier: float
    cases: int
    right: int


def confidence_quality(probabilities: Sequence[float], labels: Sequence[bool]) -> ConfidenceQuality:
    """AUROC, ECE and Brier score of `probabilities`."""
    pairs = _pairs("confidence_quality", probabilities, labels)
    right = sum(bool(ok) for ok in labels)
    return ConfidenceQuality(
        auroc=auroc(probabilities, labels) if 0 < right < len(pairs) else math.nan,
        ece=expected_calibration_error(probabilities, labels),
        brier=math.fsum((p - bool(ok)) ** 2 for p, ok in pairs) / len(pairs),
        cases=len(pairs),
        right=right,
    )


@dataclass(frozen=True)
class ConfidenceModel:
    """Logistic regression on named features, and the threshold below which answers are uncertain.

    Attributes:
        names: of the features, in the order of `weights`.
        mean, scale: that features are standardised by.
        weights, intercept: of the standardised features.
        point: threshold for the target precision, chosen on predictions of cases left out.
        quality: of those predictions.
        target: precision that was asked for.
        beliefs: `<id>-v<version>` of what the store held.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    point: OperatingPoint
    quality: ConfidenceQuality
    target: float
    beliefs: tuple[str, ...]

    @classmethod
    def fit(
        cls,
        features: Sequence[Mapping[str, float]],
        labels: Sequence[bool],
        *,
        seed: int = 0,
        penalty: float = 1.0,
        precision: float = 0.95,
        beliefs: Iterable[str] = (),
        names: Sequence[str] = FEATURES,
    ) -> ConfidenceModel:
        """Fit to cases with their outcome.

        Quality and threshold come from five folds, each predicted by a model of the other four.

        Args:
            features: of each case, by name; others than `names` are ignored.
            labels: whether the answer was right.
            seed: of the folds. The fit itself has no chance in it.
            penalty: `penalty / 2 |w|^2` is added to the summed log loss; not for the intercept.
            precision: of the answers that are not uncertain, the share to be right.
            beliefs: `<id>-v<version>` of the store's, to tell later whether it changed.

        Raises:
            ValidationError: fewer than two cases of a kind, a missing or infinite feature.
        """
        X, y = _matrix(features, names), torch.tensor([bool(x) for x in labels]).double()
        if len(X) != len(y) or min(int(y.sum()), int((1 - y).sum())) < 2:
            raise ValidationError(
                f"ConfidenceModel.fit: expected at least two right and two wrong cases, got "
                f"{int(y.sum())} right of {len(y)} labels for {len(X)} cases"
            )
        held_out = torch.empty_like(y)
        fold = _folds(y, seed)
        for number in range(int(fold.max()) + 1):
            out = fold == number
            held_out[out] = _predict(X[out], *_logistic(X[~out], y[~out], penalty))
        mean, scale, weights, intercept = _logistic(X, y, penalty)
        guesses, outcomes = held_out.tolist(), [bool(x) for x in y]
        return cls(
            names=tuple(names),
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            weights=tuple(weights.tolist()),
            intercept=intercept,
            point=operating_point(guesses, outcomes, precision),
            quality=confidence_quality(guesses, outcomes),
            target=precision,
            beliefs=tuple(beliefs),
        )

    def predict(self, features: Mapping[str, float]) -> float:
        """Probability, in (0, 1), that the answer is right."""
        row = _matrix([features], self.names)
        mean, scale, weights = map(_vector, (self.mean, self.scale, self.weights))
        return float(_predict(row, mean, scale, weights, self.intercept))

    def uncertain(self, probability: float) -> bool:
        """Whether it is below the threshold."""
        return probability < self.point.threshold

    def is_stale(self, beliefs: Iterable[str]) -> bool:
        """Whether more than a tenth of the beliefs changed since the fit."""
        return is_stale(self.beliefs, beliefs)

    def to_json(self) -> dict[str, Any]:
        """Plain values, NaN as null."""
        return {"format": _FORMAT, **_without_nan(asdict(self))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ConfidenceModel:
        """The inverse of `to_json`.

        Raises:
            ValidationError: another format, or fields that are missing or too many.
        """
        fields = dict(values)
        if fields.pop("format", None) != _FORMAT:
            raise ValidationError(f"confidence model: expected the format {_FORMAT}")
        try:
            point, quality = (_with_nan(fields.pop(name)) for name in ("point", "quality"))
            plain: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items()
            }
            model = cls(
                point=OperatingPoint(**point), quality=ConfidenceQuality(**quality), **plain
            )
            sizes = {len(x) for x in (model.names, model.mean, model.scale, model.weights)}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValidationError(f"confidence model: wrong fields ({error})") from error
        if len(sizes) != 1:
            raise ValidationError("confidence model: expected as many weights as features")
        return model

    @classmethod
    def load(cls, path: str | Path) -> ConfidenceModel:
        """From a file of JSON."""
        return cls.from_json(json.loads(Path(path).read_text("utf-8")))


def _matrix(features: Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    try:
        rows = [[float(case[name]) for name in names] for case in features]
    except KeyError as error:
        raise ValidationError(
            f"confidence: expected the features {', '.join(names)}, got a case without {error}"
        ) from error
    matrix = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names))
    if not matrix.isfinite().all():
        raise ValidationError("confidence: expected finite features, got NaN or an infinity")
    return matrix


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _folds(y: Tensor, seed: int) -> Tensor:
    """Number of the fold of every case `[n]`; each fold has its share of right and wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    count = min(_FOLDS, int(y.sum()), int((1 - y).sum()))
    fold = torch.empty(len(y), dtype=torch.long)
    for kind in (0, 1):
        where = (y == kind).nonzero()[:, 0]
        shuffled = where[torch.randperm(len(where), generator=generator)]
        fold[shuffled] = torch.arange(len(where)) % count
    return fold


def _logistic(X: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean, scale, weights and intercept by Newton's method, halving steps that do not descend."""
    mean, scale = X.mean(0), X.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    design = torch.cat([(X - mean) / scale, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    ridge = torch.full((design.shape[1],), float(penalty), dtype=X.dtype)
    # A hair on the intercept too: of cases that can be told apart fully it would have no end.
    ridge[-1] = 1e-6
    theta = torch.zeros(design.shape[1], dtype=X.dtype)
    for _ in range(_NEWTON_STEPS):
        p = (design @ theta).sigmoid()
        gradient = design.T @ (p - y) + ridge * theta
        curvature = (design * (p * (1 - p))[:, None]).T @ design + ridge.diag()
        step = torch.linalg.solve(curvature, gradient)
        loss = _loss(design, y, ridge, theta)
        while step.abs().max() > 1e-12 and _loss(design, y, ridge, theta - step) > loss:
            step = step / 2
        theta = theta - step
        if step.abs().max() <= 1e-10:
            break
    return mean, scale, theta[:-1], float(theta[-1])


def _loss(design: Tensor, y: Tensor, ridge: Tensor, theta: Tensor) -> Tensor:
    z = design @ theta
    return (torch.nn.functional.softplus(z) - y * z).sum() + (ridge * theta.square()).sum() / 2


def _predict(X: Tensor, mean: Tensor, scale: Tensor, weights: Tensor, intercept: float) -> Tensor:
    return (((X - mean) / scale) @ weights + intercept).sigmoid()


def _pairs(name: str, scores: Sequence[float], labels: Sequence[bool]) -> list[tuple[float, bool]]:
    if len(scores) != len(labels) or not scores:
        raise ValidationError(
            f"{name}: expected as many scores as labels and at least one, got {len(scores)} and "
            f"{len(labels)}"
        )
    return list(zip(scores, labels, strict=True))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _with_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in fields.items()}
