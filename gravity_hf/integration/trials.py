"""The KL of many candidate masses and softenings to the host's attention, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .closed_form import HeadGeometry
from .observers import Observer, View, capped, count, row_blocks, total


class _Cap(NamedTuple):
    """A host's cap on its logits, and where gravity's scores are neutral: `|q|^2 + kappa`."""

    softcap: float
    neutral_sq: Tensor


class Trials(Observer):
    """Per candidate and query head: KL(host || gravity), and its first two derivatives.

    A candidate's score is `s * phi(d^2)`, with `phi` the score of the closed-form mass, shifted by
    a constant of the head that softmax does not see:

        force: phi = -(scaling/2) (d^2 - D) (D + eps) / (d^2 + eps)
        power: phi = -(scaling/2) (D + eps) ln((d^2 + eps) / (D + eps))

    so `s = M^2 / M_closed^2` is near 1, both tend to the host's own score as eps grows, and float32
    holds them at any eps. In s the KL is convex, with the derivatives of an exponential family:
    `dKL/ds = E_gravity[phi] - E_host[phi]`, `d2KL/ds2 = Var_gravity[phi]`.

    Under a host's cap c the score is `s n + c tanh(s (phi - n) / c)`, n being phi at a right angle.
    There the KL is not convex; the variance is that of the score's slope in s, which is not
    negative, so that a step still descends.

    Args:
        geometry: of the module's heads.
        law: `"force"` or `"power"`.
        softening: `[C, H]`.
        strength: s, `[C, H]`.
        wanted: bool `[C, H]`; the others are left at 0.
    """

    def __init__(
        self, geometry: HeadGeometry, law: str, softening: Tensor, strength: Tensor, wanted: Tensor
    ) -> None:
        super().__init__()
        self.geometry, self.law = geometry, law
        self.softening, self.strength, self.wanted = softening, strength, wanted
        self.rows = torch.zeros(1, dtype=torch.float64)
        self.sums = torch.zeros(3, *strength.shape, dtype=torch.float64)

    def update(self, view: View, scaling: float) -> None:
        device, groups = view.q.device, view.q.shape[2]
        self.sums = self.sums.to(device)
        keys = view.k.repeat_interleave(groups, 1)
        kappa = keys.square().sum(-1)[:, :, None]
        if self.geometry.radius_sq is not None:
            radius_sq = self.geometry.radius_sq.float().to(device)
            kappa = radius_sq.repeat_interleave(groups)[:, None, None]
        for q, allowed, bias in row_blocks(view):
            dot = q @ keys.transpose(-2, -1)
            neutral_sq = q.square().sum(-1, keepdim=True) + kappa
            distance_sq = (neutral_sq - 2.0 * dot).clamp_(min=0.0)
            hidden = ~allowed
            host = _log_softmax(capped(dot.mul_(scaling), view.softcap).add_(bias), hidden)
            cap = None if view.softcap is None else _Cap(view.softcap, neutral_sq)
            self._add(distance_sq, host, hidden, bias, cap)
            self.rows = self.rows + count(allowed.any(-1))

    def _add(
        self,
        distance_sq: Tensor,
        log_host: Tensor,
        hidden: Tensor,
        bias: Tensor | float,
        cap: _Cap | None,
    ) -> None:
        host = log_host.exp().masked_fill_(hidden, 0.0)
        for candidate, wanted in enumerate(self.wanted):
            if not wanted.any():
                continue
            heads: Tensor | slice = slice(None)
            if not wanted.all():
                heads = wanted.nonzero().squeeze(-1).to(distance_sq.device)
            shift = bias if isinstance(bias, float) or bias.shape[1] == 1 else bias[:, heads]
            unseen = hidden if hidden.shape[1] == 1 else hidden[:, heads]
            self.sums[:, candidate, heads] += self._derivatives(
                candidate,
                heads,
                distance_sq[:, heads],
                log_host[:, heads],
                host[:, heads],
                unseen,
                shift,
                cap,
            )

    def _derivatives(
        self,
        candidate: int,
        heads: Tensor | slice,
        distance_sq: Tensor,
        log_host: Tensor,
        host: Tensor,
        hidden: Tensor,
        bias: Tensor | float,
        cap: _Cap | None,
    ) -> Tensor:
        """KL, slope, curvature: `[3, heads]`, sums over rows."""
        phi = self._unit_score(candidate, heads, distance_sq)
        strength = self._per_head(self.strength[candidate], heads, phi)
        score = strength * phi
        if cap is not None:
            neutral = self._unit_score(candidate, heads, cap.neutral_sq[:, heads])
            bent = torch.tanh(strength * (phi - neutral) / cap.softcap)
            score = strength * neutral + cap.softcap * bent
            # From here on the slope of the score in s, as phi is without a cap.
            phi = neutral + (phi - neutral) * (1.0 - bent.square())
        log_gravity = _log_softmax(score.add_(bias), hidden)
        divergence = (log_host - log_gravity).mul_(host)
        gravity = log_gravity.exp_().masked_fill_(hidden, 0.0)
        slope = (gravity - host).mul_(phi)
        mean = (gravity * phi).sum(-1, keepdim=True)
        curvature = phi.sub_(mean).square_().mul_(gravity)
        return torch.stack([total(x, (0, 2, 3)) for x in (divergence, slope, curvature)])

    def _unit_score(self, candidate: int, heads: Tensor | slice, distance_sq: Tensor) -> Tensor:
        center, eps = self.geometry.mean_distance, self.softening[candidate]
        half = self.geometry.scaling / 2.0
        softened = distance_sq + self._per_head(eps, heads, distance_sq)
        reference = self._per_head(center + eps, heads, distance_sq)
        if self.law == "power":
            return softened.div_(reference).log_().mul_(-half * reference)
        offset = distance_sq - self._per_head(center, heads, distance_sq)
        return offset.mul_(-half * reference).div_(softened)

    @staticmethod
    def _per_head(values: Tensor, heads: Tensor | slice, like: Tensor) -> Tensor:
        return values.to(like)[heads][:, None, None]


def _log_softmax(score: Tensor, hidden: Tensor) -> Tensor:
    return score.masked_fill_(hidden, torch.finfo(score.dtype).min).log_softmax(-1)
