"""How many directions of each map are taken, and how many are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .errors import ValidationError
from .subspaces import Basis
from .targets import in_out_features

INPUT, OUTPUT = "input", "output"
SIDES = (INPUT, OUTPUT)


class ModuleCapacity(NamedTuple):
    """Of one map.

    Args:
        features: directions that its inputs have.
        used: rank of what registered deltas read of them.
        deltas: how many of them change this map.
        features_out, used_out: the same of its outputs.
    """

    features: int
    used: int
    deltas: int
    features_out: int
    used_out: int

    @property
    def free(self) -> int:
        """Directions of the input that no delta reads: `features - used`."""
        return self.features - self.used

    @property
    def free_out(self) -> int:
        """Directions of the output that no delta writes."""
        return self.features_out - self.used_out

    def fits(self, rank: int, *, output_side: bool = False) -> int:
        """How many more deltas of `rank` have orthogonal directions left."""
        free = min(self.free, self.free_out) if output_side else self.free
        return max(free, 0) // rank

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "free": self.free, "free_out": self.free_out}


class Sizes(dict[str, tuple[int, int]]):
    """`(in, out)` of a model's maps, looked up when asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, name: str) -> tuple[int, int]:
        try:
            module = self._model.get_submodule(name)
        except AttributeError as error:
            raise ValidationError(
                f"registry: expected a linear map of the model, got {name!r}. See target_modules"
            ) from error
        self[name] = in_out_features(module)
        return self[name]


class Occupied:
    """Orthonormal bases of what is taken, by map and side. Never changed, only extended.

    Args:
        sizes: of each map, `(in, out)`.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        bases: Mapping[tuple[str, str], Basis] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes = sizes
        self._bases = dict(bases or {})
        self._counts = dict(counts or {})

    def basis(self, name: str, side: str = INPUT) -> Basis:
        """What is taken of one side of the map `name`; an empty basis where nothing is."""
        found = self._bases.get((name, side))
        return found if found is not None else Basis(self.sizes[name][SIDES.index(side)])

    def with_spans(self, spans: Mapping[str, tuple[Any, Any]]) -> Occupied:
        """With those of one more delta: name -> columns `(input, output)`."""
        bases, counts = dict(self._bases), dict(self._counts)
        for name, sides in spans.items():
            for side, columns in zip(SIDES, sides, strict=True):
                bases[name, side] = self.basis(name, side).extended(columns)
            counts[name] = counts.get(name, 0) + 1
        return Occupied(self.sizes, bases, counts)

    def of(self, name: str) -> ModuleCapacity:
        features, features_out = self.sizes[name]
        return ModuleCapacity(
            features,
            self.basis(name).rank,
            self._counts.get(name, 0),
            features_out,
            self.basis(name, OUTPUT).rank,
        )
