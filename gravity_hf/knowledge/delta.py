"""A low-rank delta: what a fact adds to some linear maps of a frozen model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .errors import IncompatibleBaseError, UnsafeFileError, ValidationError
from .targets import base_model, in_out_features, is_linear, target_modules

__all__ = ["LowRankDelta", "in_out_features", "target_modules"]

# Suffixes of the tensors in a file; peft's words for the two factors.
_A, _B = ".lora_A", ".lora_B"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """Factors of one update for each of some linear maps: `y = W x + B (A x)`.

    Args:
        factors: name of the map in the base model -> `(A [r, in], B [out, r])`, of one float dtype
            each. Ranks may differ between maps. Kept sorted by name.

    Raises:
        ValidationError: no maps, or factors that do not fit each other.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "low_rank"  # its word in files

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValidationError("LowRankDelta: expected factors of at least one map, got none")
        for name, pair in self.factors.items():
            _check_pair(name, pair)
        ordered = {name: tuple(self.factors[name]) for name in sorted(self.factors)}
        object.__setattr__(self, "factors", ordered)

    def parameters(self) -> int:
        """How many numbers it consists of."""
        return sum(A.numel() + B.numel() for A, B in self.factors.values())

    def nbytes(self) -> int:
        """How many bytes they take in memory."""
        return sum(A.nbytes + B.nbytes for A, B in self.factors.values())

    def rank(self, name: str) -> int:
        """Columns of `B` for the map `name`, which is the most that `B A` can have as its rank."""
        return self._pair(name)[0].shape[0]

    def update(self, name: str) -> Tensor:
        """`B A [out, in]` of one map, float32."""
        A, B = self._pair(name)
        return B.float() @ A.float()

    def norm(self) -> float:
        """Frobenius norm of all updates together: `sqrt(sum tr(B'B AA'))`, never formed densely."""
        total = 0.0
        for A, B in self.factors.values():
            A, B = A.double(), B.double()
            total += float(((B.T @ B) * (A @ A.T)).sum())
        return math.sqrt(max(total, 0.0))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The same on a device, in a dtype."""
        return type(self)(
            {n: (A.to(device, dtype), B.to(device, dtype)) for n, (A, B) in self.factors.items()}
        )

    def scaled(self, weight: float) -> Self:
        """The same with every update times `weight`."""
        return type(self)({name: (A, B * weight) for name, (A, B) in self.factors.items()})

    @classmethod
    def sum(cls, deltas: Sequence[LowRankDelta]) -> Self:
        """One that does what all of them do together, exactly: the ranks add up.

        Raises:
            ValidationError: none given, or one of another kind.
        """
        odd = [type(delta).__name__ for delta in deltas if type(delta) is not cls]
        if odd:
            raise ValidationError(
                f"{cls.__name__}.sum: expected this kind, got {odd[0]}. Sum each kind alone"
            )
        names = {name for delta in deltas for name in delta.factors}
        joined = {}
        for name in names:
            pairs = [delta.factors[name] for delta in deltas if name in delta.factors]
            joined[name] = (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))
        return cls(joined)

    def check(self, model: nn.Module) -> None:
        """Raise unless the delta can be put on `model`.

        Raises:
            IncompatibleBaseError: a map that the model lacks, or one of another shape.
            UnsafeFileError: NaN or an infinity.
        """
        model = base_model(model)
        modules = dict(model.named_modules())
        for name, (A, B) in self.factors.items():
            if name not in modules or not is_linear(modules[name]):
                raise IncompatibleBaseError(
                    f"delta: expected a linear map called {name} in {type(model).__name__}, got "
                    f"{'another module' if name in modules else 'none'}. The delta belongs to "
                    "another base"
                )
            expected, got = in_out_features(modules[name]), (A.shape[1], B.shape[0])
            if expected != got:
                raise IncompatibleBaseError(
                    f"delta: {name}: expected {expected[0]} features in and {expected[1]} out, got "
                    f"{got[0]} and {got[1]}. The delta belongs to another base"
                )
        self.check_finite()

    def check_finite(self) -> None:
        """Raise UnsafeFileError where a factor has NaN or an infinity."""
        for name, pair in self.factors.items():
            for letter, factor in zip("AB", pair, strict=True):
                if not factor.isfinite().all():
                    raise UnsafeFileError(
                        f"delta: {name}: expected finite numbers in {letter}, got NaN or an "
                        "infinity. Train or export it again"
                    )

    def to_tensors(self) -> dict[str, Tensor]:
        """`<name>.lora_A` and `<name>.lora_B`, contiguous, for a safetensors file."""
        tensors = {}
        for name, (A, B) in self.factors.items():
            tensors[name + _A] = A.detach().contiguous()
            tensors[name + _B] = B.detach().contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`.

        Raises:
            UnsafeFileError: other names, a factor without its partner, shapes or dtypes that are
                not those of factors.
        """
        names = {name[: -len(_A)] for name in tensors if name.endswith((_A, _B))}
        expected = {name + suffix for name in names for suffix in (_A, _B)}
        odd = sorted(expected.symmetric_difference(tensors))
        if odd:
            raise UnsafeFileError(
                f"delta: expected pairs of <map>{_A} and <map>{_B}, got "
                f"{odd[0]!r} {'alone' if odd[0] in tensors else 'missing'}"
            )
        try:
            return cls({name: (tensors[name + _A], tensors[name + _B]) for name in names})
        except ValidationError as error:
            raise UnsafeFileError(str(error)) from error

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self.factors:
            raise ValidationError(
                f"delta: expected one of the maps {', '.join(self.factors)}, got {name!r}"
            )
        return self.factors[name]


def _check_pair(name: str, pair: tuple[Tensor, Tensor]) -> None:
    A, B = pair
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and min(*A.shape, *B.shape) > 0
    if not fits:
        raise ValidationError(
            f"LowRankDelta: {name}: expected A [rank, in] and B [out, rank] with a rank of at "
            f"least 1, got {list(A.shape)} and {list(B.shape)}"
        )
    if A.dtype != B.dtype or A.dtype not in _DTYPES:
        raise ValidationError(
            f"LowRankDelta: {name}: expected both factors in one of float32, float16, bfloat16 or "
            f"float64, got {A.dtype} and {B.dtype}"
        )
