"""What one optimiser step says of every group: gradients, updates, and what they gained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_


@dataclass(frozen=True)
class GroupSignal:
    """Of one group in one step.

    Attributes:
        gradient: root mean square of its gradient, before clipping.
        update: the length of its update over the length of its weights.
        contribution: `max(0, -<g, dw>)`, the loss that the update took away, to first order; nats.
            `g` is the gradient before clipping.
    """

    gradient: float
    update: float
    contribution: float


class StepMeter:
    """Clips gradients and measures a step, with one copy of the trained weights beside it and one
    wait for the device.

    `before` when gradients are whole and not yet clipped, `after` when the optimiser has stepped
    and the gradients are still there.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._norms: list[Tensor] = []
        self._starts: list[Tensor] = []
        # What clipping multiplied the gradients by; None: it did not.
        self._clipped: Tensor | None = None

    def before(self, owned: Sequence[tuple[str, nn.Parameter]], max_norm: float | None) -> None:
        """Note the gradients that there are, then clip them together to `max_norm` (None: not).

        Args:
            owned: group and parameter, in the model's order: sums are then those of Trainer.
            max_norm: of all gradients together.
        """
        found = [(name, parameter) for name, parameter in owned if parameter.grad is not None]
        self._names = [name for name, _ in found]
        self._parameters = [parameter for _, parameter in found]
        gradients = self._gradients()
        self._norms = _norms(gradients)
        self._clipped = None
        if gradients and max_norm is not None:
            total = torch.linalg.vector_norm(_row(self._norms), 2.0)
            self._clipped = _clipping(max_norm, total)
            clip_grads_with_norm_(self._parameters, max_norm, total)
        self._starts = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def after(self) -> dict[str, GroupSignal]:
        """The signals of the groups that had gradients; the one place that waits for the device."""
        if not self._parameters:
            return {}
        weights = [parameter.detach() for parameter in self._parameters]
        updates = torch._foreach_sub(weights, self._starts)
        gains = [
            torch.dot(gradient.flatten().float(), update.flatten().float())
            for gradient, update in zip(self._gradients(), updates, strict=True)
        ]
        columns = [_row(column) for column in (self._norms, _norms(updates), _norms(weights))]
        whole = _row(gains) if self._clipped is None else _row(gains) / self._clipped
        rows = torch.stack([*columns, whole]).T.tolist()
        self._starts = []
        return _by_group(self._names, [p.numel() for p in self._parameters], rows)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Scalars in float32, or in float64 where the tensors are."""
    if not tensors:
        return []
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    return list(torch._foreach_norm(list(tensors), 2.0, dtype=dtype))


def _clipping(max_norm: float, total: Tensor) -> Tensor:
    """The factor of `clip_grads_with_norm_`."""
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def _row(scalars: Sequence[Tensor]) -> Tensor:
    """Of layers on several devices, on the first."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).float()


def _by_group(
    names: list[str], sizes: list[int], rows: list[list[float]]
) -> dict[str, GroupSignal]:
    """Rows: norm of the gradient, of the update, of the weights, and `<g, dw>`, per tensor."""
    sums: dict[str, list[float]] = {}
    for name, size, (gradient, update, weight, gain) in zip(names, sizes, rows, strict=True):
        total = sums.setdefault(name, [0.0] * 5)
        for place, value in enumerate((size, gradient**2, update**2, weight**2, gain)):
            total[place] += value
    return {
        name: GroupSignal(
            gradient=math.sqrt(gradient / size),
            update=math.sqrt(update / weight) if weight > 0 else 0.0,
            contribution=max(0.0, -gain),
        )
        for name, (size, gradient, update, weight, gain) in sums.items()
    }
