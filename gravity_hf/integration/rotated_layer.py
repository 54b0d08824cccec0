"""One layer of `RotatedQuantCache`: old tokens as codes, the newest as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.rotated_codec import Packed, RotatedCodec, rotation, rotation_in
from .packed_layer import PackedLayer


@dataclass(frozen=True)
class LayerSettings:
    """See `RotatedQuantCache`."""

    nbits_k: int
    nbits_v: int
    group: int
    residual: int
    min_length: int
    seed: int
    rotated: bool
    ranges: str

    def codec(self, width: int, bits: int) -> RotatedCodec:
        return RotatedCodec(width, bits, self.group, self.rotated, self.seed, self.ranges)


class RotatedQuantLayer(PackedLayer):
    """Keys and values of one layer.

    `keys`, `values` hold the newest tokens in the model's dtype, `[B, Hkv, T', D]`; the tokens
    before them lie in `packed_keys`, `packed_values`. A token moves from the one to the other once.
    """

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.packed_keys: Packed | None = None
        self.packed_values: Packed | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, T, D]`: old ones read from their codes, new ones as given.

        Raises:
            RuntimeError: tokens that need a gradient would be rounded.
        """
        length = self.get_seq_length() + key_states.shape[-2]
        moves = self._moving(length)
        if moves and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "RotatedQuantCache: expected keys and values without gradients, as codes have "
                "none, got some that require one. Use torch.no_grad(), or train with a DynamicCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        newest = super().update(key_states, value_states)
        keys, values = self._before(*newest)
        if moves:
            self._pack(moves, *newest)
        return keys, values

    def _moving(self, length: int) -> int:
        """How many tokens are to be packed once there are `length`."""
        block = self.settings.residual // 2
        plain = length - self.packed_length
        if length < self.settings.min_length or plain < self.settings.residual:
            return 0
        return (plain - block) // block * block

    def _before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What was packed, in front of plain keys and values."""
        if self.packed_keys is None or self.packed_values is None:
            return keys, values
        return (
            _joined(self._codec(keys, 0), self.packed_keys, keys),
            _joined(self._codec(values, 1), self.packed_values, values),
        )

    def _pack(self, tokens: int, keys: Tensor, values: Tensor) -> None:
        packed = self._codec(keys, 0).quantize(keys[..., :tokens, :])
        self.packed_keys = _appended(self.packed_keys, packed)
        packed = self._codec(values, 1).quantize(values[..., :tokens, :])
        self.packed_values = _appended(self.packed_values, packed)
        # Copies: a view would keep the storage of what was packed.
        self.keys = keys[..., tokens:, :].clone()
        self.values = values[..., tokens:, :].clone()

    def _codec(self, states: Tensor, which: int) -> RotatedCodec:
        bits = self.settings.nbits_v if which else self.settings.nbits_k
        return self.settings.codec(states.shape[-1], bits)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens away; those before them stay what they are.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected a negative number, of tokens to remove, got {tokens_to_remove!r}. "
                f"Use {tokens_to_remove} - length to keep so many"
            )
        if tokens_to_remove == 0 or self.keys is None or self.values is None:
            return
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        if left < self.packed_length:
            self._each(lambda x: x[:, :, :left].clone(), plain=False)
        plain = left - self.packed_length
        self.keys = self.keys[..., :plain, :].clone()
        self.values = self.values[..., :plain, :].clone()

    @property
    def packed_length(self) -> int:
        return 0 if self.packed_keys is None else self.packed_keys.codes.shape[-2]

    @property
    def packed(self) -> list[Tensor]:
        both = [x for x in (self.packed_keys, self.packed_values) if x is not None]
        return [part for packed in both for part in packed]

    def turns(self) -> list[Tensor]:
        if not self.settings.rotated:
            return []
        found = []
        for states in (self.keys, self.values):
            if states is not None:
                width, seed = states.shape[-1], self.settings.seed
                # To pack with, and to read with.
                found.append(rotation(width, seed, states.device))
                found.append(rotation_in(width, seed, states.device, states.dtype))
        return found

    def reset(self) -> None:
        super().reset()
        self.packed_keys = self.packed_values = None

    def _each(self, change: Callable[[Tensor], Tensor], *, plain: bool = True) -> None:
        """`change` what is held; batch is the first dimension of all of it, tokens the third."""
        if plain and self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.packed_keys is not None and self.packed_values is not None:
            self.packed_keys = self.packed_keys.changed(change)
            self.packed_values = self.packed_values.changed(change)


def _joined(codec: RotatedCodec, packed: Packed, plain: Tensor) -> Tensor:
    old = packed.codes.shape[-2]
    joined = plain.new_empty(*plain.shape[:-2], old + plain.shape[-2], plain.shape[-1])
    codec.dequantize_into(packed, joined[..., :old, :])
    joined[..., old:, :] = plain
    return joined


def _appended(packed: Packed | None, new: Packed) -> Packed:
    if packed is None:
        return new
    return Packed(*(torch.cat(both, 2) for both in zip(packed, new, strict=True)))
