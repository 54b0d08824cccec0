"""A radius beyond which a query pays no attention: how it enters the score."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

KINDS = ("hard", "soft", "log")


@dataclass(frozen=True, eq=False)
class Cutoff:
    """A head attends within `radius`; every kind gives the radius a gradient.

    With `x_ij = (radius^2 - d_ij^2) / width`:

    * `"hard"`: pairs with `d_ij^2 > radius^2` are hidden. The forward pass is that alone; the
      backward pass sees `logsigmoid(x_ij)` added to the score (straight-through estimator).
    * `"soft"`: the score times `relu(1 - d_ij^2 / radius^2)`, force law only. Outside the radius
      the score is 0, which hides nothing: it is the published form of the Newton Gravity
      Transformer, for its checkpoints.
    * `"log"`: `logsigmoid(x_ij)` is added, so a weight far outside fades as
      `exp((radius^2 - d_ij^2) / width)`.

    Args:
        radius: `[H]`, in units of distance, positive (not checked: it may be on a device).
        kind: one of `KINDS`.
        width: how fast `"hard"` and `"log"` fade, in units of squared distance; positive.

    Raises:
        ValueError: a value outside its range.
    """

    radius: Tensor
    kind: str
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Cutoff.kind: expected one of {list(KINDS)}, got {self.kind!r}")
        number = isinstance(self.width, (int, float)) and not isinstance(self.width, bool)
        if not number or not 0 < self.width < math.inf:
            raise ValueError(f"Cutoff.width: expected a finite number > 0, got {self.width!r}")
        radius = self.radius
        if not isinstance(radius, Tensor):
            raise ValueError(
                "Cutoff.radius: expected a floating tensor [H], one radius per query head, "
                f"got {type(radius).__name__}"
            )
        if radius.dim() != 1 or not radius.is_floating_point():
            raise ValueError(
                "Cutoff.radius: expected a floating tensor [H], one radius per query head, "
                f"got {radius.dtype} {tuple(radius.shape)}"
            )

    def apply(self, score: Tensor, distance_sq: Tensor) -> Tensor:
        """The score `[B, H, Tq, Tk]` with the cutoff's term; `"hard"` changes only gradients."""
        radius_sq = self._radius_sq(score)
        if self.kind == "soft":
            return score * (1.0 - distance_sq / radius_sq).relu()
        fade = logsigmoid((radius_sq - distance_sq) / self.width)
        return score + (fade if self.kind == "log" else fade - fade.detach())

    def hidden(self, distance_sq: Tensor) -> Tensor | None:
        """Bool `[B, H, Tq, Tk]`: pairs outside a hard radius. None: this kind hides nothing."""
        if self.kind != "hard":
            return None
        return distance_sq > self._radius_sq(distance_sq)

    def _radius_sq(self, like: Tensor) -> Tensor:
        return self.radius.to(like.dtype).square()[:, None, None]
