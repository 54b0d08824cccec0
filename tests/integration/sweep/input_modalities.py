"""Which towers a model has, what they take, and how many placeholders each fills in the text."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from integration.sweep.input_scene import BATCH, LENGTH, Scene
from integration.sweep.input_text import Inputs, Span
from integration.sweep.input_towers import audio_options, image_options, video_options
from torch import Tensor

_TOKEN_NAMES = "{0}_token_id", "{0}_token_index", "{0}_placeholder_token_id", "media_token_id"
_PIXELS = {"pixel_values", "flattened_patches", "image", "image_pixel_values"}
_RUNNING = 3


class Pack(NamedTuple):
    """What one tower takes, and the placeholders for it (None: the text has none)."""

    inputs: Inputs
    span: Span | None


def packs_of(scene: Scene, modality: str) -> list[Pack]:
    """Ways to feed the tower of `modality`, the likeliest first; none where there is no tower.

    Where a model can run the tower by itself (`get_image_features`), the first inputs that it
    accepts are the only ones returned, with the rows of features that come out counted.
    """
    options = list(_options(scene, modality))
    if not options:
        return []
    method = getattr(scene.owner(f"get_{modality}_features"), f"get_{modality}_features", None)
    token = scene.read(*(n.format(modality) for n in _TOKEN_NAMES))
    if token is None and "image_embeds_position_mask" in scene.accepts:
        token = scene.number("pad_token_id", room="text") + 1
    if not isinstance(token, int) or "input_ids" not in scene.accepts:
        return [Pack(option, None) for option in options]
    running = _those_that_run(scene, method, options) if method is not None else iter(())
    found = list(itertools.islice(running, _RUNNING))
    if not found:
        found = list(itertools.islice(_by_complaint(scene, options), _RUNNING))
    if not found:  # the whole model will hardly run where its tower does not
        return [Pack(option, None) for option in options[:_RUNNING]]
    return [Pack(inputs, Span(modality, token, rows // BATCH)) for inputs, rows in found]


def _options(scene: Scene, modality: str) -> Iterable[Inputs]:
    if modality == "image" and (_PIXELS & scene.accepts or scene.takes_grid_only()):
        return image_options(scene)
    if modality == "video" and "pixel_values_videos" in scene.accepts:
        return video_options(scene)
    return audio_options(scene) if modality == "audio" else ()


def _those_that_run(
    scene: Scene, method: Any, options: Iterable[Inputs]
) -> Iterator[tuple[Inputs, int]]:
    parameters = inspect.signature(method).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known_names = {*parameters, *(scene.accepts if passes_on else ())}
    for option in options:
        known = {k: v for k, v in option.items() if k in known_names}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                rows = count_rows(method(**known))
        except Exception:  # whatever the tower raises on a layout that it does not take
            continue
        if rows:
            yield option, rows


def _by_complaint(scene: Scene, options: Iterable[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """What runs with a text without placeholders, or is refused with the count that it lacks."""
    ids = scene.tokens(BATCH, LENGTH)
    for option in options:
        known = {k: v for k, v in option.items() if k in scene.accepts}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                scene.model(input_ids=ids, **known)
            yield option, 0
        except Exception as error:  # most of them are about the layout, one is about the count
            if counted := re.search(r"tokens?: 0, features:? (\d+)", str(error)):
                yield option, int(counted[1])


def count_rows(output: Any) -> int:
    """Rows of features in what a feature method returns: its pooled output, or itself."""
    pooled = getattr(output, "pooler_output", None)
    features = output if pooled is None else pooled
    if not isinstance(features, (Tensor, list, tuple)):
        features = getattr(features, "last_hidden_state", features)
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(count_rows(f) for f in features)


def combinations(scene: Scene) -> Iterator[tuple[Inputs, list[Span]]]:
    """Inputs of all towers together, then of fewer, with their placeholders in the text."""
    packs = {m: packs_of(scene, m) for m in ("image", "audio", "video")}
    present = [m for m, found in packs.items() if found]
    choices = [present] if "video" not in present else []
    if "video" in present and "image" in present:
        choices += [[m for m in present if m != "video"], present]
    elif "video" in present:
        choices += [present]
    choices += [[m] for m in present if len(present) > 1]
    choices += [[]] if present and "input_ids" in scene.accepts else []
    for chosen in choices:
        yield from _joined([packs[m] for m in chosen])


def _joined(groups: list[list[Pack]]) -> Iterator[tuple[Inputs, list[Span]]]:
    """The n-th way of every tower together: layouts of two towers are seldom both odd."""
    for turn in range(max((len(g) for g in groups), default=1)):
        picked = [g[min(turn, len(g) - 1)] for g in groups]
        merged: Inputs = {}
        for pack in picked:
            merged.update(pack.inputs)
        yield merged, [pack.span for pack in picked if pack.span is not None]
