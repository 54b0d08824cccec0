"""Token ids, their masks, and the runs of placeholders that stand for images and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from integration.sweep.input_scene import BATCH, LENGTH, Scene
from torch import Tensor

Inputs = dict[str, Any]
_PADS = 2
_TYPES = {"image": 1, "video": 2, "audio": 3}


class Span(NamedTuple):
    """A run of placeholders: for which modality, which token, how many in each row."""

    modality: str
    token: int
    count: int


def text_options(scene: Scene, spans: Sequence[Span] = ()) -> Iterator[Inputs]:
    """Token ids with the last row padded, then without any padding, then without a mask."""
    if "input_ids" not in scene.accepts:
        yield {}
        return
    ids = _token_ids(scene, spans)
    plain = {"input_ids": ids, **_types(ids, spans)}
    if "attention_mask" in scene.accepts:
        yield _padded(scene, plain)
        if "decoder_input_ids" in scene.accepts and scene.model.main_input_name != "input_ids":
            yield {}
        yield {**plain, "attention_mask": torch.ones_like(ids)}
    yield plain
    if books := _codebooks(scene):
        stacked = scene.tokens(*ids.shape, books, vocabulary=_code_count(scene))
        yield {"input_ids": stacked, "attention_mask": torch.ones_like(ids)}
        yield {"input_ids": torch.cat([stacked, stacked[..., :1]], -1)}
        return
    yield {**plain, "use_cache": False}
    width = scene.number("hidden_size", "d_model", room="text", default=32)
    yield {"inputs_embeds": scene.normal(*ids.shape, width)}


def _codebooks(scene: Scene) -> int:
    return scene.number("num_codebooks", "num_audio_codebooks") or (
        scene.number("num_channels") if scene.read("delay_pattern") is not None else 0
    )


def _code_count(scene: Scene) -> int:
    return scene.number("codebook_size", "audio_vocab_size", "vocab_size", default=8)


def decoder_ids(scene: Scene) -> Inputs:
    """What the decoder of an encoder-decoder reads."""
    if "decoder_input_ids" not in scene.accepts:
        return {}
    return {"decoder_input_ids": scene.tokens(BATCH, _text_length(scene))}


def _text_length(scene: Scene) -> int:
    positions = scene.number("max_position_embeddings", "n_positions", room="text", default=LENGTH)
    books = scene.number("num_codebooks") if "depth" in scene.config.model_type else LENGTH
    return min(LENGTH, books, positions if positions > 1 else LENGTH)


def _token_ids(scene: Scene, spans: Sequence[Span]) -> Tensor:
    ids = scene.tokens(BATCH, _text_length(scene))
    # Three tokens lead (two of which may be padding), placeholders follow, one token between runs.
    parts = [ids[:, : _PADS + 1]]
    for place, span in enumerate(spans):
        parts.append(torch.full((BATCH, span.count), span.token))
        parts.append(ids[:, _PADS + 1 + place : _PADS + 2 + place])
    parts.append(ids[:, _PADS + 1 + len(spans) :])
    return torch.cat(parts, 1)


def _types(ids: Tensor, spans: Sequence[Span]) -> Inputs:
    """Which modality each token stands for; text is 0."""
    if not spans:
        return {}
    kinds = torch.zeros_like(ids)
    for span in spans:
        kinds[ids == span.token] = _TYPES[span.modality]
    places = kinds == _TYPES["image"]
    return {"mm_token_type_ids": kinds, "image_embeds_position_mask": places}


def _padded(scene: Scene, inputs: Inputs) -> Inputs:
    """The last row loses its first tokens (decoders) or its last ones (encoders) to padding."""
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    hidden = slice(0, _PADS) if scene.is_decoder() else slice(ids.shape[1] - _PADS, None)
    mask[-1, hidden] = 0
    pad = scene.number("pad_token_id", room="text", default=0)
    ids[-1, hidden] = pad if 0 <= pad < scene.vocabulary() else 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}
