"""Pixels and sounds in every layout that transformers' towers take, the likeliest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from integration.sweep.input_scene import BATCH, Scene
from torch import Tensor, nn

Inputs = dict[str, Any]
_SPECTRA = ("input_features", "audio_mel", "audio_input_features")


def image_options(scene: Scene) -> Iterator[Inputs]:
    """Images, one for each row of the batch, with what some models want told about them."""
    name = _image_name(scene)
    plain = _images(scene)
    height, width = plain.shape[2:]
    told = {
        "image_sizes": torch.tensor([[height, width]] * BATCH),
        "pixel_mask": scene.ones(BATCH, height, width),
        **_beside_images(scene),
    }
    grids = {"image_grid_thw", "grid_thw", "image_grid_hw", "image_grids"} & scene.accepts
    patches = {"spatial_shapes", "pixel_position_ids", "image_position_ids"} & scene.accepts
    if grids:
        yield from _grid_patches(scene, name)
    if patches:
        yield _padded_patches(scene, name)
    if "target_sizes" in scene.accepts:
        yield _strip_of_patches(scene, name)
    if name == "flattened_patches":
        yield _numbered_patches(scene, name)
    if "aspect_ratio_ids" in scene.accepts:
        yield _tiles_with_ratios(scene, plain)
    yield {name: plain, **told}
    yield {name: plain, **_beside_images(scene)}
    yield {name: plain[:, None], **told, "pixel_attention_mask": told["pixel_mask"][:, None]}
    frames = scene.number("num_frames", "frames_per_clip", room="vision", default=2)
    for tiles in dict.fromkeys((frames, 2, 3, 5)):
        several = torch.stack([plain.roll(n, -1) for n in range(tiles)], 1)
        yield {name: several, **told, "pixel_attention_mask": scene.ones(BATCH, tiles).bool()}
    deep = _deep(scene)
    patch = scene.number("patch_size", room="vision", default=4)
    yield {name: scene.normal(BATCH, deep, patch, patch, plain.shape[1])}
    # Some detectors and text readers need more than their config's size; towers never do.
    for size in () if "input_ids" in scene.accepts else ((64, 64), (48, 320), (224, 224)):
        yield {name: scene.normal(BATCH, plain.shape[1], *size), **_beside_images(scene)}
    if not patches:
        yield _padded_patches(scene, name)


def _deep(scene: Scene) -> int:
    """Frames in a patch."""
    return scene.number("temporal_patch_size", "patch_temporal", room="vision", default=1)


def _image_name(scene: Scene) -> str:
    names = ("pixel_values", "flattened_patches", "image", "image_pixel_values", "hidden_states")
    return next(n for n in names if n in scene.accepts)


def _images(scene: Scene) -> Tensor:
    channels = scene.number("num_channels", "in_channels", "in_chans", room="vision", default=3)
    return scene.normal(BATCH, channels, *scene.size())


def _beside_images(scene: Scene) -> Inputs:
    """What accompanies pixels in a few families."""
    beside: Inputs = {}
    if "qformer_input_ids" in scene.accepts:
        vocabulary = scene.number("vocab_size", room="qformer")
        beside["qformer_input_ids"] = scene.tokens(BATCH, 5, vocabulary=vocabulary)
        beside["qformer_attention_mask"] = scene.ones(BATCH, 5)
    if "high_res_pixel_values" in scene.accepts:
        beside["high_res_pixel_values"] = scene.normal(BATCH, 3, *scene.size("high_res"))
    return beside


def _strip_of_patches(scene: Scene, name: str) -> Inputs:
    """All patches side by side in one long image, as MiniCPM-V's tower takes them."""
    patch = scene.number("patch_size", room="vision", default=4)
    channels = scene.number("num_channels", room="vision", default=3)
    return {
        name: scene.normal(1, channels, patch, BATCH * 16 * patch),
        "target_sizes": torch.tensor([[4, 4]] * BATCH),
    }


def _numbered_patches(scene: Scene, name: str) -> Inputs:
    """Flattened patches that begin with their row and column, counted from 1 (Pix2Struct)."""
    patch = scene.number("patch_size", room="vision", default=4)
    channels = scene.number("num_channels", room="vision", default=3)
    size = scene.number("patch_embed_hidden_size", room="vision", default=channels * patch**2)
    places = torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 4)).float()
    pixels = scene.normal(BATCH, 9, size)
    return {name: torch.cat([places.expand(BATCH, -1, -1), pixels], -1)}


