"""Masses, softenings and key radii from data: closed forms, fits, and what they achieve.

Lifted keys remove the one thing that distances punish and dot products do not, the length of a key;
the softening then dials how gravitational the head is: at a large one the head is the host's again,
at 0 it is bare gravity. The closed forms are in `closed_form`, the fits in `fitting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import DISTANCES, EPSILON_FLOOR, GravityConfig
from ..layers.parameters import GravityParameters, inverse_softplus
from .calibration_report import CalibrationReport, report_rows
from .candidates import Candidates
from .closed_form import HeadGeometry, Solution, closed_form, head_geometry
from .fitting import BUDGET_PASSES, SOFTENING_PASSES, fit_budget, fit_softening
from .following import FollowingAgreement, FollowingMoments
from .hosts import gravity_modules, settings_of
from .observers import Agreement, Moments
from .own_models import refuse_own
from .passes import Passes
from .patching import refuse_wrapped
from .placement import execution_device
from .tensor_parallel import refuse_split

logger = logging.get_logger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    softness: float | None = None,
    distance: str = "lifted",
    *,
    fit: bool = False,
    max_kl: float | None = None,
    max_softness: float = 64.0,
    progress: bool | None = None,
) -> CalibrationReport:
    """Set masses, softenings and key radii of a patched model so that it starts where its host was.

    Three ways, from quick to thorough. Closed form (the default): one softness for every head, the
    model runs twice over the batches. `fit=True`: mass and softness of every head by least
    KL(host || gravity) of the attention, at most 18 runs. `max_kl=x`: the most gravity that stays
    near the host, the smallest softness of every head whose fitted attention is within x; at most
    22 runs. All run with the host's own attention, keep only running sums, and are deterministic.
    The model is changed at the very end, or not at all.

    Args:
        model: patched by `patch_with_gravity`, not yet under LoRA.
        batches: model inputs as dicts of tensors (`input_ids`, `attention_mask`, `pixel_values`,
            ...). A few thousand tokens are enough. A generator is read into memory first: inputs
            only.
        softness: f >= 0; None is 1. The softening of a head is `f (mean |q|^2 + R^2)` (lifted) or
            `f (mean |q|^2 + mean |k|^2)` (euclidean), at least the config's epsilon. Large f: close
            to the host and barely gravitational; always quote f, or the contrast, beside the
            quality. With `fit=True` it is the ceiling of every head's f, not a starting point:
            lifted keys come ever closer to the host as f grows, so an unbounded fit would end in a
            dot product under another name. With euclidean distance the best f may lie below it.
        distance: `"lifted"` or `"euclidean"`.
        fit: fit masses and softenings instead of taking the closed forms.
        max_kl: budget in nats, the mean over query rows of KL(host || gravity), for every head.
            Takes the place of `softness`.
        max_softness: the largest f that a head may take to keep the budget. Heads that miss it even
            there get this f and are reported: `within_budget` in the rows, and a warning.
        progress: True or False; None shows a bar on terminals only.

    Heads that share a mass (`mass_per`) share one softness, too; in a fit their mass is the one of
    least KL summed over them, and a budget holds for the worst of them.

    Returns:
        One row per head; see `CalibrationReport`. Its KL and contrast are measured in a last run,
        at the float32 masses and softenings that the model gets.

    Raises:
        RuntimeError: the model is not patched, or is wrapped.
        TypeError: it is gravity by construction.
        ValueError: arguments outside their range or against each other, no batches, an attention
            module that no batch reached, or statistics that are not finite.
    """
    settings = _check(model, softness, distance, max_kl, max_softness)
    ceiling = max_softness if max_kl is not None else 1.0 if softness is None else softness
    modules = gravity_modules(model)
    with Passes("calibrate", model, modules, batches, progress) as passes:
        fitting = BUDGET_PASSES if max_kl is not None else SOFTENING_PASSES if fit else 0
        passes.expect(2 + fitting)
        moments = {name: Moments() for name in modules}
        passes.run(moments)
        geometries = {name: head_geometry(name, seen, distance) for name, seen in moments.items()}
        solutions = _solve(passes, geometries, settings, ceiling, fit, max_kl)
        passes.expect(1)
        agreements = {
            name: Agreement(s.terms(), settings.law, s.geometry.reach_sq)
            for name, s in solutions.items()
        }
        passes.run(agreements)

    largest = max((s.factor.max().item() for s in solutions.values()), default=0.0)
    calibrated = replace(
        settings,
        distance=distance,
        softness=largest if max_kl is not None else float(ceiling),
        max_kl=None if max_kl is None else float(max_kl),
        learn_softening=settings.learn_softening or largest > 0,
    )
    rows = report_rows(solutions, agreements, max_kl)
    children = {name: _child(modules[name], s, calibrated) for name, s in solutions.items()}
    for name, child in children.items():
        model.get_submodule(name).gravity = child
    model.config.gravity = calibrated.to_dict()  # type: ignore[union-attr]
    report = CalibrationReport(settings=calibrated, rows=rows)
    _warn_over_budget(report, max_softness)
    return report


def measure_attention(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, progress: bool | None = None
) -> CalibrationReport:
    """Contrast and KL(dot product || gravity) of every head at the model's current parameters.

    Changes nothing. The model runs twice over the batches as it is, with gravity's own outputs
    flowing on, so queries and keys are the ones it attends with now; the dot product compared with
    is theirs, not that of the host before conversion. Works under LoRA, too: the masses in force
    count.

    Args:
        model: patched, calibrated or not, wrapped by peft or not.
        batches: as in `calibrate`.
        progress: True or False; None shows a bar on terminals only.

    Returns:
        One row per head. `softness` is the present softening in units of the head's
        `mean |q|^2 + R^2` (lifted) or `mean |q|^2 + mean |k|^2` on these batches.

    Raises:
        RuntimeError: the model has no gravity.
        TypeError: it is gravity by construction.
        ValueError: no batches, an attention module that no batch reached, or statistics that are
            not finite.
    """
    refuse_split(model, "measure_attention")
    refuse_own(
        model,
        "measure_attention",
        "It has no dot product to compare with: gravity_hf.runtime.MirrorLayer shows its forces",
    )
    modules = gravity_modules(model)
    if not modules:
        raise RuntimeError(
            f"measure_attention: expected a patched model with converted attention modules, got "
            f"{type(model).__name__} without any. Call patch_with_gravity(model) first"
        )
    settings = next(iter(modules.values())).config
    with Passes("measure_attention", model, modules, batches, progress) as passes, torch.no_grad():
        passes.expect(2)
        moments = {name: FollowingMoments() for name in modules}
        passes.run(moments)
        solutions = {
            name: _current(name, modules[name], seen, settings.distance)
            for name, seen in moments.items()
        }
        agreements = {
            name: FollowingAgreement(s.terms(), settings.law, s.geometry.reach_sq)
            for name, s in solutions.items()
        }
        passes.run(agreements)
    return CalibrationReport(settings=settings, rows=report_rows(solutions, agreements, None))


def _check(
    model: nn.Module,
    softness: float | None,
    distance: str,
    max_kl: float | None,
    max_softness: float,
) -> GravityConfig:
    refuse_wrapped(model, "calibrate", "expected this order: load, patch, calibrate, LoRA")
    refuse_split(model, "calibrate")
    refuse_own(model, "calibrate", "It has no host to start from: train it")
    settings = settings_of(model)
    if settings is None:
        raise RuntimeError(
            f"calibrate: expected a patched model, got {type(model).__name__}. "
            "Call patch_with_gravity(model) first"
        )
    if softness is not None and max_kl is not None:
        raise ValueError(
            f"calibrate: expected softness or max_kl, got softness={softness!r} and "
            f"max_kl={max_kl!r}. max_kl finds each head's softness; max_softness bounds it"
        )
    if softness is not None and not (math.isfinite(softness) and softness >= 0):
        raise ValueError(f"calibrate: softness: expected a finite number >= 0, got {softness!r}")
    for field, value in (("max_kl", max_kl), ("max_softness", max_softness)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"calibrate: {field}: expected a finite number > 0, got {value!r}")
    if distance not in DISTANCES:
        raise ValueError(f"calibrate: distance: expected one of {DISTANCES}, got {distance!r}")
    return settings


def _solve(
    passes: Passes,
    geometries: Mapping[str, HeadGeometry],
    settings: GravityConfig,
    ceiling: float,
    fit: bool,
    max_kl: float | None,
) -> dict[str, Solution]:
    law, epsilon = settings.law, settings.epsilon
    if not fit and max_kl is None:
        return {
            name: closed_form(passes.modules[name], geometry, law, ceiling, epsilon)
            for name, geometry in geometries.items()
        }
    candidates = {
        name: Candidates(passes.modules[name], geometry, law, ceiling, epsilon)
        for name, geometry in geometries.items()
    }
    if max_kl is None:
        return fit_softening(passes, candidates)
    return fit_budget(passes, candidates, max_kl)


def _child(
    old: GravityParameters, solution: Solution, settings: GravityConfig
) -> GravityParameters:
    new = GravityParameters(settings, old.query_heads, old.key_value_heads)
    with torch.no_grad():
        # Equal positions of every head can make a mass 0, whose logarithm is not a number.
        new.mass_log.copy_(inverse_softplus(solution.mass.clamp(min=1e-6)))
        if settings.learn_softening:
            softening = solution.softening.clamp(min=EPSILON_FLOOR)
            new.softening_log.copy_(inverse_softplus(softening))
        if solution.geometry.radius_sq is not None:
            new.key_radius_sq.copy_(solution.geometry.radius_sq)
    return new.train(old.training).to(execution_device(old))


def _current(name: str, module: GravityParameters, seen: Moments, distance: str) -> Solution:
    terms = module()
    geometry = head_geometry(name, seen, distance, terms.key_radius_sq)
    softening = terms.softening.double().cpu()
    return Solution(terms.mass.double().cpu(), softening / geometry.scale, softening, geometry)


def _warn_over_budget(report: CalibrationReport, max_softness: float) -> None:
    over = [row for row in report.rows if not row.get("within_budget", True)]
    if over:
        worst = max(over, key=lambda row: row["kl"])
        logger.warning(
            f"calibrate: {len(over)} of {len(report.rows)} heads miss max_kl="
            f"{report.settings.max_kl:g} even at softness {max_softness:g}, the worst is head "
            f"{worst['head']} of {worst['layer']} with {worst['kl']:.3g} nats. Allow a larger "
            "max_kl or max_softness, or give every head its own mass (mass_per='query_head')"
        )
