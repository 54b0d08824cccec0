"""Everything that the figures of a geolip show, gathered before any of them is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...models.geolip import GeolipModel
from ...models.geolip.frames import critical_deviation, frame_deviation, random_frames
from ...training.measures import evaluating
from .samples import AlphaCurves

# More tokens make no figure clearer.
MOST_TOKENS = 8192
_SEED = 0
# Frames at a time, as all angles of one with many rows take some 100 kB.
_CHUNK = 512


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images `[B, C, H, W]` in [-1, 1]; `given`: with their noise, None where they had none."""

    clean: Tensor
    given: Tensor | None
    reconstructed: Tensor


@dataclass(frozen=True, eq=False)
class GeolipSeen:
    """What a geolip makes of some inputs; T valid tokens, D modes, P features, on the CPU.

    Attributes:
        before, after: spectra `[T, D]`, as the lens gives them and after all spectral layers.
        first: how many of these tokens belong to the first sample that has any.
        alphas: `[L, D]`, no rows without spectral layers.
        start, highest: alpha before training, and its bound.
        deviations, random_deviations: radians `[T]`, of the frames, and of as many random ones.
        critical: how far from 0 a deviation may be and still lie in the envelope.
        targets, outputs: features `[T, P]`, normalised as the loss takes them.
        pictures: None of inputs that are no images.
        history: of the training, None where it is not known.
    """

    before: Tensor
    after: Tensor
    first: int
    alphas: Tensor
    start: float
    highest: float
    deviations: Tensor
    random_deviations: Tensor
    critical: float
    targets: Tensor
    outputs: Tensor
    pictures: Pictures | None
    history: AlphaCurves | None

    @property
    def cosines(self) -> Tensor:
        """Of every token, its reconstruction's to what it should be, `[T]`."""
        return cosine_similarity(self.outputs, self.targets, dim=-1)


def look(
    model: GeolipModel,
    batches: Iterable[Mapping[str, Tensor]],
    history: AlphaCurves | Mapping[str, Any] | None = None,
) -> GeolipSeen:
    """Run `model` over `batches`, without changing it, until there are enough tokens.

    Args:
        model: in any mode, which it keeps.
        batches: inputs of its forward pass.
        history: of its training.

    Raises:
        ValueError: no batches, or no valid token in them.
    """
    curves = None if history is None else AlphaCurves.of(history)
    rows: list[dict[str, Tensor]] = []
    pictures, count = None, 0
    for batch in batches:
        seen, shown = _look_at(model, batch)
        rows.append(seen)
        pictures = pictures or shown
        count += len(seen["before"])
        if count >= MOST_TOKENS:
            break
    if not count:
        raise ValueError(
            "write_geolip_figures: expected batches with at least one valid token, got none"
        )
    found = {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key != "first"}
    config = model.config
    alphas = model.alphas().detach().float().cpu() if config.use_spectral else torch.zeros(0, 1)
    return GeolipSeen(
        first=int(torch.cat([row["first"] for row in rows])[0]),
        alphas=alphas,
        start=config.max_alpha * float(torch.sigmoid(torch.tensor(config.alpha_init))),
        highest=config.max_alpha,
        critical=critical_deviation(config.base_dim, config.envelope_coeff),
        random_deviations=_random_deviations(model, count),
        pictures=pictures,
        history=curves,
        **found,
    )


def _look_at(
    model: GeolipModel, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Pictures | None]:
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items() if value is not None}
    with evaluating(model):
        output = model(**batch, output_frames=True)
    shape = output.omega.shape[:2]
    mask = batch.get("attention_mask")
    valid = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    target = batch.get("labels", batch.get("patches", batch.get("pixel_values")))
    pixels = batch.get("pixel_values")
    patches = target if pixels is None else model.patchify(target)
    seen = {
        "before": _tokens(output.omega, valid).float(),
        "after": _tokens(output.omega_attended, valid).float(),
        "deviations": _deviations(_tokens(output.frame, valid), model),
        "targets": _tokens(model.normalize_features(patches), valid).float(),
        "outputs": _tokens(model.normalize_features(output.reconstruction), valid).float(),
        "first": valid.sum(-1)[valid.any(-1)][:1],
    }
    if pixels is None:
        return seen, None
    noisy = pixels if "labels" in batch and not torch.equal(pixels, target) else None
    shown = (target, noisy, output.pixel_reconstruction)
    return seen, Pictures(*(None if one is None else one.detach().float().cpu() for one in shown))


def _tokens(values: Tensor, valid: Tensor) -> Tensor:
    return values.detach().cpu()[valid]


def _random_deviations(model: GeolipModel, count: int) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(_SEED)
    return _deviations(random_frames((count, config.num_rows), config.base_dim, generator), model)


def _deviations(frames: Tensor, model: GeolipModel) -> Tensor:
    """`[T]` of `[T, V, d]`."""
    baseline = model.config.deviation_baseline
    return torch.cat([frame_deviation(some, baseline) for some in frames.split(_CHUNK)])
