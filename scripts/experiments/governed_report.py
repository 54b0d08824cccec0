"""What the experiment on governed training says, as JSON and as a table."""

from __future__ import annotations

import statistics
from typing import Any

from governed_arms import ARMS, PLAIN

TITLES = {
    "plain": "plain",
    "governed": "governed",
    "defaults": "governed, the library's thresholds",
    "no_hierarchy": "without levels",
    "no_budget": "without the budget",
    "no_freezing": "without freezing",
    "rates_only": "the budget alone",
    "freezing_only": "freezing alone",
    "rate_matched": "plain, governed's mean rate",
    "budget_rate_matched": "plain, the budget's mean rate",
    "random_freezing": "plain, frozen at random, as much saved",
    "equal_flops": "plain, governed's arithmetic",
    "equal_time": "plain, governed's time",
}
HEADERS = [
    "model, arm", "loss", "against plain", "better in", "backward saved", "arithmetic", "time",
    "mean rate", "seeds",
]  # fmt: skip


def governed_summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs, and for every model and arm means over seeds."""
    rows = [{name: value for name, value in run.items() if name != "run"} for run in done]
    models = list(dict.fromkeys(row["model"] for row in rows))
    return {
        "rows": rows,
        "summary": [
            line
            for model in models
            for arm in ARMS
            if (line := _line(rows, model, arm)) is not None
        ],
    }


def _line(rows: list[dict[str, Any]], model: str, arm: str) -> dict[str, Any] | None:
    mine = {r["seed"]: r for r in rows if (r["model"], r["arm"]) == (model, arm)}
    plain = {r["seed"]: r for r in rows if (r["model"], r["arm"]) == (model, PLAIN)}
    if not mine:
        return None
    losses = [row["loss"] for row in mine.values()]
    pairs = [(mine[seed], plain[seed]) for seed in mine if seed in plain]
    return {
        "model": model,
        "arm": arm,
        "seeds": sorted(mine),
        "steps": [row["steps"] for row in mine.values()],
        "loss": statistics.fmean(losses),
        "loss_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "differences": [one["loss"] - other["loss"] for one, other in pairs],
        "backward_saved": statistics.fmean(row["backward_saved"] for row in mine.values()),
        "flops_share": _mean([one["flops"] / other["flops"] for one, other in pairs]),
        "time_share": _mean([one["seconds"] / other["seconds"] for one, other in pairs]),
        "mean_multiplier": statistics.fmean(row["mean_multiplier"] for row in mine.values()),
    }


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def governed_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each model and arm: the loss in nats per byte, and what it cost beside plain."""
    return HEADERS, [_cells(line) for line in content["summary"]]


def _cells(line: dict[str, Any]) -> list[str]:
    deviation, differences = line["loss_deviation"], line["differences"]
    spread = "" if deviation is None else f" ± {deviation:.4f}"
    against = better = "–"
    if differences and line["arm"] != PLAIN:
        against = f"{statistics.fmean(differences):+.4f}"
        better = f"{sum(d < 0 for d in differences)} of {len(differences)}"
    return [
        f"{line['model']}, {TITLES[line['arm']]}",
        f"{line['loss']:.4f}{spread}",
        against,
        better,
        f"{line['backward_saved']:.1%}",
        _share(line["flops_share"]),
        _share(line["time_share"]),
        f"{line['mean_multiplier']:.2f}",
        str(len(line["seeds"])),
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} x"
