"""A linear map in two factors: fewer parameters and products than the dense map, at small ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`y = up(down(x))`: `down` `[r, in]` without a bias, `up` `[out, r]`.

    The product of the factors is never formed in a forward pass. A token costs `r (in + out)`
    multiplications where the dense map costs `in * out`, so a rank below `in * out / (in + out)`
    saves something. The factors are ordinary `nn.Linear` modules: peft, dtypes, devices and hooks
    find in them what they know.

    Args:
        in_features, out_features: widths of `x` `[..., in]` and `y` `[..., out]`.
        rank: of the map; what is above `min(in_features, out_features)` could hold no more, and is
            taken as that.
        bias: whether `up` has one.

    Raises:
        ValueError: a width or a rank below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in", in_features), ("out", out_features), ("rank", rank)):
            if value < 1:
                raise ValueError(
                    f"LowRankLinear: {name}: expected 1 or more, got {value!r}. A dense map is "
                    "nn.Linear, as linear(in, out, rank=None) gives"
                )
        rank = min(rank, in_features, out_features)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, the product of the factors: made anew at each reading, not a parameter."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def reset_parameters(self) -> None:
        """The variance of `y` is that of a fresh `nn.Linear` of these widths."""
        nn.init.uniform_(
            self.down.weight, -math.sqrt(3 / self.in_features), math.sqrt(3 / self.in_features)
        )
        nn.init.uniform_(self.up.weight, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factor_stds(in_features: int, rank: int, std: float) -> tuple[float, float]:
    """Standard deviations of `down.weight` and `up.weight`, both normal, with which `y` varies as
    with a dense weight of standard deviation `std`."""
    return 1 / math.sqrt(in_features), std * math.sqrt(in_features / rank)


def linear(
    in_features: int, out_features: int, rank: int | None, bias: bool = True
) -> nn.Linear | LowRankLinear:
    """`nn.Linear` where `rank` is None or 0, else a `LowRankLinear`."""
    if not rank:
        return nn.Linear(in_features, out_features, bias=bias)
    return LowRankLinear(in_features, out_features, rank, bias=bias)
