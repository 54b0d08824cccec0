"""Candidate softness factors of one attention module, and Newton's iteration for their masses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.parameters import GravityParameters
from .closed_form import HeadGeometry, Solution
from .trials import Trials

# A mass is found when another Newton step would lower the KL by less than this share of it, or by
# less than this many nats.
_TOLERANCE, _LEAST_GAIN = 1e-4, 1e-9
# A step multiplies the strength M^2 by at most 10 and at least 1/10: far from the minimum the
# quadratic model is worthless.
_STEP = (-0.9, 9.0)
_LEAST_CURVATURE = 1e-30


class Candidates:
    """Tries softness factors; keeps the best mass found for each.

    Heads that share a mass are one group: one strength `M^2`, one softness factor, each head's own
    scale; `G` groups. A factor is told by its position x in [0, 1]: 0 is f = 0, 1 is the ceiling,
    and between them f grows geometrically from where `f * scale` first exceeds the base epsilon.

    A round is `propose`, then `trials` and `learn` in turn while `is_busy`, then `close`.

    Attributes: `position`, `kl` (mean over the heads and query rows of a group, nats), `worst_kl`
    (of the group's worst head): `[N, G]`, of all closed rounds.
    """

    def __init__(
        self,
        module: GravityParameters,
        geometry: HeadGeometry,
        law: str,
        ceiling: float,
        epsilon: float,
    ) -> None:
        self.geometry, self.law, self.ceiling, self.epsilon = geometry, law, ceiling, epsilon
        self.groups, self.heads = module.mass_count, module.query_heads
        least = epsilon / self._grouped(geometry.scale).amax(-1)
        # ln(ceiling / lowest factor that still does something), per group.
        self.range = (ceiling / least.clamp(min=1e-30)).clamp(min=1.0).log()
        nothing = torch.empty(0, self.groups, dtype=torch.float64)
        self.position = self.kl = self.worst_kl = nothing
        self._offset = nothing

    def propose(self, position: Tensor, wanted: Tensor | None = None) -> None:
        """Open a round with candidates at `position` `[C, G]`; where not `wanted`, no work is done.

        Masses start at the closed form, or between what earlier rounds found beside them.
        """
        self._trial = position
        self._busy = torch.ones_like(position, dtype=torch.bool) if wanted is None else wanted
        self._opened = self._busy.clone()
        factor = self.factor(position).repeat_interleave(self.heads // self.groups, -1)
        self._softening = self.geometry.softening(factor, self.epsilon)
        self._closed = self.geometry.mass(self._softening, self.law).square().log()
        self._start = self._grouped(self._closed.div(2).exp()).mean(-1).log().mul(2)
        offset = _interpolate(self.position, self._offset, position)
        self._now = self._start + offset
        self._low = torch.full_like(self._now, -torch.inf)
        self._high = torch.full_like(self._now, torch.inf)
        self._best = self._now.clone()
        self._best_kl = torch.full_like(self._now, torch.inf)
        self._best_worst = torch.full_like(self._now, torch.inf)

    @property
    def is_busy(self) -> bool:
        return bool(self._busy.any())

    def trials(self) -> Trials:
        """The observer of the next pass."""
        per_head = self.heads // self.groups
        strength = self._now.repeat_interleave(per_head, -1) - self._closed
        wanted = self._busy.repeat_interleave(per_head, -1)
        return Trials(self.geometry, self.law, self._softening, strength.exp(), wanted)

    def learn(self, seen: Trials) -> None:
        """Take the results of a pass over `trials()`, and a Newton step on every strength.

        The KL is convex in the strengths, shared ones included; derivatives here are with respect
        to `M^2`, in units of `M^2`. A bracket keeps the steps from running in circles.
        """
        sums = seen.sums.cpu() / seen.rows.clamp(min=1)
        kl_of_heads = self._grouped(sums[0]).clamp(min=0.0)
        slope = self._grouped(seen.strength * sums[1]).sum(-1)
        curvature = self._grouped(seen.strength.square() * sums[2]).sum(-1)
        kl = kl_of_heads.mean(-1)
        better = self._busy & (kl < self._best_kl)
        self._best = torch.where(better, self._now, self._best)
        self._best_worst = torch.where(better, kl_of_heads.amax(-1), self._best_worst)
        self._best_kl = torch.where(better, kl, self._best_kl)

        self._high = torch.where(slope > 0, torch.minimum(self._high, self._now), self._high)
        self._low = torch.where(slope < 0, torch.maximum(self._low, self._now), self._low)
        step = (-slope / curvature.clamp(min=_LEAST_CURVATURE)).clamp(*_STEP).log1p()
        aim = self._now + step
        middle = (self._low + self._high) / 2
        outside = (aim <= self._low) | (aim >= self._high)
        aim = torch.where(outside & middle.isfinite(), middle, aim)
        gain = slope.square() / curvature.clamp(min=_LEAST_CURVATURE) / (2 * kl_of_heads.shape[-1])
        self._busy = self._busy & (gain > _TOLERANCE * kl + _LEAST_GAIN)
        self._now = torch.where(self._busy, aim, self._now)

    def close(self) -> None:
        """End the round; what was not wanted counts as infinitely far from the host."""
        self.position = torch.cat([self.position, self._trial])
        self.kl = torch.cat([self.kl, self._best_kl])
        self.worst_kl = torch.cat([self.worst_kl, self._best_worst])
        self._offset = torch.cat([self._offset, self._best - self._start])

    def factor(self, position: Tensor) -> Tensor:
        """Softness factors `[..., G]` of positions."""
        factor = self.ceiling * (-self.range * (1.0 - position)).exp()
        return torch.where(position > 0, factor, torch.zeros_like(factor))

    def solution(self, chosen: Tensor) -> Solution:
        """What the candidates `chosen` `[G]` (indices into the closed rounds) amount to."""
        at = chosen[None]
        per_head = self.heads // self.groups
        factor = self.factor(self.position.gather(0, at))[0].repeat_interleave(per_head)
        softening = self.geometry.softening(factor, self.epsilon)
        start = self._grouped(self.geometry.mass(softening, self.law)).mean(-1)
        mass = start * (self._offset.gather(0, at)[0] / 2).exp()
        return Solution(mass, factor, softening, self.geometry)

    def _grouped(self, of_heads: Tensor) -> Tensor:
        """`[..., H]` as `[..., G, H / G]`."""
        return of_heads.unflatten(-1, (self.groups, -1))


def _interpolate(known_x: Tensor, known_y: Tensor, x: Tensor) -> Tensor:
    """Piecewise linear, column by column: `known_x`, `known_y` `[N, G]` in any order, `x` `[C, G]`;
    0 where nothing is known."""
    if not len(known_x):
        return torch.zeros_like(x)
    order = known_x.argsort(0)
    known_x, known_y = known_x.gather(0, order), known_y.gather(0, order)
    right = torch.searchsorted(known_x.T.contiguous(), x.T.contiguous()).T.clamp(
        1, len(known_x) - 1
    )
    if len(known_x) == 1:
        return known_y.expand_as(x)
    x0, x1 = known_x.gather(0, right - 1), known_x.gather(0, right)
    y0, y1 = known_y.gather(0, right - 1), known_y.gather(0, right)
    share = ((x - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0.0, 1.0)
    return y0 + share * (y1 - y0)
