"""A key-value cache of a few bits per number for `generate`, of any model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..ops.code_packing import BITS
from ..ops.rotated_codec import RANGES
from .cache_memory import held_bytes, tensors_in
from .packed_layer import PackedLayer
from .published_layer import PublishedQuantLayer
from .rotated_layer import LayerSettings, RotatedQuantLayer

CODECS = ("rotated", "reference")
_HALF = 2  # bytes of a float16


class RotatedQuantCache(Cache):
    """Keys and values in 4 bits (or 2, or 8), turned before they are rounded: `RotatedCodec`.

        cache = RotatedQuantCache(config=model.config)
        model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache
        cache.memory()["ratio"]

    The newest tokens stay as they are: at least `residual // 2` of them, and fewer than `residual`.
    When there are `residual`, the oldest `residual // 2` are packed together, once; what is packed
    is never written anew. What a call gives is also what it attends to: a prompt attends to its own
    keys and values as they were computed, and only later tokens see the codes.

    With fewer than `min_length` tokens nothing is packed, and a DynamicCache would give the same to
    the last bit. A layer reads its codes into keys and values of the model's dtype while it
    attends, `memory()["working_bytes"]`; they are gone when the next layer does.

    Layers with a sliding window keep their few tokens as transformers does, and so do all layers
    but those of full attention (recurrent ones, say).

    Args:
        config: of the model. None: every layer is one of full attention.
        nbits_k, nbits_v: of keys and of values.
        group: numbers of a head that share a range; in a head that is no multiple of it, its
            largest divisor below.
        residual: newest tokens that are not packed, see above.
        min_length: tokens from which on anything is packed.
        seed: of the turn.
        rotated: False leaves the turn out; to see what it is worth.
        ranges: "byte" or "half", see `RotatedCodec`.
        codec: "reference" stores what the published LeanFormer does, to compare: `group`,
            `min_length`, `rotated` and `ranges` mean nothing to it, and it cannot be cropped.

    Raises:
        ValueError: a number outside its range, or a model without a layer of full attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        nbits_k: int = 4,
        nbits_v: int = 4,
        group: int = 64,
        residual: int = 128,
        min_length: int = 1024,
        seed: int = 42,
        *,
        rotated: bool = True,
        ranges: str = "byte",
        codec: str = "rotated",
    ) -> None:
        self.settings = LayerSettings(
            nbits_k, nbits_v, group, residual, min_length, seed, rotated, ranges
        )
        _check(self.settings)
        if codec not in CODECS:
            raise ValueError(f"RotatedQuantCache.codec: expected one of {CODECS}, got {codec!r}")
        self.codec = codec
        if config is None:
            super().__init__(layer_class_to_replicate=self._new_layer)
            return
        # Which layer is of which kind depends on the version; a DynamicCache knows.
        layers = DynamicCache(config=config).layers
        if not any(type(x) is DynamicLayer for x in layers):
            kinds = sorted({type(x).__name__ for x in layers})
            raise ValueError(
                f"RotatedQuantCache: expected a model with a layer of full attention, got {kinds} "
                "only, so nothing would be packed. Use a DynamicCache"
            )
        super().__init__(
            layers=[self._new_layer() if type(x) is DynamicLayer else x for x in layers]
        )

    def _new_layer(self) -> PackedLayer:
        if self.codec == "rotated":
            return RotatedQuantLayer(self.settings)
        known = self.settings
        return PublishedQuantLayer(known.nbits_k, known.nbits_v, known.residual, known.seed)

    def memory(self) -> dict[str, Any]:
        """What the cache takes, from the storages behind every tensor that it holds.

        `bytes`: of all of them, each storage once and whole, with the turning matrices.
        `fp16_bytes`: of the same tokens in float16. `ratio`: the second over the first, None where
        nothing is held. `working_bytes`: of the keys and values that the largest layer reads its
        codes into while it attends. `tokens`, `packed_tokens`: of the longest packed layer.
        `packed_layers`: how many layers pack. `other_layers`: the classes of those that do not.
        """
        ours = [x for x in self.layers if isinstance(x, PackedLayer)]
        others = [x for x in self.layers if not isinstance(x, PackedLayer)]
        held = [x for layer in ours for x in layer.tensors()]
        foreign = [x for layer in others for x in tensors_in(vars(layer))]
        half = sum(layer.plain_bytes(_HALF) for layer in ours)
        half += sum(x.numel() * _HALF for x in foreign if x.is_floating_point())
        taken = held_bytes([*held, *foreign])
        return {
            "bytes": taken,
            "fp16_bytes": half,
            "ratio": half / taken if half else None,
            "working_bytes": max((x.working_bytes() for x in ours), default=0),
            "tokens": max((x.get_seq_length() for x in ours), default=0),
            "packed_tokens": max((x.packed_length for x in ours), default=0),
            "packed_layers": len(ours),
            "other_layers": sorted({type(x).__name__ for x in others}),
        }


def _check(settings: LayerSettings) -> None:
    wrong = "RotatedQuantCache.{}: expected {}, got {!r}"
    for name in ("nbits_k", "nbits_v"):
        if getattr(settings, name) not in BITS:
            raise ValueError(wrong.format(name, f"one of {BITS}", getattr(settings, name)))
    for name, least in {"group": 1, "residual": 2, "min_length": 0, "seed": 0}.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(wrong.format(name, f"an integer of at least {least}", value))
    if settings.ranges not in RANGES:
        raise ValueError(wrong.format("ranges", f"one of {RANGES}", settings.ranges))
