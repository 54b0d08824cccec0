"""What a new delta has to keep clear of, as columns to project out while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .leakage import Moments
from .registry_capacity import OUTPUT, Occupied
from .subspaces import joined, orthonormal

# Name of a map -> orthonormal columns `(input [in, k] or None, output [out, k] or None)`.
Projector = Callable[[str], tuple[Tensor | None, Tensor | None]]


class BusyDirections:
    """`SecondMoment.busy` of maps, worked out once: it takes seconds for wide ones."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, float, int], Tensor] = {}

    def all_of(self, moments: Mapping[str, Moments], name: str, quiet: float) -> list[Tensor]:
        """For each of `moments`, by the id of what they belong to, that has the map `name`; the
        widest first."""
        found = []
        for key, own in moments.items():
            if name in own:
                # A moment that was measured again is another object.
                at = (key, name, quiet, id(own[name]))
                if at not in self._found:
                    self._found[at] = own[name].busy(quiet)
                found.append(self._found[at])
        return sorted(found, key=lambda columns: -columns.shape[1])


def projector(
    occupied: Occupied, *, output_side: bool, avoided: Callable[[str], list[Tensor]]
) -> Projector:
    """A function of the name of a map; what it gives is worked out once.

    Args:
        occupied: what is taken.
        output_side: whether directions that are written are to be kept clear of too.
        avoided: further input directions of a map, as orthonormal columns.
    """
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def project(name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in found:
            into = joined([*avoided(name), occupied.basis(name).columns])
            out = joined([occupied.basis(name, OUTPUT).columns]) if output_side else None
            found[name] = (into, out)
        return found[name]

    return project


def softened(project: Projector, strength: float) -> Projector:
    """As `project`, with columns of length `sqrt(strength)`: projecting them out takes the share
    `strength` of an overlap away, at every step. That is a penalty on the overlap, decoupled from
    the loss as AdamW's weight decay is (Loshchilov and Hutter 2019); whether it was enough is for
    the registry to say.

    Args:
        strength: in (0, 1]; 1 projects.
    """

    def pulled(name: str) -> tuple[Tensor | None, Tensor | None]:
        into, out = project(name)
        scale = strength**0.5
        return None if into is None else into * scale, None if out is None else out * scale

    return pulled


def sliced(project: Projector, features: Mapping[str, int], part: int, of: int) -> Projector:
    """As `project`, and confined to one of `of` disjoint sets of input features: updates that are
    trained at the same time, each in its own slice, are orthogonal to each other.

    Args:
        features: of the input of each map.
    """
    if of == 1:
        return project

    def confined(name: str) -> tuple[Tensor | None, Tensor | None]:
        into, out = project(name)
        own = torch.arange(features[name]) % of == part
        closed = torch.eye(features[name])[:, ~own]
        if into is None:
            return closed, out
        # What is taken, as far as it is seen from inside the slice.
        seen = orthonormal(torch.where(own[:, None], into.cpu(), 0.0))
        return torch.cat([closed, seen], 1), out

    return confined
