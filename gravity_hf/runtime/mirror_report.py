"""Forces, saturation, entropy and masses of attention calls, from sampled query rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers.observing import RowSample, capped_force
from .watching import SeenCall


class HeadMirror(NamedTuple):
    """One head of one layer.

    Attributes:
        mean_force: over the pairs that attention looks at, as the cap leaves the force.
        max_force: the largest force before the cap.
        saturation: share of the pairs whose force reaches the cap; None without one.
        entropy: of the attention weights, in nats, mean over the rows. A sink counts as one key.
        mean_mass, min_mass, max_mass: over the tokens that are not padding; of converted hosts, the
            mass of the head.
    """

    mean_force: float
    max_force: float
    saturation: float | None
    entropy: float
    mean_mass: float
    min_mass: float
    max_mass: float


@dataclass(frozen=True)
class LayerMirror:
    """One attention call of a forward.

    Attributes:
        layer: its number in the order of the forward.
        name: of the attention module.
        curvature_active: whether its distances are curved.
        hawking_limit: the cap on forces; None where there is none.
        seq_len: number of queries.
        rows: how many of them were sampled.
        heads: one record for each head.
    """

    layer: int
    name: str
    curvature_active: bool
    hawking_limit: float | None
    seq_len: int
    rows: int
    heads: tuple[HeadMirror, ...]

    @property
    def mean_force(self) -> float:
        """Mean over heads."""
        return _mean([head.mean_force for head in self.heads])

    @property
    def max_force(self) -> float:
        """The largest of any head, before the cap."""
        return max(head.max_force for head in self.heads)

    @property
    def saturation(self) -> float | None:
        """Mean over heads; None without a cap."""
        shares = [head.saturation for head in self.heads if head.saturation is not None]
        return _mean(shares) if shares else None

    @property
    def entropy(self) -> float:
        """Mean over heads, in nats."""
        return _mean([head.entropy for head in self.heads])

    @property
    def mean_mass(self) -> float:
        """Mean over heads."""
        return _mean([head.mean_mass for head in self.heads])

    def diagnostic(self) -> dict[str, Any]:
        """The published keys of a layer's diagnostics with true values, and ours after them."""
        return {
            "layer": self.layer,
            "mean_force": self.mean_force,
            "mean_mass": self.mean_mass,
            "curvature_active": self.curvature_active,
            "hawking_limit": self.hawking_limit,
            "seq_len": self.seq_len,
            "per_head": {f"head_{i}": head._asdict() for i, head in enumerate(self.heads)},
            "name": self.name,
            "max_force": self.max_force,
            "saturation": self.saturation,
            "entropy": self.entropy,
        }


@dataclass(frozen=True)
class MirrorReport:
    """The layers of one forward, in its order."""

    layers: tuple[LayerMirror, ...]

    @property
    def mean_force(self) -> float:
        """Mean over layers."""
        return _mean([layer.mean_force for layer in self.layers])

    @property
    def max_force(self) -> float:
        """The largest of any layer, before the cap."""
        return max(layer.max_force for layer in self.layers)

    def diagnostics(self) -> dict[str, Any]:
        """`{"layers": [...]}`, as containment reads it."""
        return {"layers": [layer.diagnostic() for layer in self.layers]}


@torch.no_grad()
def mirrored(layer: int, seen: SeenCall, most_rows: int | None) -> LayerMirror:
    """The statistics of one call, from at most `most_rows` query rows, evenly spaced; None: all."""
    call = seen.call
    queries = call.query_count()
    masses = call.masses().detach().float()
    rows = _spaced(queries, most_rows, masses.device)
    sample = call.rows(rows)
    table = torch.stack(
        [
            *_statistics(sample, _real_rows(seen.real, rows, queries), call),
            *_spread(masses, seen.real),
        ],
        -1,
    )
    heads = []
    for mean, largest, share, entropy, *spread in table.tolist():
        saturation = None if call.max_force is None else share
        heads.append(HeadMirror(mean, largest, saturation, entropy, *spread))
    return LayerMirror(
        layer, seen.name, seen.curved, call.max_force, queries, len(rows), tuple(heads)
    )


def _spaced(queries: int, most: int | None, device: torch.device) -> Tensor:
    if most is None or queries <= most:
        return torch.arange(queries, device=device)
    return torch.linspace(0, queries - 1, most, dtype=torch.float64, device=device).round().long()


def _real_rows(real: Tensor | None, rows: Tensor, queries: int) -> Tensor | None:
    """Bool `[B, R]`. With a cache the model is told of all tokens, the queries being the last."""
    if real is None or real.shape[1] < queries:
        return None
    return real.to(rows.device)[:, -queries:][:, rows] != 0


def _statistics(sample: RowSample, real: Tensor | None, call: Any) -> list[Tensor]:
    """Mean force, largest force, saturation, entropy: each `[H]`, float64."""
    force, score, visible = sample
    if real is not None and real.shape[0] == force.shape[0]:
        visible = visible & real[:, None, :, None]
    hidden = ~visible.expand_as(force)
    looked_at = visible.sum(-1)  # [B|1, H|1, R]
    pairs = _per_head(looked_at, force)
    capped = capped_force(force, call.max_force, call.force_cap).masked_fill(hidden, 0.0)
    # What is hidden must not be the largest.
    force = force.masked_fill(hidden, -torch.inf)
    cap = torch.inf if call.max_force is None else call.max_force
    share = _per_head((force >= cap).sum(-1), force) / pairs
    live = looked_at > 0
    entropy = torch.special.entr(score.softmax(-1)).sum(-1).masked_fill(~live, 0.0)
    return [
        _per_head(capped.sum(-1), force) / pairs,
        force.amax((0, 2, 3)).double(),
        share,
        _per_head(entropy, force) / _per_head(live, force),
    ]


def _per_head(rows: Tensor, force: Tensor) -> Tensor:
    """The sum of `[B|1, H|1, R]` over all but heads: `[H]`, float64."""
    return rows.expand(force.shape[:3]).sum((0, 2), dtype=torch.float64)


def _spread(masses: Tensor, real: Tensor | None) -> list[Tensor]:
    """Mean, least and largest mass of real tokens, each `[H]`, float64."""
    if masses.dim() == 1:
        return [masses.double()] * 3
    masses = masses.double()
    batch, _, length = masses.shape
    if real is None or real.shape[0] != batch or real.shape[1] < length:
        padding = torch.zeros_like(masses, dtype=torch.bool)
    else:
        padding = (real[:, None, -length:].to(masses.device) == 0).expand_as(masses)
    return [
        masses.masked_fill(padding, 0.0).sum((0, 2)) / (~padding).sum((0, 2)),
        masses.masked_fill(padding, torch.inf).amin((0, 2)),
        masses.masked_fill(padding, -torch.inf).amax((0, 2)),
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
