"""What governed training says of itself afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .history import History, groups_of, key_of
from .state import Governance


def report_of(
    machines: Governance,
    history: History,
    sizes: Mapping[str, int],
    samples: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A JSON-able report.

    `groups` has, for each: `parameters`, `state`, `steps` with a gradient, the mean `multiplier` of
    its rate over all steps of the run, its `allocation` now. `mean_multiplier`: the same over all
    weights. `floor_infeasible`: the floors exceed the budget now, and have shrunk. `learned`: sets
    of groups that got gradients together, with their steps. `flops`: see `flops_of`. `captured`:
    what the router foresaw. `samples`: what the sampler has counted, where it counts.
    """
    steps = max(history.steps, 1)
    budget = machines.budget
    return {
        "steps": history.steps,
        "skipped_steps": history.skipped,
        "groups": {
            name: {
                "parameters": sizes[name],
                "state": machines.states[name].value,
                "steps": history.group_steps.get(name, 0),
                "multiplier": history.multipliers.get(name, 0.0) / steps,
                "allocation": None if budget is None else budget.allocations[name],
            }
            for name in machines.groups
        },
        "mean_multiplier": mean_multiplier(history, sizes),
        "floor_infeasible": budget is not None and budget.floor_infeasible,
        "flops": flops_of(machines, history),
        "learned": [
            {"groups": groups_of(key), "steps": count}
            for key, count in sorted(history.flops_steps.items())
        ],
        "changes": list(history.changes),
        "activations": list(history.activations),
        "regressions": list(history.regressions),
        "probes": list(history.probes),
        "captured": list(history.captured),
        "samples": None if samples is None else dict(samples),
        "trace": list(history.trace),
    }


def mean_multiplier(history: History, sizes: Mapping[str, int]) -> float:
    """The factor of the scheduled rate, over all weights and all steps."""
    total = sum(sizes.values()) * history.steps
    if not total:
        return 1.0
    return sum(size * history.multipliers.get(name, 0.0) for name, size in sizes.items()) / total


def flops_of(machines: Governance, history: History) -> dict[str, float] | None:
    """Per batch: `forward`, `backward` on the average, `backward_full` with every group learning,
    `backward_saved`, a share; and `probes`, all of them over all optimiser steps. None where
    something was not counted. Where a router has chosen for each of several batches of a step, all
    of them are taken for what they trained together: more than it was."""
    flops, ways = history.flops, history.flops_steps
    full = flops.get(key_of(machines.groups))
    probes = [flops.get(key_of(probe["gradients"])) for probe in history.probes]
    if full is None or not history.steps or not ways.keys() <= flops.keys() or None in probes:
        return None
    forward = sum(flops[key][0] * count for key, count in ways.items()) / history.steps
    backward = sum(flops[key][1] * count for key, count in ways.items()) / history.steps
    return {
        "forward": forward,
        "backward": backward,
        "backward_full": float(full[1]),
        "backward_saved": 1 - backward / full[1] if full[1] else 0.0,
        "probes": sum(sum(counted) for counted in probes if counted) / history.steps,
    }
