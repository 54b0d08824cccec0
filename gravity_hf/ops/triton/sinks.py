"""The score of a sink: a key at the origin with value zero, which takes a share of the weights."""

from __future__ import annotations

from torch import Tensor

from .problem import block_of


def sink_scores(
    q: Tensor,
    strength: Tensor,
    eps: Tensor,
    law: str,
    key_radius_sq: Tensor | None,
    sinks: Tensor,
    kv_heads: int,
) -> Tensor:
    """`s(|q_i|^2 + kappa_0) + sinks`, `[B, H, Tq]` in float32, where `kappa_0` is 0 or `R^2`.

    Differentiable. Under the power law squared distances are in `power_unit`, as in the kernels:
    what it adds to the scores is the same for a row's keys and its sink, and has no gradient.
    """
    constant = eps
    if key_radius_sq is not None:
        constant = eps + key_radius_sq.repeat_interleave(strength.shape[0] // kv_heads)
    softened = q.float().square().sum(-1) + constant[:, None]
    if law == "power":
        unit = power_unit(eps.detach(), q.shape[3])
        score = -strength[:, None] * (softened / unit[:, None]).log()
    else:
        score = strength[:, None] / softened
    sinks = sinks.float()
    return (score + (sinks[:, None] if sinks.dim() == 1 else sinks)).contiguous()


def power_unit(eps: Tensor, width: int) -> Tensor:
    """`score.unit_of` of the power law, per head."""
    return eps + block_of(width)
