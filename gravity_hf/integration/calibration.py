"""Masses, softenings and key radii from data, in closed form.

Around a squared distance D, gravity's score falls with d^2 at slope `M^2/(D+eps)^2` (force) or
`M^2/(D+eps)` (power); the host's `scaling * q.k` falls at slope `scaling/2`. Equal slopes give the
mass. D is the mean squared distance under the host's own attention weights: the KL between the two
attentions is, to second order, the variance of their score difference under those weights, and a
tangent taken at their mean keeps it smallest. (The plain mean over all pairs, where hardly any
attention falls, makes the near keys far too heavy.)

Lifted keys remove the one thing that distances punish and dot products do not, the length of a key;
the softening then dials how gravitational the head is: at a large one the head is the host's again,
at 0 it is bare gravity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import DISTANCES, EPSILON_FLOOR, GravityConfig
from ..layers.parameters import GravityParameters, GravityTerms, inverse_softplus
from .calibration_report import CalibrationReport
from .hosts import gravity_modules, settings_of
from .observers import Agreement, Moments, Observer
from .patching import refuse_wrapped


class _Solution(NamedTuple):
    """Float64 CPU tensors: `mass`, `softening`, `mean_distance` `[H]`; `radius_sq` `[Hkv]` or None;
    `reach_sq` `[H]`, no squared distance seen exceeds it."""

    mass: Tensor
    softening: Tensor
    mean_distance: Tensor
    radius_sq: Tensor | None
    reach_sq: Tensor


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    softness: float = 1.0,
    distance: str = "lifted",
    *,
    progress: bool | None = None,
) -> CalibrationReport:
    """Set masses, softenings and key radii of a patched model so that it starts where its host was.

    The model runs twice over the batches with the host's own attention; only running sums are kept.
    Deterministic. The model is changed at the very end, or not at all.

    Args:
        model: patched by `patch_with_gravity`, not yet under LoRA.
        batches: model inputs as dicts of tensors (`input_ids`, `attention_mask`, `pixel_values`,
            ...). A few thousand tokens are enough. A generator is read into memory first: inputs
            only.
        softness: f >= 0. The softening of a head is `f (mean |q|^2 + R^2)` (lifted) or
            `f (mean |q|^2 + mean |k|^2)` (euclidean), at least the config's epsilon. Large f: close
            to the host and barely gravitational; always quote f, or the contrast, beside the
            quality.
        distance: `"lifted"` or `"euclidean"`.
        progress: True or False; None shows a bar on terminals only.

    Returns:
        One row per head; see `CalibrationReport`.

    Raises:
        RuntimeError: the model is not patched, or is wrapped.
        ValueError: arguments outside their range, no batches, an attention module that no batch
            reached, or statistics that are not finite.
    """
    settings = _check(model, softness, distance)
    batches = list(batches)
    if not batches:
        raise ValueError("calibrate: expected at least one batch of model inputs, got none")
    modules = gravity_modules(model)
    bar = tqdm(
        total=2 * len(batches),
        desc="calibrate",
        disable=None if progress is None else not progress,
    )
    with bar:
        moments = {name: Moments() for name in modules}
        _run(model, batches, modules, moments, bar)
        solutions = {
            name: _solve(name, seen, settings, softness, distance) for name, seen in moments.items()
        }
        agreements = {
            name: Agreement(_terms(modules[name], s), settings.law, s.reach_sq)
            for name, s in solutions.items()
        }
        _run(model, batches, modules, agreements, bar)

    calibrated = replace(
        settings,
        distance=distance,
        softness=float(softness),
        learn_softening=settings.learn_softening or softness > 0,
    )
    for name, solution in solutions.items():
        attention = model.get_submodule(name)
        attention.gravity = _calibrated(modules[name], solution, calibrated)
    model.config.gravity = calibrated.to_dict()  # type: ignore[union-attr]
    return _report(calibrated, modules, solutions, agreements)


def _check(model: nn.Module, softness: float, distance: str) -> GravityConfig:
    refuse_wrapped(model, "calibrate", "expected this order: load, patch, calibrate, LoRA")
    settings = settings_of(model)
    if settings is None:
        raise RuntimeError(
            f"calibrate: expected a patched model, got {type(model).__name__}. "
            "Call patch_with_gravity(model) first"
        )
    if not math.isfinite(softness) or softness < 0:
        raise ValueError(f"calibrate: softness: expected a finite number >= 0, got {softness!r}")
    if distance not in DISTANCES:
        raise ValueError(f"calibrate: distance: expected one of {DISTANCES}, got {distance!r}")
    return settings


def _run(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    modules: Mapping[str, GravityParameters],
    observers: Mapping[str, Observer],
    bar: tqdm,
) -> None:
    device = next(model.parameters()).device
    with _observing(model, modules, observers), torch.no_grad():
        for batch in batches:
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            padding = inputs.get("attention_mask")
            is_plain = isinstance(padding, Tensor) and padding.dim() == 2
            for observer in observers.values():
                observer.real_tokens = padding.bool() if is_plain else None  # type: ignore[union-attr]
            model(**inputs)
            bar.update()
    unseen = [name for name, observer in observers.items() if not observer.calls]
    if unseen:
        raise ValueError(
            f"calibrate: expected batches that reach every converted attention module, "
            f"{len(unseen)} saw none, such as {unseen[0]}. Pass the inputs that exercise them, or "
            "leave them out with GravityConfig(layers=[...])"
        )


@contextmanager
def _observing(
    model: nn.Module,
    modules: Mapping[str, GravityParameters],
    observers: Mapping[str, Observer],
) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    for name, gravity in modules.items():
        gravity.observer = observers[name]
    try:
        yield
    finally:
        for gravity in modules.values():
            gravity.observer = None
        for module, mode in training.items():
            module.training = mode


def _solve(
    name: str, seen: Moments, settings: GravityConfig, softness: float, distance: str
) -> _Solution:
    sums = {key: value.cpu() for key, value in seen.sums.items()}
    longest_key_sq = seen.longest_key_sq.cpu()
    groups = sums["dot"].shape[0] // longest_key_sq.shape[0]
    longest = longest_key_sq.repeat_interleave(groups)
    mean_query_sq = sums["query_sq"] / seen.queries
    if distance == "lifted":
        radius_sq, kappa, key_scale = longest_key_sq, longest, longest
    else:
        radius_sq, kappa = None, sums["attended_key_sq"] / seen.queries
        key_scale = (sums["key_sq"] / seen.keys).repeat_interleave(groups)
    mean_distance = (mean_query_sq + kappa - 2.0 * sums["dot"] / seen.queries).clamp(min=0.0)
    softening = (softness * (mean_query_sq + key_scale)).clamp(min=settings.epsilon)
    typical = mean_distance + softening
    if settings.law == "force":
        mass = typical * math.sqrt(seen.scaling / 2.0)
    else:
        mass = (typical * seen.scaling / 2.0).sqrt()
    reach_sq = (seen.longest_query_sq.cpu().sqrt() + longest.sqrt()).square()
    solution = _Solution(mass, softening, mean_distance, radius_sq, reach_sq)
    for field, value in solution._asdict().items():
        if value is not None and not value.isfinite().all():
            raise ValueError(
                f"calibrate: {name}: {field}: expected finite statistics, got {value.tolist()}. "
                "The host's queries or keys overflow on these batches"
            )
    return solution


def _masses(module: GravityParameters, solution: _Solution) -> Tensor:
    """The closed form at the module's granularity: the mean over the heads that share a mass."""
    return solution.mass.view(module.mass_count, -1).mean(-1)


