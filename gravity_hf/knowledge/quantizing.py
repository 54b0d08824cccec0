"""Coding a delta in the fewest bits that meet a tier, or refusing to.

Before coding, `B A` is written with factors whose columns are orthogonal and share each singular
value by its root: then an error of either factor counts as much as one of the other, and each
direction counts by its own share of the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .delta import LowRankDelta
from .delta_codec import CODEBOOKS, WIDTHS, FactorCodec
from .errors import QuantizationError
from .low_rank import Pair, decomposed, frobenius, relative_error
from .quantized_delta import SLACK, PrecisionReport, QuantizedDelta, Tier, tier_of
from .quantized_files import serialized
from .subspaces import angle_score, update_spans
from .update_sketch import update_sketch


class Quantized(NamedTuple):
    """A coded delta and what was measured of it."""

    delta: QuantizedDelta
    report: PrecisionReport


class _Exact(NamedTuple):
    """What is coded. balanced: its factors as they are rounded; norms `[maps]` and sketches
    `[maps, 64]` of its updates; embedding: the routing vector, if there is one."""

    delta: LowRankDelta
    balanced: dict[str, Pair]
    norms: Tensor
    sketches: Tensor
    embedding: Tensor | None


class _Measured(NamedTuple):
    """Of one setting. errors: of each map, and of all together."""

    coded: QuantizedDelta
    errors: dict[str, float]
    total: float
    routing_cosine: float | None
    angle: float | None

    @property
    def largest(self) -> float:
        return max(self.errors.values())

    def faults(self, tier: Tier) -> list[str]:
        """What misses the tier, in words."""
        found = []
        if not self.largest <= tier.frobenius:
            worst = max(self.errors, key=self.errors.__getitem__)
            found.append(f"error {self.largest:.4f} at {worst} above {tier.frobenius}")
        elif not (estimate := self.coded.estimated_error()) <= SLACK * tier.frobenius:
            found.append(f"error by sketch {estimate:.4f} above {SLACK * tier.frobenius:.4f}")
        if self.routing_cosine is not None and not self.routing_cosine >= tier.routing_cosine:
            found.append(f"routing cosine {self.routing_cosine:.4f} below {tier.routing_cosine}")
        if self.angle is not None and not self.angle >= tier.angle:
            found.append(f"angle to other deltas {self.angle:.4f} below {tier.angle}")
        return found


@torch.no_grad()
def quantize(
    delta: LowRankDelta,
    tier: int | Tier = 1,
    *,
    embedding: Tensor | None = None,
    others: Sequence[LowRankDelta] = (),
    widths: Sequence[int] = WIDTHS,
    codebooks: Sequence[str] = CODEBOOKS,
    group: int = 64,
    seed: int = 42,
) -> Quantized:
    """Code `delta` with the smallest width that meets `tier`.

    Args:
        delta: any device and dtype; the error is measured against it in float64.
        tier: 1 (error at most 0.05), 2 (0.10), 3 (0.20), or limits of your own.
        embedding: `[d]`, a routing vector to keep with the delta, in the same codes.
        others: deltas whose input directions the coded one must stay apart from.
        widths: bits that are tried, smallest first.
        codebooks: of those with the same width the one with the smaller error is taken.
        group: coordinates that share a scale.
        seed: of the turn before coding.

    Raises:
        QuantizationError: no width meets the tier; the message says what was measured of each.
        UnsafeFileError: a delta that is not finite.
        ValueError: a width, codebook or group that `FactorCodec` does not know, or none.
    """
    tier = tier_of(tier)
    delta.check_finite()
    if not widths or not codebooks:
        raise ValueError("quantize: expected at least one width and one codebook, got none")
    if embedding is not None and not (embedding.ndim == 1 and embedding.isfinite().all()):
        raise QuantizationError(
            f"embedding: expected one finite vector, got a tensor {list(embedding.shape)}"
        )
    exact = _exact(delta.to("cpu"), embedding)
    tried: list[tuple[int, str, float]] = []
    misses: list[str] = []
    for bits in sorted(set(widths)):
        measured = []
        for codebook in codebooks:
            codec = FactorCodec(bits, codebook, group, seed)
            measured.append(_measure(_coded(exact, codec, tier), exact, others))
            tried.append((bits, codebook, measured[-1].largest))
        best = min(measured, key=lambda m: m.largest)
        faults = best.faults(tier)
        if not faults:
            return Quantized(best.coded, _report(best, exact.delta, tried))
        misses.append(f"{bits} bits ({best.coded.codec.codebook}): {', '.join(faults)}")
    raise QuantizationError(
        f"quantize: no width of {', '.join(map(str, sorted(set(widths))))} bits meets tier "
        f"{tier.number}. Measured: {'; '.join(misses)}. Take a tier with a higher ceiling"
        f"{', or move the delta apart from the others first' if others else ''}"
    )


def _exact(delta: LowRankDelta, embedding: Tensor | None) -> _Exact:
    pairs = list(delta.factors.values())
    norms = torch.tensor([frobenius(*pair) for pair in pairs])
    sketches = torch.stack([update_sketch(*pair) for pair in pairs])
    return _Exact(
        delta,
        {name: decomposed(*pair).pair() for name, pair in delta.factors.items()},
        norms,
        (sketches / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]).half(),
        None if embedding is None else embedding.cpu().float(),
    )


def _coded(exact: _Exact, codec: FactorCodec, tier: Tier) -> QuantizedDelta:
    rows = [side for A, B in exact.balanced.values() for side in (A, B.T)]
    if exact.embedding is not None:
        rows.append(exact.embedding[None])
    coded = [codec.encode(x) for x in rows]
    return QuantizedDelta(
        shapes={name: (len(A), A.shape[1], len(B)) for name, (A, B) in exact.balanced.items()},
        codec=codec,
        tier=tier,
        codes=torch.cat([x.codes.flatten() for x in coded]),
        scales=torch.cat([x.scales.flatten() for x in coded]),
        norms=torch.cat([x.norms for x in coded]),
        sketches=exact.sketches,
        update_norms=exact.norms,
        embedding_width=0 if exact.embedding is None else len(exact.embedding),
        kind=exact.delta.kind,
    )


def _measure(coded: QuantizedDelta, exact: _Exact, others: Sequence[LowRankDelta]) -> _Measured:
    used = coded.dequantize()
    errors = delta_errors(exact.delta, used)
    norms = dict(zip(errors, exact.norms.tolist(), strict=True))
    total = math.hypot(*norms.values())
    missed = math.hypot(*(errors[name] * norm for name, norm in norms.items() if norm))
    cosine = None
    if exact.embedding is not None and (kept := coded.embedding()) is not None:
        pair = exact.embedding.double(), kept.double()
        cosine = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
    return _Measured(coded, errors, missed / total if total else 0.0, cosine, _angle(used, others))


def delta_errors(exact: LowRankDelta, approximate: LowRankDelta) -> dict[str, float]:
    """Map -> `||B A - B' A'||_F / ||B A||_F`, exactly, by the factors.

    Raises:
        QuantizationError: other maps.
    """
    if list(exact.factors) != list(approximate.factors):
        raise QuantizationError(
            f"delta_errors: expected the maps {', '.join(exact.factors)}, got "
            f"{', '.join(approximate.factors)}"
        )
    return {
        name: relative_error(pair, approximate.factors[name])
        for name, pair in exact.factors.items()
    }


def _angle(used: LowRankDelta, others: Sequence[LowRankDelta]) -> float | None:
    """The smallest score between input directions at any map, None if no map is shared."""
    scores = []
    for name, pair in used.factors.items():
        shared = [other.factors[name] for other in others if name in other.factors]
        if shared:
            own = update_spans(*pair).input
            scores += [angle_score(own, update_spans(A.cpu(), B.cpu()).input) for A, B in shared]
    return min(scores, default=None)


def _report(
    best: _Measured, exact: LowRankDelta, tried: Sequence[tuple[int, str, float]]
) -> PrecisionReport:
    codec, parameters = best.coded.codec, exact.parameters()
    report = PrecisionReport(
        tier=best.coded.tier.number,
        bits=codec.bits,
        codebook=codec.codebook,
        group=codec.group,
        rel_frobenius=best.largest,
        rel_frobenius_total=best.total,
        worst=max(best.errors, key=best.errors.__getitem__),
        routing_cosine=best.routing_cosine,
        angle=best.angle,
        passed=True,
        bytes=0,
        bytes_exact=4 * parameters,
        bits_per_parameter=0.0,
        tried=tuple(tried),
    )
    size = len(serialized(best.coded, report))
    return replace(report, bytes=size, bits_per_parameter=8 * size / parameters)
