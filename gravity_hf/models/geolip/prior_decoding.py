"""Which geolip the codes of a prior belong to, and the images it makes of them."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .places import lasting_name

if TYPE_CHECKING:
    from .configuration_prior import GeolipPriorConfig
    from .modeling_prior import GeolipPrior

# What a geolip reads to make something of frames; its encoder is none of it.
_WEIGHTS = ("lens.", "spectral.", "decoder.", "smooth.", "feature_")
_SETTINGS = (
    *("patch_size", "num_channels", "num_rows", "base_dim", "lens_dim", "lens_sign"),
    *("use_spectral", "num_attention_heads", "max_alpha", "spectral_attention", "is_causal"),
    *("gravity_law", "gravity_softening", "learn_softening", "block_norm", "feature_norm"),
    "boundary_smooth",
)


def decoder_digest(geolip: Any) -> str:
    """SHA-256 of what a geolip decodes with: 64 hexadecimal digits.

    Names, shapes and values of its weights, as float32, and the settings that say how they are
    used. The encoder is left out: whoever trains it alone makes other codes of the same language.
    """
    config, digest = geolip.config, hashlib.sha256()
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    state = geolip.state_dict()
    for name in sorted(name for name in state if name.startswith(_WEIGHTS)):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def name_of(geolip: Any) -> str | None:
    """The folder or repository that a geolip was loaded from; None for one made here."""
    return lasting_name(getattr(geolip, "name_or_path", None))


def check_decoder(config: GeolipPriorConfig, geolip: Any) -> None:
    """Raise ValueError for a geolip that is not the one of this prior.

    Codes mean something to the decoder they were learned with alone: any other makes an image of
    them, too, and nothing would show that it is none.
    """
    own = geolip.config
    for name in ("num_rows", "base_dim"):
        if getattr(own, name) != getattr(config, name):
            raise ValueError(
                f"GeolipPrior: expected a geolip with {name} {getattr(config, name)}, got "
                f"{getattr(own, name)}. {_where(config)}"
            )
    found = decoder_digest(geolip)
    if config.geolip_digest is not None and config.geolip_digest != found:
        raise ValueError(
            f"GeolipPrior: expected the geolip whose decoder has the digest "
            f"{config.geolip_digest[:12]}, got {found[:12]}. {_where(config)}"
        )


@torch.no_grad()
def generate_images(
    prior: GeolipPrior,
    geolip: Any,
    count: int,
    seed: int = 0,
    *,
    steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Images `[count, C, H, W]` of sampled codes, in the units that the geolip reconstructs in.

    Args:
        prior: what codes there are.
        geolip: what decodes them: the one the prior was trained for.
        count, seed, steps, batch_size: see `GeolipPrior.sample`.
        height, width: in pixels; None: `geolip.config.image_size`, or the square that the prior's
            tokens make.

    Raises:
        ValueError: another geolip, one that does not work on images, or a size that does not make
            as many patches as the prior has places.
    """
    prior.check_geolip(geolip)
    tokens = prior.config.num_tokens
    height, width = _size(geolip.config, tokens, height, width)
    frames = prior.sample(count, seed=seed, steps=steps, batch_size=batch_size)
    return decode_images(geolip, frames, height, width, batch_size=batch_size)


@torch.no_grad()
def decode_images(
    geolip: Any, frames: Tensor, height: int, width: int, *, batch_size: int = 64
) -> Tensor:
    """Images `[count, C, H, W]` of frames `[count, N, V, d]`, on the geolip's device."""
    was_training = geolip.training
    geolip.eval()
    try:
        parts = [
            geolip.stitch(geolip.decode(part.to(geolip.device)), height, width)
            for part in frames.split(batch_size)
        ]
    finally:
        geolip.train(was_training)
    return torch.cat(parts)


def _where(config: GeolipPriorConfig) -> str:
    named = config.geolip_name_or_path
    place = f"Load it from {named!r} as float32" if named else "Use the one it was trained with"
    return f"{place}, or train a prior for this one"


def _size(config: Any, tokens: int, height: int | None, width: int | None) -> tuple[int, int]:
    patch = config.patch_size
    if patch is None:
        raise ValueError(
            "generate_images: expected a geolip with config.patch_size, which works on images, got "
            "None. sample() gives frames for the decode() of this one"
        )
    side = config.image_size or patch * math.isqrt(tokens)
    height, width = height or side, width or side
    if height % patch or width % patch or (height // patch) * (width // patch) != tokens:
        raise ValueError(
            f"generate_images: expected a size that makes {tokens} patches of {patch} pixels, got "
            f"{height} x {width}. Give height and width of the images that the prior learned"
        )
    return height, width


__all__ = ["check_decoder", "decode_images", "decoder_digest", "generate_images", "name_of"]
