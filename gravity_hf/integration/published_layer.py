"""A cache layer as the published LeanFormer describes one, to compare `RotatedQuantCache` with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.published_codec import PublishedCodec, PublishedPacked
from ..ops.rotated_codec import rotation
from .packed_layer import PackedLayer


class PublishedQuantLayer(PackedLayer):
    """All but the newest `residual` tokens are coded, whatever the length, and coded anew each time
    that one more is: errors add up, and the work for each token grows with the length."""

    is_croppable = False

    def __init__(self, nbits_k: int, nbits_v: int, residual: int, seed: int) -> None:
        super().__init__()
        # Two matrices of one seed would be one.
        self.codecs = (PublishedCodec(nbits_k, seed), PublishedCodec(nbits_v, seed + 1))
        self.residual = residual
        self.codes: tuple[PublishedPacked, PublishedPacked] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, T, D]`: coded ones as read, new ones as given."""
        keys, values = super().update(key_states, value_states)
        if self.codes is not None:
            keys = torch.cat([self._read(self.codes, 0, keys), keys], -2)
            values = torch.cat([self._read(self.codes, 1, values), values], -2)
        over = keys.shape[-2] - self.residual
        if over > 0:
            self.codes = (
                self.codecs[0].quantize(keys[..., :over, :]),
                self.codecs[1].quantize(values[..., :over, :]),
            )
            self.keys, self.values = keys[..., over:, :].clone(), values[..., over:, :].clone()
        return keys, values

    def _read(self, codes: tuple[PublishedPacked, ...], which: int, like: Tensor) -> Tensor:
        return self.codecs[which].dequantize(codes[which], like.shape[1], like.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was coded together with the tokens that go cannot be told from them."""
        raise NotImplementedError(
            "crop: expected a cache whose tokens are coded one by one, got the published codec. "
            "Use RotatedQuantCache(codec='rotated')"
        )

    @property
    def packed_length(self) -> int:
        return 0 if self.codes is None else self.codes[0].codes.shape[1]

    @property
    def packed(self) -> list[Tensor]:
        return [part for both in self.codes or () for part in both]

    def turns(self) -> list[Tensor]:
        return [
            rotation(states.shape[1] * states.shape[-1], codec.seed, states.device)
            for codec, states in zip(self.codecs, (self.keys, self.values), strict=True)
            if states is not None
        ]

    def reset(self) -> None:
        super().reset()
        self.codes = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        if self.codes is not None:
            keys, values = (x._replace(codes=change(x.codes)) for x in self.codes)
            self.codes = keys, values
