"""Which layers of a default configuration a tiny one keeps: one of every kind."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

_DEPTH = ("num_hidden_layers", "depth", "n_layers", "num_layers", "n_layer", "encoder_layers")
_INDICES = r".*(_indexes|_indices|_block_ids|extract_layers|_layer_ids|_hook_ids|_target_layers)"
# Lists that work as well with one entry; the others are read at every one of their places.
_SHORTENED = r".*(fullatt|full_attn|global_attn|deepstack|window_block|windowed).*"
_OF_STAGES = r".*(sizes|dims|channels|filters|widths|_projection_indices)|depths|layers"
_MOST_KINDS = 5


def read(config: PreTrainedConfig, name: str) -> Any:
    """A value of a configuration, also where single layers differ from it."""
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name, None) if reader else getattr(config, name, None)


def default_depth(config: PreTrainedConfig) -> int | None:
    """The number of layers; None where there are none, or stages of them."""
    if hasattr(config, "depths"):
        return None
    values = (read(config, name) for name in _DEPTH)
    return next((v for v in values if isinstance(v, int) and v > 0), None)


class KeptLayers(NamedTuple):
    """Default layers that stay, in order: one of each kind, all named by an index, at least two."""

    depth: int
    layers: list[int]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> KeptLayers | None:
        depth = default_depth(config)
        if depth is None:
            return None
        fields = {f.name: read(config, f.name) for f in dataclasses.fields(config)}
        named = _backbone_layers(config, depth)
        for name, value in fields.items():
            named.update(i for i in _indices(name, value) if 0 <= i < depth)
        everything = cls(depth, list(range(depth)))
        lists = [v for name, v in fields.items() if everything.is_per_layer(name, v)]
        single = _single_layers(config)
        kinds: dict[str, int] = {}
        for i in range(depth):
            kinds.setdefault(repr([[v[i] for v in lists], single.get(i)]), i)
        kept = sorted({*list(kinds.values())[:_MOST_KINDS], *named})
        spare = [i for i in range(depth) if i not in kept]
        return cls(depth, sorted(kept + spare[: max(2 - len(kept), 0)]))

    def is_per_layer(self, name: str, value: object) -> bool:
        """Whether `value` has an entry for each layer."""
        return (
            isinstance(value, (list, tuple))
            and len(value) == self.depth > 1
            and not re.fullmatch(f"{_OF_STAGES}|{_INDICES}", name)
        )

    def select(self, name: str, value: list[Any]) -> list[Any]:
        """The part of a list that speaks of the layers that stay."""
        if self.is_per_layer(name, value):
            return [value[i] for i in self.layers]
        named = _indices(name, value)
        if named and all(i in self.layers for i in named):
            return [self.layers.index(i) for i in named]
        return value

    def arguments(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The new depth, and what single layers have of their own."""
        fields = {f.name for f in dataclasses.fields(config)}
        out: dict[str, Any] = {
            name: len(self.layers)
            for name in _DEPTH
            if name in fields and read(config, name) == self.depth
        }
        if getattr(config, "is_heterogeneous", False):
            single = _single_layers(config)
            out["per_layer_config"] = {
                j: dict(single[i]) for j, i in enumerate(self.layers) if i in single
            }
        return out


def _indices(name: str, value: object) -> list[int]:
    if not isinstance(value, (list, tuple)) or not re.fullmatch(_INDICES, name):
        return []
    if re.fullmatch(_OF_STAGES, name) or not all(type(v) is int for v in value):
        return []
    return list(value[:1] if re.fullmatch(_SHORTENED, name) else value)


def _backbone_layers(config: PreTrainedConfig, depth: int) -> set[int]:
    names = getattr(config, "stage_names", None)
    if not names or len(names) != depth + 1:
        return set()
    return {i % len(names) - 1 for i in config.out_indices or [] if i % len(names)}


def _single_layers(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    spec = getattr(config, "_heterogeneity_spec", None)
    return spec.per_layer_overrides if spec is not None else {}
