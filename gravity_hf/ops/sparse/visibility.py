"""Which keys a query may see at all: causality, padding and masks as intervals and flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import split_mask


@dataclass(frozen=True, eq=False)
class Visibility:
    """Query `i` of batch row `b` sees key `j` iff `first <= j <= last` and `allowed`.

    first: int64 `[B|1, Tq|1]`, last: int64 `[B|1, Tq]`, the first and the last key that it sees; -1
    for `last` where it sees none. allowed: bool `[B|1, Tq|1, Tk]`, or None: all. bias: added to
    scores, `[B|1, 1, Tq|1, Tk]`. origin: int64 `[B|1]`, where the blocks
    of a batch row begin; None: at key 0, for all.
    """

    first: Tensor
    last: Tensor
    allowed: Tensor | None
    bias: Tensor | None
    origin: Tensor | None
    keys: int

    @property
    def queries(self) -> int:
        return self.last.shape[1]

    def rows(self, rows: slice | Tensor) -> Visibility:
        """That of some of the queries; rows: a slice, or int64 `[R]`."""
        allowed, bias = self.allowed, self.bias
        if allowed is not None and allowed.shape[1] > 1:
            allowed = allowed[:, rows]
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, rows]
        first = self.first if self.first.shape[1] == 1 else self.first[:, rows]
        return Visibility(first, self.last[:, rows], allowed, bias, self.origin, self.keys)

    def as_int32(self, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """first `[B, Tq|1]`, last `[B, Tq]` and origin `[B]` as kernels read them, contiguous."""
        first = self.first.to(torch.int32).expand(batch, -1).contiguous()
        last = self.last.to(torch.int32).expand(batch, self.queries).contiguous()
        origin = self.origin
        if origin is not None:
            origin = origin.to(torch.int32).expand(batch).contiguous()
        return first, last, origin

    def mask(self) -> Tensor:
        """Bool `[B|1, 1, Tq, Tk]`."""
        key = torch.arange(self.keys, device=self.last.device)
        seen = (key >= self.first.unsqueeze(-1)) & (key <= self.last.unsqueeze(-1))
        return (seen if self.allowed is None else seen & self.allowed).unsqueeze(1)

    def at(self, index: Tensor) -> Tensor:
        """Bool: whether keys `index` `[B, G, Tq, S]`, in range, are visible to their queries."""
        seen = (index >= _per_row(self.first)) & (index <= _per_row(self.last))
        if self.allowed is None:
            return seen
        batch, key_heads, queries, _ = index.shape
        allowed = self.allowed.expand(batch, queries, self.keys)[:, None]
        return seen & allowed.expand(-1, key_heads, -1, -1).gather(3, index)

    def bias_at(self, index: Tensor) -> Tensor | None:
        """Of keys `index` `[B, G, Tq, S]`."""
        if self.bias is None:
            return None
        batch, key_heads, queries, _ = index.shape
        return self.bias.expand(batch, key_heads, queries, self.keys).gather(3, index)


def _per_row(x: Tensor) -> Tensor:
    """`[B|1, Tq]` beside `[B, G, Tq, S]`."""
    return x[:, None, :, None]


def own_positions(queries: int, keys: int, positions: Tensor | None, device: object) -> Tensor:
    """int64 `[B|1, Tq]`: the last key that causality lets a query see."""
    if positions is None:
        return torch.arange(keys - queries, keys, device=device)[None]
    positions = positions.to(torch.int64)
    return positions[None] if positions.dim() == 1 else positions


def visibility(
    queries: int,
    keys: int,
    mask: Tensor | None,
    positions: Tensor | None,
    origin: Tensor | None,
    device: torch.device,
) -> Visibility:
    """From the arguments of `sparse_attention`, checked."""
    own = own_positions(queries, keys, positions, device)
    if mask is None:
        return Visibility(own.new_zeros(1, 1), own.clamp(-1, keys - 1), None, None, origin, keys)
    if mask.dim() == 2 and not mask.is_floating_point():
        mask = mask.to(torch.bool)[:, None, None]
    elif mask.dim() == 2:
        mask = mask[:, None, None]
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:3], keys)
    allowed, bias = split_mask(mask)
    if bias is not None:
        bias = bias.masked_fill(~allowed, 0.0)
        # Most hosts only hide with it; to add nothing costs as much as to add something.
        plain = bias.device.type == "cpu" and not torch.compiler.is_compiling()
        if plain and not bias.requires_grad and not bias.any():
            bias = None
    allowed = allowed[:, 0]
    if allowed.shape[1] == 1:
        first, last = _of_padding(allowed[:, 0], own)
    else:
        key = torch.arange(keys, device=device)
        allowed = allowed & (key <= own.unsqueeze(-1))
        first, last = _ends(allowed)
    if origin is None:
        seen = first.masked_fill(last < 0, keys)
        origin = seen.amin(1).clamp(max=max(keys - 1, 0))
    return Visibility(first, last, allowed, bias, origin, keys)


def _of_padding(allowed: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """First `[B, 1]` and last visible keys `[B, Tq]` under padding `[B, Tk]` and causality `[B|1,
    Tq]`."""
    key = torch.arange(allowed.shape[1], device=allowed.device)
    before = torch.where(allowed, key, -1).cummax(1).values
    own = own.expand(allowed.shape[0], -1)
    last = before.gather(1, own.clamp(min=0, max=allowed.shape[1] - 1))
    first = allowed.to(torch.int8).argmax(1, keepdim=True)
    return first, last.masked_fill(own < 0, -1)


def _ends(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """First and last True along the last dimension; 0 and -1 where there is none."""
    flags = allowed.to(torch.int8)
    first = flags.argmax(-1)
    last = allowed.shape[-1] - 1 - flags.flip(-1).argmax(-1)
    return first, last.masked_fill(~allowed.any(-1), -1)
