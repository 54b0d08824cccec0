"""One companion's frames turned into another's: orthogonal Procrustes, in closed form."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SCOPES = ("frame", "slot", "code")
_logger = logging.getLogger(__name__)


class AlignmentErrors(NamedTuple):
    """How far frames of two companions are from each other; rows are unit vectors.

    residual: root mean square of `||A R - B||` per row, before rows go back to the sphere; two
    rows that know nothing of each other are `sqrt(2)` apart.
    relative_residual: `||A R - B|| / ||B||` over all of them.
    residual_before: as `residual`, with `R` the identity.
    random_residual: as `residual`, with the rotation that fits shuffled tokens: the control. NaN
    where there was one token only, which cannot be shuffled.
    """

    residual: float
    relative_residual: float
    residual_before: float
    random_residual: float


@dataclass(frozen=True, eq=False)
class Alignment:
    """The orthogonal matrix, or matrices, that carries frames of A to those of B.

    rotation: float64, rows times it: `[d, d]` of scope "frame", `[V, d, d]` of "slot", `[Vd, Vd]`
        of "code".
    residual, relative_residual, residual_before, random_residual: see `AlignmentErrors`, on the
        tokens of the fit; the control's is that of the shuffled tokens. `evaluate` measures others.
    control: the rotation that fits shuffled tokens; None where there was one token.
    rank: of `A^T B`, the lowest of all rotations. Below the size of `rotation` other rotations fit
        as well, and tokens unlike those of the fit are carried to no place in particular.
    tokens: how many were fitted.
    """

    scope: str
    rotation: Tensor
    residual: float
    relative_residual: float
    residual_before: float
    random_residual: float
    control: Tensor | None
    rank: int
    tokens: int
    allow_reflection: bool = True

    @property
    def is_unique(self) -> bool:
        """Whether the tokens of the fit leave one best rotation."""
        # A determinant of 1 settles the sign of one direction that no token says anything about.
        return self.rank >= self.rotation.shape[-1] - (not self.allow_reflection)

    def apply(self, frame: Tensor) -> Tensor:
        """Frames `[..., V, d]` of A as those of B: rotated, rows back on the sphere; same dtype.

        Raises:
            ValueError: frames of another shape than those of the fit.
        """
        self._check(frame)
        return _on_sphere(_turned(frame.double(), self._rotation(frame), self.scope), frame)

    def apply_control(self, frame: Tensor) -> Tensor:
        """As `apply`, by the rotation that was fitted to shuffled tokens.

        Raises:
            ValueError: frames of another shape, or a fit of one token, which has no control.
        """
        self._check(frame)
        if self.control is None:
            raise ValueError(
                "apply_control: expected an alignment of two tokens or more, got one token, which "
                "cannot be shuffled. Align more tokens"
            )
        control = self.control.to(frame.device)
        return _on_sphere(_turned(frame.double(), control, self.scope), frame)

    def evaluate(
        self, a: Tensor, b: Tensor, attention_mask: Tensor | None = None
    ) -> AlignmentErrors:
        """Errors on other tokens than those of the fit; arguments as in `align_frames`."""
        left, right = _tokens(a, b, attention_mask)
        self._check(left)
        return _errors(left, right, self._rotation(left), self.control, self.scope)

    def _rotation(self, like: Tensor) -> Tensor:
        return self.rotation.to(like.device)

    def _check(self, frame: Tensor) -> None:
        size = self.rotation.shape[-1]
        if self.scope == "code":
            fits = frame.dim() >= 2 and frame.shape[-2] * frame.shape[-1] == size
            expected = f"[..., V, d] with V d = {size}"
        elif self.scope == "slot":
            rows = self.rotation.shape[0]
            fits, expected = frame.shape[-2:] == (rows, size), f"[..., {rows}, {size}]"
        else:
            fits, expected = frame.dim() >= 2 and frame.shape[-1] == size, f"[..., V, {size}]"
        if not fits:
            raise ValueError(
                f"Alignment: expected frames {expected}, as it was fitted to, got "
                f"{list(frame.shape)}. Align frames of this shape first"
            )


def align_frames(
    a: Tensor,
    b: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scope: str = "frame",
    allow_reflection: bool = True,
    seed: int = 0,
) -> Alignment:
    """The rotation that carries frames of one companion to another's, on the same tokens.

    Orthogonal Procrustes: `R = U W^T` of the singular value decomposition `A^T B = U S W^T`
    minimises `||A R - B||` over all orthogonal matrices. Nothing is centred, as a sphere has a
    centre. Float64 inside.

    Args:
        a, b: `[B, N, V, d]` or `[T, V, d]`, of the same tokens in the same order.
        attention_mask: `[B, N]` or `[T]`, 0 = a token that is left out.
        scope: `"frame"`: one rotation of `R^d` for all rows; `"slot"`: one for each row number;
            `"code"`: one of all `V d` coordinates at once, which alone can follow when companions
            keep in different rows what they know.
        allow_reflection: False: only rotations in the strict sense, with determinant 1.
        seed: of the shuffle that the control is fitted to.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, no token left, or an unknown
            scope. A rotation that is not the only one is a warning: see `Alignment.rank`.
    """
    if scope not in SCOPES:
        raise ValueError(f"align_frames.scope: expected one of {list(SCOPES)}, got {scope!r}")
    left, right = _tokens(a, b, attention_mask)
    rotation, rank = _fit(left, right, scope, allow_reflection, _precision(a, b))
    control = None
    if len(left) > 1:
        shuffled = right[_derangement(len(left), seed).to(right.device)]
        control, _ = _fit(left, shuffled, scope, allow_reflection, 0.0)
    errors = _errors(left, right, rotation, control, scope)
    if control is not None:
        # On the fit's own tokens the control is measured against what it was fitted to.
        fitted = _residual(_turned(left, control, scope), shuffled)
        errors = errors._replace(random_residual=fitted)
    found = Alignment(
        scope=scope,
        rotation=rotation,
        control=control,
        rank=rank,
        tokens=len(left),
        allow_reflection=allow_reflection,
        **errors._asdict(),
    )
    if not found.is_unique:
        _warn(found)
    return found


def _warn(found: Alignment) -> None:
    size = found.rotation.shape[-1]
    few = found.scope == "code" and found.tokens < size
    reason = f"{found.tokens} tokens for {size} coordinates" if few else "the frames lie flat"
    _logger.warning(
        "align_frames: A^T B has rank %d of %d (%s): other rotations fit as well, and the residual "
        "says little about other tokens. Align more tokens, or measure with evaluate()",
        *(found.rank, size, reason),
    )


def _tokens(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Valid frames of both, float64 `[T, V, d]`."""
    if a.shape != b.shape or a.dim() not in (3, 4):
        raise ValueError(
            "align_frames: expected two tensors of one shape, [B, N, V, d] or [T, V, d], got "
            f"{list(a.shape)} and {list(b.shape)}. Give frames of the same tokens"
        )
    if mask is not None and mask.shape != a.shape[:-2]:
        raise ValueError(
            f"align_frames.attention_mask: expected {list(a.shape[:-2])}, a value for each token, "
            f"got {list(mask.shape)}"
        )
    left, right = (x.detach().double().flatten(0, -3) for x in (a, b.to(a.device)))
    if mask is not None:
        valid = (mask != 0).flatten().to(left.device)
        left, right = left[valid], right[valid]
    if not len(left):
        raise ValueError("align_frames: expected at least one valid token, got none")
    for name, x in (("a", left), ("b", right)):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"align_frames.{name}: expected finite values, got NaN or infinity in tokens that "
                "are not masked"
            )
    return left, right


