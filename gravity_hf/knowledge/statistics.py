"""How sure a measured share, median or difference is.

Everything here is of the textbook, in float64 and without scipy. Results are named tuples, so that
`_asdict()` gives what goes into a JSON file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

# Resampled numbers that are held at once: 32 MB.
_AT_ONCE = 1 << 22


class Rate(NamedTuple):
    """A share of successes with its Wilson interval."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float


class McNemar(NamedTuple):
    """What pairs disagree on, and how likely so uneven a split is if both are equally good."""

    only_first: int
    only_second: int
    p_value: float


class Estimate(NamedTuple):
    """A number with an interval around it."""

    value: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """The mean of `first - second` over pairs, its standard error and Student's interval."""

    pairs: int
    mean: float
    standard_error: float
    low: float
    high: float


class Spread(NamedTuple):
    """A number as it came out of several seeds."""

    seeds: int
    mean: float
    lowest: float
    highest: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (E. B. Wilson, 1927).

    Of no trials it is (0, 1): nothing is known.

    Raises:
        ValueError: more successes than trials, a negative count, a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if not 0 <= successes <= trials:
        raise ValueError(
            f"wilson_interval: expected 0 <= successes <= trials, got {successes} of {trials}"
        )
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, square = successes / trials, z * z / trials
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    # At both ends the interval reaches the end exactly; rounding must not move it off.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def rate(outcomes: Iterable[bool], confidence: float = 0.95) -> Rate:
    """The share of true outcomes with Wilson's interval. Of none, the share is NaN."""
    flags = [bool(x) for x in outcomes]
    hits, trials = sum(flags), len(flags)
    low, high = wilson_interval(hits, trials, confidence)
    return Rate(hits, trials, hits / trials if trials else math.nan, low, high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact two-sided test of paired outcomes (Q. McNemar, 1947).

    Pairs that agree say nothing; of the others, a binomial with share 1/2 is expected.

    Raises:
        ValueError: sequences of different lengths.
    """
    pairs = _pairs("mcnemar", first, second)
    only_first = sum(bool(a) and not b for a, b in pairs)
    only_second = sum(bool(b) and not a for a, b in pairs)
    n = only_first + only_second
    # In whole numbers, so that it holds for thousands of pairs.
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def bootstrap_median(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """The median with a percentile bootstrap interval (B. Efron, 1979). Same seed, same numbers.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    _check_confidence(confidence)
    x = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"bootstrap_median: expected finite values, got {list(values)[:5]!r} ...")
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // len(x))
    medians = torch.cat(
        [
            _medians(x[torch.randint(len(x), (rows, len(x)), generator=generator)])
            for rows in _pieces(resamples, at_once)
        ]
    )
    edge = (1 - confidence) / 2
    low, high = medians.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return Estimate(float(_medians(x[None])[0]), low, high)


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> PairedDifference:
    """How much larger `first` is than `second`, item by item, with Student's t interval.

    Of a single pair nothing is known about the spread: standard error and interval are infinite.

    Raises:
        ValueError: sequences of different lengths, or of no items.
    """
    _check_confidence(confidence)
    pairs = _pairs("paired_difference", first, second)
    if not pairs:
        raise ValueError("paired_difference: expected at least one pair, got none")
    differences = [float(a) - float(b) for a, b in pairs]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return PairedDifference(1, mean, math.inf, -math.inf, math.inf)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt(variance / n)
    half = student_quantile(confidence, n - 1) * error
    return PairedDifference(n, mean, error, mean - half, mean + half)


def spread(values: Sequence[float]) -> Spread:
    """Mean, lowest and highest of what the seeds gave.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("spread: expected at least one value, got none")
    return Spread(len(values), math.fsum(values) / len(values), min(values), max(values))


def student_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence, of Student's distribution with whole degrees of freedom.

    Raises:
        ValueError: a confidence outside (0, 1), or fewer than one degree of freedom.
    """
    _check_confidence(confidence)
    if degrees < 1:
        raise ValueError(f"student_quantile: expected degrees >= 1, got {degrees}")
    # The distribution in terms of the angle atan(t / sqrt(degrees)), which is bounded.
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within_angle(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within_angle(angle: float, degrees: int) -> float:
    """P(|T| <= t) as the finite sum over powers of the cosine (Abramowitz and Stegun 26.7.3-4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total


def _medians(rows: Tensor) -> Tensor:
    """Of each row; of an even number the mean of the two in the middle."""
    ordered = rows.sort(-1).values
    n = rows.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def _pieces(total: int, at_once: int) -> list[int]:
    whole, rest = divmod(total, at_once)
    return [at_once] * whole + ([rest] if rest else [])


def _pairs(name: str, first: Sequence, second: Sequence) -> list[tuple]:
    if len(first) != len(second):
        raise ValueError(
            f"{name}: expected pairs, got {len(first)} and {len(second)} items; give both of the "
            "same items in the same order"
        )
    return list(zip(first, second, strict=True))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence!r}")
