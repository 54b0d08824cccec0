"""A delta in packed codes, the tier it promises to meet, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from .delta import LowRankDelta
from .delta_codec import Coded, FactorCodec
from .errors import QuantizationError
from .residual_delta import ResidualDelta
from .update_sketch import PROBES, estimated_norm, update_sketch

# A sketch knows an error to 12 %; a file is refused where it says this much more than the ceiling.
SLACK = 1.25
KINDS = {kind.kind: kind for kind in (LowRankDelta, ResidualDelta)}


@dataclass(frozen=True)
class Tier:
    """What a coded delta has to keep of the exact one.

    Args:
        number: its name; 1 to 3 are those of `TIERS`.
        frobenius: ceiling of `||B A - B' A'||_F / ||B A||_F`, of every map.
        routing_cosine: floor of the cosine between a routing vector and its coded form.
        angle: floor of the smallest principal angle, as a share of pi / 2, between the input
            directions of the coded delta and those of others.
    """

    number: int
    frobenius: float
    routing_cosine: float
    angle: float

    def __post_init__(self) -> None:
        limits = (self.frobenius, self.routing_cosine, self.angle)
        if type(self.number) is not int or not all(map(math.isfinite, limits)):
            raise ValueError(f"Tier: expected a whole number and finite limits, got {self}")


# The three typed tiers of delta quantisation.
TIERS = {1: Tier(1, 0.05, 0.95, 0.25), 2: Tier(2, 0.10, 0.85, 0.20), 3: Tier(3, 0.20, 0.70, 0.10)}


def tier_of(tier: int | Tier) -> Tier:
    """The tier of that number.

    Raises:
        QuantizationError: no such tier, or one that calls itself 1 to 3 with other limits.
    """
    if isinstance(tier, Tier):
        if TIERS.get(tier.number, tier) != tier:
            raise QuantizationError(
                f"tier: expected the limits of tier {tier.number}, {TIERS[tier.number]}, got "
                f"{tier}. Give a tier of your own another number"
            )
        return tier
    if tier not in TIERS:
        raise QuantizationError(f"tier: expected one of {', '.join(map(str, TIERS))}, got {tier!r}")
    return TIERS[tier]


@dataclass(frozen=True)
class PrecisionReport:
    """What was measured of a coded delta.

    bits, codebook, group: of the codes. rel_frobenius: of the map where it is largest, `worst`;
    rel_frobenius_total: of all maps together. routing_cosine: None without a routing vector.
    angle: None without other deltas. bytes: of the file, with all that is in it; bytes_exact: of
    the same delta in float32. bits_per_parameter: of the file. tried: (bits, codebook,
    rel_frobenius) of all settings that were measured, in order.
    """

    tier: int
    bits: int
    codebook: str
    group: int
    rel_frobenius: float
    rel_frobenius_total: float
    worst: str
    routing_cosine: float | None
    angle: float | None
    passed: bool
    bytes: int
    bytes_exact: int
    bits_per_parameter: float
    tried: tuple[tuple[int, str, float], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class QuantizedDelta:
    """Codes of all factors, one after the other: A of a map, then the columns of its B.

    Args:
        shapes: map -> (rank, features in, features out), sorted by name.
        codec: how rows are coded.
        tier: what it promises.
        codes, scales: uint8 `[n]`; norms: float32 `[rows]`, see `delta_codec.Coded`.
        sketches: float16 `[maps, 64]`, of the exact update over its norm; update_norms: float32
            `[maps]`, its Frobenius norm.
        embedding_width: of the routing vector, which is the last row; 0 without one.
        kind: of the delta: "low_rank" for one of linear maps, "residual" for one of blocks.
    """

    shapes: dict[str, tuple[int, int, int]]
    codec: FactorCodec
    tier: Tier
    codes: Tensor
    scales: Tensor
    norms: Tensor
    sketches: Tensor
    update_norms: Tensor
    embedding_width: int = 0
    kind: str = "low_rank"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"QuantizedDelta.kind: expected one of {list(KINDS)}, got {self.kind!r}"
            )

    def parameters(self) -> int:
        """How many numbers of factors it stands for."""
        return sum(rank * (width_in + out) for rank, width_in, out in self.shapes.values())

    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of them by their names."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def dequantize(self) -> LowRankDelta:
        """The delta as it is used, float32 on the CPU."""
        rows = self._decoded_rows()
        factors = {name: (next(rows), next(rows).T) for name in self.shapes}
        return KINDS[self.kind](factors)

    def embedding(self) -> Tensor | None:
        """The routing vector `[width]`, float32, or None."""
        if not self.embedding_width:
            return None
        return list(self._decoded_rows())[-1][0]

    def estimated_error(self) -> float:
        """The largest relative error of a map, by the sketches of the exact updates."""
        delta, worst = self.dequantize(), 0.0
        for i, (A, B) in enumerate(delta.factors.values()):
            norm = float(self.update_norms[i])
            exact = self.sketches[i].float() * norm
            error = estimated_norm(exact - update_sketch(A, B))
            worst = max(worst, error / norm if norm else (0.0 if error == 0 else float("inf")))
        return worst

    def _decoded_rows(self) -> Iterator[Tensor]:
        """`[rank, width]` of each A and each transposed B in turn, then the routing vector."""
        code, scale, row = 0, 0, 0
        for rows, width in row_shapes(self.shapes, self.embedding_width):
            code_size = self.codec.bytes_per_row(width)
            groups = self.codec.padded(width) // self.codec.group
            coded = Coded(
                self.codes[code : code + rows * code_size].view(rows, code_size),
                self.scales[scale : scale + rows * groups].view(rows, groups),
                self.norms[row : row + rows],
            )
            code, scale, row = code + rows * code_size, scale + rows * groups, row + rows
            yield self.codec.decode(coded, width)


def row_shapes(
    shapes: dict[str, tuple[int, int, int]], embedding_width: int
) -> list[tuple[int, int]]:
    """(rows, width) of everything that is coded, in order."""
    found = []
    for rank, width_in, width_out in shapes.values():
        found += [(rank, width_in), (rank, width_out)]
    return found + ([(1, embedding_width)] if embedding_width else [])


def tensor_sizes(
    shapes: dict[str, tuple[int, int, int]], codec: FactorCodec, embedding_width: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a coded delta of these shapes."""
    rows = row_shapes(shapes, embedding_width)
    return {
        "codes": (torch.uint8, (sum(n * codec.bytes_per_row(w) for n, w in rows),)),
        "scales": (torch.uint8, (sum(n * (codec.padded(w) // codec.group) for n, w in rows),)),
        "norms": (torch.float32, (sum(n for n, _ in rows),)),
        "sketches": (torch.float16, (len(shapes), PROBES)),
        "update_norms": (torch.float32, (len(shapes),)),
    }
