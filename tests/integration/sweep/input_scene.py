"""What a tiny model's config and signature say about the inputs that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH = 2
LENGTH = 9
# Keys of sub-configs, by the modality that they describe; the first that matches is read first.
_ROOMS = {
    "text": ("text", "llm", "language", "decoder", "backbone", "generator", "thinker"),
    "vision": ("vision", "image", "vit", "visual", "vq", "backbone", "thinker"),
    "audio": ("audio", "speech", "encoder", "thinker"),
    "qformer": ("qformer",),
    "semantic": ("semantic",),
    "high_res": ("high_res",),
}


class Scene:
    """A model seen through the names of its config, its forward and its feature methods."""

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.model = model
        self.config = model.config
        self.generator = torch.Generator().manual_seed(seed)
        parameters = list(inspect.signature(model.forward).parameters.values())
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.accepts = {p.name for p in named}
        self.required = [p.name for p in named if p.default is p.empty]

    def read(self, *names: str, room: str = "", default: Any = None) -> Any:
        """The first of `names` that a config has and that is not None, `room`'s configs first."""
        configs = list(walk_configs(self.config))
        keys = _ROOMS.get(room, ())
        configs.sort(key=lambda item: _rank(item[0], keys))
        for name in names:
            for _, config in configs:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, room: str = "", default: int = 0) -> int:
        """`read`, as one integer: the last of a list."""
        value = self.read(*names, room=room, default=default)
        while isinstance(value, (list, tuple)):
            value = value[-1] if value else default
        return int(value)

    def size(self, room: str = "vision", default: int = 32) -> tuple[int, int]:
        """Height and width of an image."""
        value = self.read("image_size", "img_size", "input_size", room=room, default=default)
        if isinstance(value, dict):
            value = [value.get("height", default), value.get("width", default)]
        if isinstance(value, (list, tuple)):
            value = [int(v) for v in value if isinstance(v, int)] or [default]
            return (value[-2], value[-1]) if len(value) > 1 else (value[0], value[0])
        return int(value), int(value)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(*shape, generator=self.generator)

    def ones(self, *shape: int) -> Tensor:
        """A mask that hides nothing."""
        return torch.ones(*shape, dtype=torch.long)

    def tokens(self, *shape: int, vocabulary: int | None = None) -> Tensor:
        """Token ids without any special one."""
        size = vocabulary or self.vocabulary()
        special = self.special_tokens()
        usual = [i for i in range(size) if i not in special] or [0]
        picks = torch.randint(len(usual), shape, generator=self.generator)
        return torch.tensor(usual)[picks]

    def vocabulary(self) -> int:
        """Token ids that the embedding and the config both know."""
        sizes = [self.number("vocab_size", "text_vocab_size", room="text", default=64)]
        table = getattr(_embeddings(self.model), "num_embeddings", None)
        if isinstance(table, int):
            sizes.append(table)
        return min(sizes)

    def special_tokens(self) -> set[int]:
        """Every id that some config names: padding, ends, placeholders."""
        special: set[int] = {0}
        for _, config in walk_configs(self.config):
            for name, value in vars(config).items():
                if name.endswith(("token_id", "token_index", "token_ids", "_id", "_token")):
                    values = value if isinstance(value, (list, tuple)) else [value]
                    special.update(v for v in values if type(v) is int)
        return special

    def owner(self, method: str) -> Any:
        """The model or its inner model that has `method`; None where neither has."""
        # The inner one first: an outer method may pass everything on without naming it.
        inner = getattr(self.model, "model", None)
        base = getattr(self.model, "base_model", None)
        return next((m for m in (inner, base, self.model) if hasattr(m, method)), None)

    def takes_grid_only(self) -> bool:
        """Whether it is a vision tower whose patches come under the name of hidden states."""
        return "grid_thw" in self.accepts and "input_ids" not in self.accepts

    def is_decoder(self) -> bool:
        """Whether the text grows to the right, so that padding belongs on the left."""
        encodes = getattr(self.config, "is_encoder_decoder", False)
        return self.model.can_generate() and not encodes


def walk_configs(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, config)` of a config and of all its sub-configs, outermost first."""
    yield key, config
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from walk_configs(value, f"{key}.{name}" if key else name)


def _rank(key: str, wanted: tuple[str, ...]) -> tuple[int, int]:
    depth = key.count(".")
    for place, word in enumerate(wanted):
        if word in key:
            return place, depth
    return len(wanted) + (key != ""), depth


def _embeddings(model: PreTrainedModel) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
