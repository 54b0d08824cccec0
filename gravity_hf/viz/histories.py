"""What training logged, read from results.json of a conversion or trainer_state.json of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_LOSS = "training loss, nats per token"
_OWN_LOSS = "training objective, no unit"


@dataclass(frozen=True)
class TrainingCurve:
    """Losses at optimiser steps; `gradient_norms` before clipping, None where not every entry of
    the log has one."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...] | None = None

    @classmethod
    def of_losses(cls, losses: Sequence[float]) -> TrainingCurve:
        """One loss per step, from step 1."""
        return cls(tuple(range(1, len(losses) + 1)), tuple(losses))

    @classmethod
    def of_log(cls, entries: Iterable[Mapping[str, Any]]) -> TrainingCurve:
        """Entries with `step`, `loss` and perhaps `grad_norm`, as Trainer logs them; entries
        without a loss (evaluations) do not count."""
        found = [entry for entry in entries if _is_number(entry.get("loss"))]
        norms = tuple(float(e["grad_norm"]) for e in found if _is_number(e.get("grad_norm")))
        return cls(
            tuple(int(entry["step"]) for entry in found),
            tuple(float(entry["loss"]) for entry in found),
            norms if found and len(norms) == len(found) else None,
        )


@dataclass(frozen=True)
class LossPanel:
    """Curves that share an axis. `label` of that axis, with the unit."""

    title: str
    curves: Mapping[str, TrainingCurve]
    label: str = TEXT_LOSS


def panels_of_results(results: Mapping[str, Any]) -> tuple[LossPanel, ...]:
    """Transfer and LoRA of a conversion; the control beside LoRA where both learnt the text alone.

    Runs that the conversion left out, or that logged nothing, are not there.
    """
    training = results.get("training") or {}
    runs = {name: _curve(training.get(name)) for name in ("transfer", "lora", "control")}
    panels = []
    if runs["transfer"]:
        panels.append(
            LossPanel("Attention transfer", {"masses": runs["transfer"]}, "transfer loss, no unit")
        )
    if runs["lora"] and (training["lora"] or {}).get("objective") is not None:
        panels.append(LossPanel("LoRA with a teacher", {"gravity": runs["lora"]}, _OWN_LOSS))
        runs["lora"] = None
    titles = {"control": "host, same budget", "lora": "gravity"}
    beside = {title: curve for name, title in titles.items() if (curve := runs[name])}
    if beside:
        panels.append(LossPanel("LoRA", beside))
    return tuple(panels)


def panels_of_trainer_state(state: Mapping[str, Any]) -> tuple[LossPanel, ...]:
    """The log of one Trainer run, from its `trainer_state.json`."""
    curve = TrainingCurve.of_log(state.get("log_history") or ())
    return (LossPanel("Training", {"gravity": curve}),) if curve.losses else ()


def _curve(run: Mapping[str, Any] | None) -> TrainingCurve | None:
    curve = TrainingCurve.of_log((run or {}).get("losses") or ())
    return curve if curve.losses else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
