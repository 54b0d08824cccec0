"""Numbers as bits, column by column: uniform steps between ends that the training data choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.geolip.bits import pack_bits, unpack_bits

MOST_BITS = 8
# Half the distance of the ends, in standard deviations of the column: what is tried.
_REACHES = tuple(0.4 * 20.0 ** (index / 19) for index in range(20))
# More rows say the same about the ends.
_ROWS = 8192


@dataclass(frozen=True)
class ScalarCodes:
    """A quantiser of `[n, F]` values: column f in `2^bits[f]` equal steps of
    `centre[f] -+ reach[f]`; values beyond go to the outermost step, columns without bits to the
    centre."""

    centre: Tensor
    reach: Tensor
    bits: tuple[int, ...]

    def encode(self, values: Tensor) -> Tensor:
        """`[n, F]` as uint8 `[n, bytes]`, packed; each row fills whole bytes."""
        return pack_bits(self._steps(values), self.bits)

    def decode(self, packed: Tensor) -> Tensor:
        """The middle of each value's step, float32 `[n, F]`."""
        return self._middles(unpack_bits(packed, self.bits))

    @property
    def side_bytes(self) -> int:
        """What a reader needs beside the codes: the ends, and a byte for each column's bits."""
        return _held(self.centre) + _held(self.reach) + len(self.bits)

    def _steps(self, values: Tensor) -> Tensor:
        place = ((values - self.centre) / self.reach + 1) / 2
        count = self._counts()
        return (place * count).floor().clamp(min=0).minimum(count - 1).long()

    def _middles(self, steps: Tensor) -> Tensor:
        return self.centre + ((steps + 0.5) / self._counts() * 2 - 1) * self.reach

    def _counts(self) -> Tensor:
        return torch.tensor([float(1 << b) for b in self.bits], device=self.centre.device)


@dataclass(frozen=True)
class Distortions:
    """Mean squared errors on training values `[n, F]`, of each column at each number of bits.

    `error[b, f]` at b bits, 0 to 8, with the ends `centre[f] -+ reach[b, f]` that make it least.
    """

    centre: Tensor
    reach: Tensor
    error: Tensor

    def codes(self, bits: list[int] | Tensor) -> ScalarCodes:
        """The quantiser that gives each of the first columns its bits; the others are left out."""
        chosen = torch.as_tensor(bits)
        columns = torch.arange(len(chosen))
        reach = self.reach[chosen, columns]
        return ScalarCodes(self.centre[: len(chosen)].clone(), reach, tuple(chosen.tolist()))


def measure_distortions(values: Tensor, seed: int = 0) -> Distortions:
    """Find the best ends for each column of `[n, F]` at 0 to 8 bits, by trying out a few."""
    values = some_rows(values, seed)
    centre, spread = values.mean(0), values.std(0, correction=0).clamp(min=1e-12)
    least = [(values - centre).square().mean(0)]
    reaches = [spread]
    for bits in range(1, MOST_BITS + 1):
        error, reach = torch.full_like(centre, torch.inf), spread
        for factor in _REACHES:
            tried = ScalarCodes(centre, factor * spread, (bits,) * len(centre))
            found = (tried._middles(tried._steps(values)) - values).square().mean(0)
            reach = torch.where(found < error, tried.reach, reach)
            error = torch.minimum(found, error)
        least.append(error)
        reaches.append(reach)
    return Distortions(centre, torch.stack(reaches), torch.stack(least))


def some_rows(values: Tensor, seed: int = 0) -> Tensor:
    """As many of the rows `[n, F]` as ends are measured on, drawn by `seed`, or all of them."""
    if len(values) <= _ROWS:
        return values
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return values[order[:_ROWS]]


def allocate_bits(error: Tensor, total: int) -> Tensor:
    """Deal out `total` bits one by one, each to the column whose error it lowers most.

    Args:
        error: `[9, F]` of `Distortions`.
        total: bits of a row; at most 8 a column are given away.

    Returns:
        Bits of each column, int64 `[F]`.
    """
    bits = torch.zeros(error.shape[1], dtype=torch.long)
    gains = torch.cat([error[:-1] - error[1:], torch.full_like(error[:1], -torch.inf)])
    columns = torch.arange(len(bits))
    for _ in range(min(total, MOST_BITS * len(bits))):
        bits[gains[bits, columns].argmax()] += 1
    return bits


def _held(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