def _terms(module: GravityParameters, solution: _Solution) -> GravityTerms:
    shared = _masses(module, solution).repeat_interleave(module.query_heads // module.mass_count)
    radius = solution.radius_sq
    return GravityTerms(
        shared.float(), solution.softening.float(), None if radius is None else radius.float()
    )


def _calibrated(
    old: GravityParameters, solution: _Solution, settings: GravityConfig
) -> GravityParameters:
    new = GravityParameters(settings, old.query_heads, old.key_value_heads)
    with torch.no_grad():
        # Equal positions of every head can make a mass 0, whose logarithm is not a number.
        new.mass_log.copy_(inverse_softplus(_masses(old, solution).clamp(min=1e-6)))
        if settings.learn_softening:
            softening = solution.softening.clamp(min=EPSILON_FLOOR)
            new.softening_log.copy_(inverse_softplus(softening))
        if settings.distance == "lifted":
            assert solution.radius_sq is not None  # solved for this distance
            new.key_radius_sq.copy_(solution.radius_sq)
    return new.train(old.training).to(old.mass_log.device)


def _report(
    settings: GravityConfig,
    modules: Mapping[str, GravityParameters],
    solutions: Mapping[str, _Solution],
    agreements: Mapping[str, Agreement],
) -> CalibrationReport:
    rows = []
    for name, solution in solutions.items():
        terms = _terms(modules[name], solution)
        divergence, contrast = agreements[name].divergence(), agreements[name].contrast()
        heads = modules[name].query_heads
        groups = heads // modules[name].key_value_heads
        for head in range(heads):
            radius = terms.key_radius_sq
            rows.append(
                {
                    "layer": name,
                    "head": head,
                    "mean_distance": solution.mean_distance[head].item(),
                    "mass": terms.mass[head].item(),
                    "softening": terms.softening[head].item(),
                    "key_radius_sq": None if radius is None else radius[head // groups].item(),
                    "contrast": contrast[head].item(),
                    "kl": divergence[head].item(),
                }
            )
    return CalibrationReport(settings=settings, rows=tuple(rows))
