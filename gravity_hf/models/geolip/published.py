"""How published checkpoints call what is called otherwise here: weights and settings.

The one table of names, read in both directions. Two layouts are known. In the *exported* one
weights have our names, and `geo_config` published ones where there are any. In the
*two-reconstruction* one everything has published names: a `battery` that learns from a decoder of
its own, and behind it a lens, spectral layers and a decoder without normalised blocks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..converting import plain_config_errors, some_of
from ..settings import by_field_names
from .configuration_geolip import GeolipConfig

_logger = logging.getLogger(__name__)

# Published on the left. What is not here has one name.
SETTINGS = {
    "V": "num_rows",
    "D_base": "base_dim",
    "D_lens": "lens_dim",
    "n_heads": "num_attention_heads",
    "n_layers": "num_spectral_layers",
    "hidden": "hidden_size",
    "shell_hidden": "decoder_hidden_size",
    "ps": "patch_size",
    "channels": "num_channels",
    "img_size": "image_size",
    "codebook_K": "codebook_size",
    "cc_temp": "address_temperature",
    "seed": "lens_seed",
}
_OURS = {ours: published for published, ours in SETTINGS.items()}
_SAME = ("max_alpha", "alpha_init", "lens_sign", "use_spectral")
# What no weight of a two-reconstruction file tells and its numbers depend on.
_NEEDED = ("ps", "channels", "n_heads", "max_alpha", "lens_sign", "use_spectral")
# Whether a battery of the one kind or the other was wished for; the weights say which it became.
_UNREAD = ("use_real_svae",)
# What no weight tells and the battery is: an encoder without normalised blocks that turns rows so
# that their first coordinate is positive, with a decoder; or of a whole autoencoder the encoder.
_SMALL: dict[str, Any] = {"block_norm": False, "frame_sign": "canon", "stem_detach": True}
_WHOLE: dict[str, Any] = {"block_norm": True, "decoder_block_norm": False}
# Beside the config, in an exported file.
_APART = ("host_config", "verdict")

# Weights of the two-reconstruction layout, whole names.
_WEIGHTS = (
    (r"lens\.E", "lens.basis"),
    (r"codebook", "codebook"),
    (
        r"transformer\.layers\.(\d+\.(?:alpha_logits|(?:qkv|out_proj|norm)\.\w+))",
        r"spectral.layers.\1",
    ),
    (r"battery\.enc\.enc_(in|out)\.(\w+)", r"encoder.proj_\1.\2"),
    (r"battery\.enc\.blocks\.(\d+)\.0\.(\w+)", r"encoder.blocks.\1.fc1.\2"),
    (r"battery\.enc\.blocks\.(\d+)\.2\.(\w+)", r"encoder.blocks.\1.fc2.\2"),
    (r"battery\.svae\.enc_(in|out)\.(\w+)", r"encoder.proj_\1.\2"),
    (r"battery\.svae\.enc_blocks\.(\d+)\.0\.(\w+)", r"encoder.blocks.\1.norm.\2"),
    (r"battery\.svae\.enc_blocks\.(\d+)\.1\.(\w+)", r"encoder.blocks.\1.fc1.\2"),
    (r"battery\.svae\.enc_blocks\.(\d+)\.3\.(\w+)", r"encoder.blocks.\1.fc2.\2"),
    (r"battery\.dec_(in|out)\.(\w+)", r"stem_decoder.proj_\1.\2"),
    (r"battery\.dec_blocks\.(\d+)\.0\.(\w+)", r"stem_decoder.blocks.\1.fc1.\2"),
    (r"battery\.dec_blocks\.(\d+)\.2\.(\w+)", r"stem_decoder.blocks.\1.fc2.\2"),
    (r"decoder\.dec_(in|out)\.(\w+)", r"decoder.proj_\1.\2"),
    (r"decoder\.blocks\.(\d+)\.0\.(\w+)", r"decoder.blocks.\1.fc1.\2"),
    (r"decoder\.blocks\.(\d+)\.2\.(\w+)", r"decoder.blocks.\1.fc2.\2"),
)
_COPY = "aleph.codebook"
# A whole published autoencoder in the place of the small battery, and how it decodes by itself.
_WHOLE_BATTERY = "battery.svae."
_OWN_DECODER = re.compile(r"battery\.svae\.(readout|dec_|cross_attn|boundary_smooth)")
# The statistics of a model that never had any.
_STATISTICS = ("feature_mean", "feature_std")


def is_exported(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have our names."""
    return "encoder.proj_in.weight" in state and "lens.basis" in state


