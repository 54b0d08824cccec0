"""What a geolip does, measured: how well it reconstructs, how rigid it is, whether it attends.

Mechanism "A": tokens use each other. Alpha has risen, and it matters which context a token has:
with that of another sample the loss grows. Mechanism "B": they do not. Alpha alone does not tell
the two apart: it may drift upwards where there is nothing to attend to, and scale modes by a
constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...layers.modes import in_evaluation
from .configuration_geolip import GeolipConfig
from .context_swap import PatchBatch, patch_batches, with_neighbours
from .lens import lens_error
from .verdict_totals import VerdictTotals

if TYPE_CHECKING:
    from .modeling_geolip import GeolipModel


@dataclass(frozen=True)
class Verdict:
    """Numbers over all valid tokens of the batches that were measured; JSON has all of them.

    recon_cosine, recon_mse: of reconstruction and target, in the normalised space.
    frame_deviation: mean over frames, in radians, see `gravity_hf.models.geolip.frames`;
        frame_deviation_absmax: the largest of any frame; frac_in_envelope: the share of frames
        within dev_critical; in_envelope: whether their mean is.
    random_deviation_absmax, random_frac_in_envelope: the same of as many random frames of the same
        size, without which the numbers above say little: random frames are mostly inside.
    lens_orthogonality_error: `max |E^T E - 1|`; lens_angle_error: how far lifting changes the
        deviation of any frame, at most, in radians; omega_energy_error: `max |sum S^2 - V|`.
    mean_alpha, alpha_min, alpha_max: over modes and layers; alpha_init: where they started;
        alpha_ratio: `mean_alpha / alpha_init`. None without spectral layers.
    coordination_gain: `(loss_swap - loss) / loss` of the task, `loss_swap` with the context of the
        next sample; 0 without spectral layers.
    mechanism: `"A"` where coordination_gain and alpha_ratio reach `config.engage_gain` and
        `config.engage_alpha_ratio`, else `"B"`; alpha_drift: only alpha_ratio does.
    n_params: all parameters; steps: of training, as the caller says; tokens: that were measured.
    """

    recon_cosine: float
    recon_mse: float
    frame_deviation: float
    frame_deviation_absmax: float
    frac_in_envelope: float
    dev_critical: float
    in_envelope: bool
    random_deviation_absmax: float
    random_frac_in_envelope: float
    lens_orthogonality_error: float
    lens_angle_error: float
    omega_energy_error: float
    mean_alpha: float | None
    alpha_min: float | None
    alpha_max: float | None
    alpha_init: float | None
    alpha_ratio: float | None
    coordination_gain: float
    alpha_drift: bool
    mechanism: str
    n_params: int
    steps: int | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, words and None, for JSON and `config.verdict`."""
        return asdict(self)


