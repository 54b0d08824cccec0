"""What somebody who watches an attention module is shown, whatever the model is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RowSample(NamedTuple):
    """Some query rows of one attention call, at least float32, without gradients.

    Attributes:
        force: `[B, H, R, Tk]`, of the law alone: before any cap, bias or mask. Law "power" weighs
            keys as `(d^2 + eps)^(-M^2) b_j`, which is its force; law "force" exponentiates it.
        score: `[B, H, R, Tk]`, what the softmax is given: after caps and biases, hidden keys at the
            dtype's lowest value. One more column, the last, where there is a sink: its score.
        visible: bool `[B|1, H|1, R, Tk]`: the pairs that attention looks at; not those that it
            leaves out, such as a token's own key under `exclude_self`.
    """

    force: Tensor
    score: Tensor
    visible: Tensor


class ObservedCall(Protocol):
    """One call of an attention module."""

    @property
    def max_force(self) -> float | None:
        """The cap on the force; None where there is none."""

    @property
    def force_cap(self) -> str:
        """How `max_force` c caps a force F: `"clamp"`, `min(F, c)`; `"tanh"`, `c tanh(F / c)`."""

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """What the module goes on with, and the weights where the call asks for them."""

    def rows(self, rows: Tensor) -> RowSample:
        """Forces and scores of the query rows with these indices, int64 `[R]`, computed anew."""

    def query_count(self) -> int:
        """How many query rows there are."""

    def masses(self) -> Tensor:
        """`[B, H, T]` where tokens have masses, else `[H]`: one mass for each head."""


class Observer(Protocol):
    """What may be set as the `observer` of an attention module's `gravity` child.

    It is set only while somebody watches, and one at a time.
    """

    def attend(self, call: ObservedCall) -> tuple[Tensor, Tensor | None]:
        """What the module goes on with; `call.gravity()` unless the observer has other plans."""


def capped_force(force: Tensor, max_force: float | None, force_cap: str = "clamp") -> Tensor:
    """`force` as the cap leaves it: what attention is given."""
    if max_force is None:
        return force
    if force_cap == "tanh":
        return max_force * torch.tanh(force / max_force)
    return force.clamp(max=max_force)