def is_two_reconstruction(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of the two-reconstruction layout."""
    return "lens.E" in state and "decoder.dec_in.weight" in state


def published_settings(config: GeolipConfig) -> dict[str, Any]:
    """`geo_config` of an exported file: every setting, by its published name where it has one."""
    base = {field.name for field in fields(PreTrainedConfig)}
    own = [f.name for f in fields(config) if f.name not in base and f.name not in _APART]
    values = {_OURS.get(name, name): getattr(config, name) for name in own}
    # Published code wants a number.
    return {**values, "shell_hidden": config.decoder_width}


def exported_config(settings: Mapping[str, Any], **apart: Any) -> GeolipConfig:
    """`published_settings` backwards; `apart`: `host_config` and `verdict`.

    Raises:
        ValueError: an unknown setting, or a value out of range.
    """
    known = {field.name for field in fields(GeolipConfig)}
    named = by_field_names({str(name): x for name, x in settings.items()}, SETTINGS)
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(
            f"geo_config: expected settings of a GeolipConfig, got {some_of(unknown)}. A setting "
            "that is not understood may be another model"
        )
    with plain_config_errors():
        return GeolipConfig(**named, **apart)


def two_reconstruction_config(
    state: Mapping[str, Tensor], given: Mapping[str, Any]
) -> GeolipConfig:
    """The config of a two-reconstruction file: sizes by its weights, the rest by `given`.

    Args:
        state: published names.
        given: published settings. `_NEEDED` ones must be there; sizes are only compared.

    Raises:
        ValueError: unknown, missing or contradictory settings; weights that are not such a model's.
    """
    known = (*SETTINGS, *_SAME, *_UNREAD)
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"cfg: expected published settings, {sorted(known)}, got {some_of(unknown)}. A setting "
            "that is not understood may be another model"
        )
    missing = [name for name in _NEEDED if given.get(name) is None]
    if missing:
        raise ValueError(
            f"cfg: expected {', '.join(missing)}, which weights do not tell, got a file without. "
            "Give what the run's config says, as in --set n_heads=8"
        )
    sizes = _sizes(state)
    named = by_field_names({x: given[x] for x in given if x not in _UNREAD}, SETTINGS)
    for name, size in sizes.items():
        if named.get(name, size) != size:
            raise ValueError(
                f"{_OURS.get(name, name)}: expected {size}, which the weights say, got "
                f"{named[name]!r}. Check that the settings are those of these weights"
            )
    with plain_config_errors():
        return GeolipConfig(
            **{**named, **sizes},
            **(_WHOLE if has_whole_battery(state) else _SMALL),
            feature_norm="none",
            deviation_baseline="mc4096",
        )


def two_reconstruction_state(
    state: Mapping[str, Tensor], config: GeolipConfig, *, shell_only: bool = False
) -> dict[str, Tensor]:
    """The weights under our names; every published one has its place, or is named in an error.

    The copy of the codebook that published models hold a second time is compared with it and left
    out. Spectral layers that `use_spectral=False` never reads are left out, with a warning.

    Args:
        shell_only: leave out, with a warning, how a whole autoencoder in the battery's place
            decodes by itself.

    Raises:
        ValueError: weights that have no place in a geolip.
    """
    own = [key for key in state if _OWN_DECODER.match(key)]
    if own and not shell_only:
        raise ValueError(
            "checkpoint: expected a small battery, got a whole autoencoder in its place, which "
            f"decodes by itself, too: {shapes_of(state, own)}. A geolip has no such parts. What "
            "stands behind the lens needs none of them: give shell_only=True, --shell-only, to "
            "leave them out"
        )
    if own:
        _logger.warning("left out, the battery's own decoder: %s", some_of(own))
        state = {key: x for key, x in state.items() if key not in own}
    named, unknown, unread = {}, [], []
    for key, tensor in state.items():
        ours = _our_name(key)
        if key == _COPY:
            _check_copy(tensor, state.get("codebook"))
        elif ours is None:
            unknown.append(key)
        elif ours.startswith("spectral.") and not config.use_spectral:
            unread.append(key)
        else:
            named[ours] = tensor
    if unknown:
        raise ValueError(
            f"checkpoint: expected the weights of a two-reconstruction model, got others as well: "
            f"{shapes_of(state, unknown)}. What they do is not known, so they are not left out"
        )
    if unread:
        _logger.warning("use_spectral is False: left out, as unread: %s", some_of(unread))
    width = config.patch_dim or 0
    for name, fill in zip(_STATISTICS, (0.0, 1.0), strict=True):
        named[name] = torch.full((width,), fill)
    return named


def has_whole_battery(state: Mapping[str, Tensor]) -> bool:
    """Whether the battery is a whole published autoencoder."""
    return any(key.startswith(_WHOLE_BATTERY) for key in state)


def shapes_of(state: Mapping[str, Tensor], keys: Iterable[str], most: int = 48) -> str:
    """Names and shapes, and how many more there are."""
    named = [f"{key} {list(state[key].shape)}" for key in keys]
    more = f" and {len(named) - most} more" if named[most:] else ""
    return (", ".join(named[:most]) or "nothing") + more


def _our_name(key: str) -> str | None:
    for pattern, ours in _WEIGHTS:
        match = re.fullmatch(pattern, key)
        if match is not None:
            return match.expand(ours)
    return None


def _check_copy(copy: Tensor, codebook: Tensor | None) -> None:
    if codebook is not None and not torch.equal(copy, codebook):
        raise ValueError(
            f"{_COPY}: expected the same values as codebook, whose copy it is in published models, "
            "got others. The checkpoint is damaged, or not of such a model"
        )
    if codebook is None:
        raise ValueError(f"{_COPY}: expected codebook beside it, got none of that name")


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """By our names."""
    whole = has_whole_battery(state)
    battery, blocks = ("battery.svae", "enc_blocks") if whole else ("battery.enc", "blocks")
    enc_in, enc_out = f"{battery}.enc_in.weight", f"{battery}.enc_out.weight"
    dec_in, lens, codebook = "decoder.dec_in.weight", "lens.E", "codebook"
    needed = (enc_in, enc_out, dec_in, lens, codebook)
    flat = [key for key in needed if key not in state or state[key].dim() != 2]
    if flat:
        raise ValueError(
            f"checkpoint: expected matrices under {', '.join(needed)}, got none under "
            f"{', '.join(flat)}. The checkpoint is incomplete"
        )
    lens_dim, base_dim = state[lens].shape
    rows = state[enc_out].shape[0]
    if rows % base_dim:
        raise ValueError(
            f"{enc_out}: expected a multiple of {base_dim} rows, the width of frames by {lens}, "
            f"got {rows}. The checkpoint is damaged"
        )
    return {
        "patch_dim": state[enc_in].shape[1],
        "num_rows": rows // base_dim,
        "base_dim": base_dim,
        "lens_dim": lens_dim,
        "hidden_size": state[enc_in].shape[0],
        "decoder_hidden_size": state[dec_in].shape[0],
        "codebook_size": state[codebook].shape[0],
        "num_spectral_layers": _count(state, r"transformer\.layers\.(\d+)\..+"),
        "encoder_depth": _count(state, rf"{battery}\.{blocks}\.(\d+)\..+"),
        "decoder_depth": _count(state, r"decoder\.blocks\.(\d+)\..+"),
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})