@torch.no_grad()
def compute_verdict(
    model: GeolipModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Verdict:
    """Measure `model`, which is left in the mode it was in, on collated batches, one by one.

    The context of a sample is swapped for that of the next one of its batch: neighbours should have
    nothing to do with each other, so shuffle windows of one document. A sample that comes alone
    joins the batch before it.

    Args:
        batches: of `GeolipCollator`: patches or pixel_values, with labels where the task has a
            clean target; the loss that contexts change is that of the task.
        device: where batches go. None: where the model is.
        steps: of training, to be written down.
        seed: of the random frames.
        progress: show a bar where there is a terminal.

    Raises:
        ValueError: no valid token, a single sample, or numbers that are not finite.
    """
    totals = VerdictTotals(model.config)
    attends = len(model.spectral.layers) > 0
    stream = patch_batches(model, batches, torch.device(device or model.device))
    stream = with_neighbours(stream) if attends else stream
    with in_evaluation(model):
        for batch in tqdm(stream, desc="verdict", unit="batch", disable=None if progress else True):
            _measure(model, batch, totals, attends)
    return _verdict(model, totals, steps, seed)


def mechanism_of(gain: float, alpha_ratio: float | None, config: GeolipConfig) -> str:
    """`"A"` where tokens use each other, else `"B"`; see `Verdict`."""
    return "A" if gain >= config.engage_gain and _has_risen(alpha_ratio, config) else "B"


def alpha_drift(gain: float, alpha_ratio: float | None, config: GeolipConfig) -> bool:
    """Whether alpha has risen although the context does not matter."""
    return gain < config.engage_gain and _has_risen(alpha_ratio, config)


def _has_risen(alpha_ratio: float | None, config: GeolipConfig) -> bool:
    return alpha_ratio is not None and alpha_ratio >= config.engage_alpha_ratio


def _measure(model: GeolipModel, batch: PatchBatch, totals: VerdictTotals, attends: bool) -> None:
    valid = batch.mask
    target = model.normalize_features(batch.labels)[valid]
    frame = model.encode(batch.patches)
    lens_frame = model.lens(frame)
    omega, attended = model.attend(frame, batch.mask)
    found = _decoded(model, lens_frame, attended, batch.size)[valid]
    totals.add_reconstruction(found, target, swapped=False)
    totals.add_frames(frame[valid], lens_frame[valid], omega[valid])
    if attends:
        swapped = model.attend(frame, batch.mask, swap_context=True)[1]
        found = _decoded(model, lens_frame, swapped, batch.size)[valid]
        totals.add_reconstruction(found, target, swapped=True)


def _decoded(
    model: GeolipModel, lens_frame: Tensor, attended: Tensor, size: tuple[int, int] | None
) -> Tensor:
    """`[B, N, P]` in the normalised space, at least float32, smoothed where the model does so."""
    found = model.decoder(lens_frame, attended)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if size is None:
        return found
    images = model.stitch(model.restore_features(found), *size)
    return model.normalize_features(model.patchify(images))


def _verdict(model: GeolipModel, totals: VerdictTotals, steps: int | None, seed: int) -> Verdict:
    config, count = model.config, totals.tokens
    if not count:
        raise ValueError("verdict: expected batches with one valid token or more, got none")
    alphas = model.alphas()
    attends = alphas.numel() > 0
    mean_alpha = float(alphas.double().mean()) if attends else None
    alpha_ratio = None if mean_alpha is None else mean_alpha / config.alpha_start
    gain = totals.gain() if attends else 0.0
    deviation = totals.deviation / count
    random_absmax, random_inside = totals.random_numbers(seed)
    verdict = Verdict(
        recon_cosine=totals.cosine / count,
        recon_mse=totals.squared / count,
        frame_deviation=deviation,
        frame_deviation_absmax=totals.absmax,
        frac_in_envelope=totals.inside / count,
        dev_critical=totals.critical,
        in_envelope=abs(deviation) < totals.critical,
        random_deviation_absmax=random_absmax,
        random_frac_in_envelope=random_inside,
        lens_orthogonality_error=lens_error(model.lens.matrix()),
        lens_angle_error=totals.angle_error,
        omega_energy_error=totals.energy_error,
        mean_alpha=mean_alpha,
        alpha_min=float(alphas.min()) if attends else None,
        alpha_max=float(alphas.max()) if attends else None,
        alpha_init=config.alpha_start if attends else None,
        alpha_ratio=alpha_ratio,
        coordination_gain=gain,
        alpha_drift=alpha_drift(gain, alpha_ratio, config),
        mechanism=mechanism_of(gain, alpha_ratio, config),
        n_params=sum(parameter.numel() for parameter in model.parameters()),
        steps=steps,
        tokens=count,
    )
    _check_finite(verdict)
    return verdict


def _check_finite(verdict: Verdict) -> None:
    broken = [
        name
        for name, value in verdict.to_dict().items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if broken:
        raise ValueError(
            f"verdict: expected finite numbers, got others in {broken}; look for numbers that are "
            "not finite in the inputs and in the weights of the model"
        )