def _precision(a: Tensor, b: Tensor) -> float:
    """What coordinates of both are rounded to."""
    kinds = [x.dtype if x.is_floating_point() else torch.float32 for x in (a, b)]
    return max(torch.finfo(kind).eps for kind in kinds)


def _rank(s: Tensor, rows: int, precision: float) -> int:
    """Of `A^T B` with singular values `s` `[..., n]`, largest first, over `rows` rows."""
    size = s.shape[-1]
    # Roundings of coordinates are independent, so that over many rows they matter less; those of
    # the decomposition are not.
    noise = precision * (size / rows) ** 0.5 + torch.finfo(s.dtype).eps * size
    least = noise * s[..., :1].clamp(min=torch.finfo(s.dtype).tiny)
    return int((s > least).sum(-1).min())


def _fit(
    a: Tensor, b: Tensor, scope: str, allow_reflection: bool, precision: float
) -> tuple[Tensor, int]:
    if scope == "frame":
        product = torch.einsum("tvi,tvj->ij", a, b)
    elif scope == "slot":
        product = torch.einsum("tvi,tvj->vij", a, b)
    else:
        product = a.flatten(1).mT @ b.flatten(1)
    u, s, wt = torch.linalg.svd(product)
    if not allow_reflection:
        # Kabsch: the direction that matters least is turned around where the best is a reflection.
        sign = torch.sign(torch.linalg.det(u) * torch.linalg.det(wt))
        u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    rows = len(a) * a.shape[1] if scope == "frame" else len(a)
    return u @ wt, _rank(s, rows, precision)


def _turned(frame: Tensor, rotation: Tensor, scope: str) -> Tensor:
    """`[..., V, d]`, every row, or all of them as one, times `rotation`."""
    if scope == "code":
        return (frame.flatten(-2) @ rotation).unflatten(-1, frame.shape[-2:])
    if scope == "slot":
        return torch.einsum("...vi,vij->...vj", frame, rotation)
    return frame @ rotation


def _on_sphere(frame: Tensor, like: Tensor) -> Tensor:
    return F.normalize(frame, dim=-1, eps=1e-12).to(like.dtype)


def _residual(a: Tensor, b: Tensor) -> float:
    return (a - b).square().sum(-1).mean().sqrt().item()


def _errors(
    a: Tensor, b: Tensor, rotation: Tensor, control: Tensor | None, scope: str
) -> AlignmentErrors:
    residual = _residual(_turned(a, rotation, scope), b)
    size = _residual(b, torch.zeros_like(b))
    chance = float("nan")
    if control is not None:
        chance = _residual(_turned(a, control.to(a.device), scope), b)
    relative = residual / size if size else float("nan")
    return AlignmentErrors(residual, relative, _residual(a, b), chance)


def _derangement(count: int, seed: int) -> Tensor:
    """A permutation that leaves no token in its place."""
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed))
    shuffled = torch.empty_like(order)
    shuffled[order] = order.roll(1)
    return shuffled


__all__ = ["SCOPES", "Alignment", "AlignmentErrors", "align_frames"]
