"""Inputs that are neither text, pixels nor sound, by the name under which a forward takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from integration.sweep.input_scene import BATCH, LENGTH, Scene
from torch import Tensor

Maker = Callable[[Scene], Any]


def width(scene: Scene, *names: str) -> int:
    """Channels of a hidden state."""
    return scene.number(*names, "hidden_size", "d_model", "embed_dim", "dim", "n_embd", default=32)


def _states(*names: str, length: int = LENGTH) -> Maker:
    return lambda scene: scene.normal(BATCH, length, width(scene, *names))


def _boxes(scene: Scene) -> Tensor:
    corners = scene.tokens(BATCH, LENGTH, 2, vocabulary=16)
    return torch.cat([corners, corners + 4], -1)


def _series(scene: Scene) -> Tensor:
    lags = scene.read("lags_sequence", default=[0])
    past = scene.number("context_length", "past_length", default=16) + max(lags)
    channels = scene.read("num_input_channels", default=scene.number("input_size", default=1))
    if channels > 1 or scene.read("num_input_channels") is not None:
        return scene.normal(BATCH, past, channels)
    return scene.normal(BATCH, past)


def _time_features(scene: Scene) -> Tensor:
    past = _series(scene).shape[1]
    features = scene.number("num_time_features", default=1)
    return scene.normal(BATCH, past, features)


# name -> its maker; taken where forward requires the name.
MAKERS: dict[str, Maker] = {
    "hidden_states": _states(),
    "inputs_embeds": _states(),
    "encoder_hidden_states": _states("encoder_hidden_size", "cross_attention_hidden_size"),
    "query_embeds": _states(length=4),
    "attention_mask": lambda scene: scene.ones(BATCH, LENGTH),
    "bbox": _boxes,
    "past_values": _series,
    "past_time_features": _time_features,
    "past_observed_mask": lambda scene: torch.ones_like(_series(scene)),
    "past_values_padding": lambda scene: torch.zeros(_series(scene).shape, dtype=torch.long),
    "freq": lambda scene: torch.zeros(BATCH, 1, dtype=torch.long),
    "vision_features": _states(),
    "text_features": _states(),
    "vision_pos_encoding": _states(),
    "context": _states(),
    "visual_feats": lambda scene: scene.normal(BATCH, 4, scene.number("visual_feat_dim")),
    "visual_pos": lambda scene: scene.normal(BATCH, 4, scene.number("visual_pos_dim")),
    "audio_input_ids": lambda scene: scene.tokens(
        BATCH, 4, scene.number("num_codebooks", default=4)
    ),
    "num_patches": lambda scene: 4,
    "latents": lambda scene: scene.normal(BATCH, width(scene), 8),
}
# Taken too where forward accepts the name, if modules remain that nothing else reaches.
OPTIONAL: dict[str, Maker] = {
    "encoder_hidden_states": MAKERS["encoder_hidden_states"],
    "bbox": _boxes,
    "query_embeds": MAKERS["query_embeds"],
    "visual_feats": MAKERS["visual_feats"],
    "visual_pos": MAKERS["visual_pos"],
    "protein_input_ids": lambda scene: scene.tokens(
        BATCH, LENGTH, vocabulary=scene.number("vocab_size", room="protein")
    ),
    "protein_attention_mask": lambda scene: scene.ones(BATCH, LENGTH),
    "input_boxes": lambda scene: torch.tensor([[[0.3, 0.3, 0.4, 0.4]]] * BATCH),
    "input_boxes_labels": lambda scene: scene.ones(BATCH, 1),
    "backbone_last_hidden_state": lambda scene: scene.normal(
        BATCH, scene.number("backbone_hidden_size", "hidden_size")
    ),
}
# What lies beside the text, from its token ids.
BESIDE_TEXT: dict[str, Callable[[Scene, Tensor], Any]] = {
    "image_attention_mask": lambda scene, ids: torch.ones(*ids.shape, 1, dtype=torch.long),
    "cross_attention_mask": lambda scene, ids: torch.ones(
        *ids.shape, 1, scene.number("max_num_tiles", room="vision", default=1), dtype=torch.long
    ),
}


class UnknownInput(LookupError):
    """Forward requires an input that nothing here makes."""


def missing_inputs(scene: Scene, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs that forward requires beyond the given ones.

    Raises:
        UnknownInput: nothing here makes one of them.
    """
    missing = [name for name in scene.required if name not in given]
    unknown = [name for name in missing if name not in MAKERS]
    if unknown:
        raise UnknownInput(f"it requires {', '.join(unknown)}, which no rule makes")
    return {name: MAKERS[name](scene) for name in missing}


def beside_text(scene: Scene, given: dict[str, Any]) -> dict[str, Any]:
    """What goes with images and token ids together."""
    if "pixel_values" not in given or "input_ids" not in given:
        return {}
    return {name: make(scene, given["input_ids"]) for name, make in BESIDE_TEXT.items()}


def extra_inputs(scene: Scene, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Optional inputs: all together, then one after another."""
    names = [n for n in OPTIONAL if n in scene.accepts and n not in given]
    extras = {name: OPTIONAL[name](scene) for name in names}
    if len(names) > 1:
        yield extras
    yield from ({name: extra} for name, extra in extras.items())