def _tiles_with_ratios(scene: Scene, plain: Tensor) -> Inputs:
    """One image of several tiles for each row, as Mllama takes them."""
    tiles = scene.number("max_num_tiles", room="vision", default=2)
    stacked = torch.stack([plain.roll(n, -1) for n in range(tiles)], 1)[:, None]
    return {
        "pixel_values": stacked,
        "aspect_ratio_ids": scene.ones(BATCH, 1),
        "aspect_ratio_mask": scene.ones(BATCH, 1, tiles),
    }


def video_options(scene: Scene, name: str = "pixel_values_videos") -> Iterator[Inputs]:
    """Clips, one for each row of the batch."""
    height, width = scene.size()
    channels = scene.number("num_channels", "in_channels", "in_chans", room="vision", default=3)
    frames = scene.number("num_frames", "frames_per_clip", "num_image_with_embedding", default=4)
    clip = scene.normal(BATCH, frames, channels, height, width)
    if {"video_grid_thw", "video_grids"} & scene.accepts:
        for made in _grid_patches(scene, name):
            yield {k.replace("image", "video"): v for k, v in made.items()}
    yield {name: clip, "image_sizes_videos": torch.tensor([[height, width]] * BATCH)}
    yield {name: clip.transpose(1, 2)}


def _grids(scene: Scene) -> Iterator[tuple[int, int]]:
    """Grids of patches whose sides every merge divides, small ones first."""
    merge = scene.number("spatial_merge_size", "merge_size", room="vision", default=2)
    patch = scene.number("patch_size", "spatial_patch_size", room="vision", default=4)
    height, width = scene.size()
    yield 2 * merge, merge
    yield 2 * merge, 2 * merge
    yield max(height // patch, 1), max(width // patch, 1)


def _grid_patches(scene: Scene, name: str) -> Iterator[Inputs]:
    """Patches of all images, one after another, as Qwen-VL's towers and their kin take them."""
    patch = scene.number("patch_size", "spatial_patch_size", room="vision", default=4)
    channels = scene.number("num_channels", "in_channels", "in_chans", room="vision", default=3)
    deep = _deep(scene)
    merge = scene.number("spatial_merge_size", "merge_size", room="vision", default=2)
    wide = first_width(scene.model, "vis") or channels * patch**2
    for flat in dict.fromkeys((channels * deep * patch**2, wide)):
        for rows, columns in _grids(scene):
            yield _on_grid(scene.normal(BATCH * rows * columns, flat), name, rows, columns, merge)
    for rows, columns in itertools.islice(_grids(scene), 2):
        square = scene.normal(BATCH * rows * columns, channels, patch, patch)
        yield _on_grid(square, name, rows, columns, merge)
        yield _on_grid(square[None], name, rows, columns, merge)
        merged = scene.normal(BATCH * rows * columns, merge * patch, merge * patch, channels * deep)
        yield _on_grid(merged, name, rows, columns, merge)


def _on_grid(pixels: Tensor, name: str, rows: int, columns: int, merge: int) -> Inputs:
    thw = torch.tensor([[1, rows, columns]] * BATCH)
    return {
        name: pixels,
        "image_grid_thw": thw,
        "grid_thw": thw,
        "image_grid_hw": thw[:, 1:],
        "image_grids": thw[:, 1:],
        "image_merge_sizes": torch.tensor([merge] * BATCH),
        "merge_sizes": torch.tensor([merge] * BATCH),
        "images_per_sample": torch.ones(BATCH, dtype=torch.long),
    }


def _padded_patches(scene: Scene, name: str) -> Inputs:
    """Flattened patches `[B, N, C P P]` with their mask and places, as SigLIP 2 takes them."""
    patch = scene.number("patch_size", room="vision", default=4)
    channels = scene.number("num_channels", "in_channels", room="vision", default=3)
    side = 2 * scene.number("downsample_factor", "pooling_kernel_size", room="vision", default=2)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    places = places.expand(BATCH, -1, -1).contiguous()
    return {
        name: scene.normal(BATCH, side * side, channels * patch * patch).sigmoid(),
        "pixel_attention_mask": scene.ones(BATCH, side * side),
        "spatial_shapes": torch.tensor([[side, side]] * BATCH),
        "pixel_position_ids": places,
        "image_position_ids": places,
    }


def audio_options(scene: Scene) -> Iterator[Inputs]:
    """Spectrograms and waves, whichever of them the model's forward names."""
    spectra = [n for n in _SPECTRA if n in scene.accepts]
    waves = [n for n in ("input_values", "audio_values") if n in scene.accepts]
    if spectra and waves and {*spectra, *waves} <= set(scene.required):
        for wave in itertools.islice(_waves(scene, waves[0]), 2):
            heard = itertools.islice(_spectrograms(scene, spectra[0]), 6)
            yield from ({**wave, **spectrum} for spectrum in heard)
        return
    for name in spectra:
        yield from _spectrograms(scene, name)
    for name in waves:
        yield from _waves(scene, name)


def _spectrograms(scene: Scene, name: str) -> Iterator[Inputs]:
    configured = scene.number(
        *("num_mel_bins", "n_mels", "mel_bins", "input_feat_size", "feature_size", "input_size"),
        *("input_feat_per_channel", "input_dim", "num_features", "feature_projection_input_dim"),
        room="audio",
        default=80,
    )
    positions = scene.number("max_source_positions", "n_window", room="audio")
    lengths = [2 * positions] if 0 < positions <= 2000 else []
    if "feature_lens" in scene.accepts:
        yield _packed_spectrogram(scene, name, configured)
    first = first_width(scene.model, "audio", "enc") or configured
    stacked = scene.number("input_size", "lfr_dim", room="audio", default=configured)
    for bins in dict.fromkeys((configured, first, stacked)):
        layouts = [(bins, n) for n in lengths] + [(n, bins) for n in (32, 64)]
        layouts += [(bins, n) for n in (32, 64, 128, 3000)] + [(n, bins) for n in lengths]
        for layout in layouts:
            frames = layout[1] if layout[0] == bins else layout[0]
            mask = scene.ones(BATCH, frames)
            spectrogram = scene.normal(BATCH, *layout)
            yield {
                name: spectrogram,
                "input_features_mask": mask.bool(),
                "feature_attention_mask": mask,
                "audio_mel_mask": torch.zeros(BATCH, frames, dtype=torch.bool),
                "audio_feature_lengths": torch.full((BATCH,), frames),
                "chunk_sample_lengths": torch.full((BATCH,), frames * scene.number("hop_length")),
                **({} if "input_ids" in scene.accepts else {"attention_mask": mask}),
            }
            yield {name: spectrogram}


def _packed_spectrogram(scene: Scene, name: str, bins: int) -> Inputs:
    """Spectrograms end to end, `[bins, all frames]`, with their lengths (Qwen-Omni's encoder)."""
    frames = 2 * scene.number("n_window", room="audio", default=16)
    left = (frames - 1) // 2 + 1
    return {
        name: scene.normal(bins, BATCH * frames),
        "feature_lens": torch.full((BATCH,), frames),
        "aftercnn_lens": torch.full((BATCH,), (left - 2) // 2 + 1),
    }


def first_width(model: nn.Module, *prefixes: str) -> int:
    """Channels that the first layer takes: of the tower named so, of the model if none is.

    A layer that embeds patches counts as the first, wherever it was defined.
    """
    towers = [m for n, m in model.named_modules() if n.split(".")[-1].startswith(prefixes)]
    layers = [
        (n, m.in_features if isinstance(m, nn.Linear) else m.in_channels)
        for n, m in (towers[0] if towers else model).named_modules()
        if isinstance(m, (nn.Linear, nn.Conv1d))
    ]
    layers.sort(key=lambda layer: "patch" not in layer[0])
    return layers[0][1] if layers else 0


def _waves(scene: Scene, name: str) -> Iterator[Inputs]:
    strides = scene.read("conv_stride", "upsampling_ratios", "downsampling_ratios", room="audio")
    hop = math.prod(strides) if isinstance(strides, (list, tuple)) else 320
    if (frames := scene.number("max_length")) and scene.number("num_mel_bins"):
        yield {name: scene.normal(BATCH, frames, scene.number("num_mel_bins"))}
    for samples in (8 * hop, 24 * hop, 16000):
        wave = scene.normal(BATCH, samples)
        yield {name: wave, "padding_mask": scene.ones(BATCH, samples)}
        yield {name: wave[:, None], "padding_mask": scene.ones(BATCH, 1, samples)}
        yield {name: wave[:, None]}
        yield {name: wave}
