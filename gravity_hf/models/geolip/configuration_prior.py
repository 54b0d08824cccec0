"""Settings of a prior over the codes of a geolip."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..settings import settle_names

_COUNTS = (
    *("num_tokens", "num_rows", "base_dim", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size"),
)


@strict
class GeolipPriorConfig(PreTrainedConfig):
    """Settings of a prior: which codes there are, and the transformer that moves noise to them.

    Args:
        num_tokens: `N`, tokens of one input, each with a place of its own; shorter inputs take the
            first places.
        num_rows, base_dim: `V` and `d` of the geolip whose frames these are.
        hidden_size: width of the transformer, a multiple of `num_attention_heads`.
        intermediate_size: of its feed-forward networks; None: `4 hidden_size`.
        dropout: in its layers, while it is trained.
        initializer_range: of the table of places. The default is about as large as what a new model
            makes of codes; with small ones tokens learn late to go together.
        geolip_name_or_path: the geolip whose decoder makes something of the codes; None: not said.
        geolip_digest: of what that geolip decodes with, see `decoder_digest`; None: not said, and
            then no geolip is refused.

    Raises:
        ValueError: an unknown name.
        StrictDataclassError: a value outside its range, or of a wrong type.
    """

    model_type = "geolip_prior"

    num_tokens: int = 64
    num_rows: int = 32
    base_dim: int = 4
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float | int = 0.5
    geolip_name_or_path: str | None = None
    geolip_digest: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**settle_names(self, kwargs))

    @property
    def code_size(self) -> int:
        """`V d`, coordinates of one token."""
        return self.num_rows * self.base_dim

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        for name in _COUNTS:
            value = getattr(self, name)
            least = 2 if name in ("num_rows", "base_dim") else 1
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _expect(fits, name, f"an integer >= {least}", value)
        if self.hidden_size % self.num_attention_heads:
            expected = f"a multiple of num_attention_heads ({self.num_attention_heads})"
            _expect(False, "hidden_size", expected, self.hidden_size)
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            _expect(_is_finite(value) and value > 0, name, "a finite number > 0", value)
        fits = _is_finite(self.dropout) and 0 <= self.dropout < 1
        _expect(fits, "dropout", "a number in [0, 1)", self.dropout)


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"GeolipPriorConfig.{name}: expected {expected}, got {got!r}")


__all__ = ["GeolipPriorConfig"]
