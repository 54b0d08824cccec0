"""What the geolip experiments found: summaries of runs, and tables of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Rows = list[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]

NONE = "–"
DRIFT = "drift"
# A task whose mechanism is not known beforehand.
OPEN = "open"
# As in the verdict: gains count from here on.
ENGAGED_GAIN = 0.01
ATTENTION_NAMES = {"dot_product": "dot product", "gravity": "gravity"}


def features_summary(runs: Rows) -> dict[str, Any]:
    """Everything that was measured on features, JSON-able; a row for each run."""
    names = ("arm", "group", "seed", "numbers_per_token", "principal_cosine", "last_loss")
    return {
        "format": 1,
        "unit": (
            "cosine of held-out tokens in the z-scored space, mean; `principal_cosine`: of as many "
            "principal components as a token has numbers; deviations in radians"
        ),
        "settings": runs[0]["run"]["training"],
        "data": runs[0]["data"],
        "rows": [{**{name: run[name] for name in names}, **_shared(run)} for run in runs],
        "conditions": runs[-1]["conditions"],
    }


def mechanisms_summary(runs: Rows) -> dict[str, Any]:
    """Everything that was measured on tasks with a known answer, JSON-able."""
    names = ("task", "attention", "seed", "without", "last_loss")
    rows = []
    for run in runs:
        expected = run["run"]["settings"]["expected"]
        found = {**{name: run[name] for name in names}, **_shared(run)}
        rows.append({**found, "expected": expected, "found": found_in(run["verdict"])})
    return {
        "format": 1,
        "unit": (
            "gains are shares of the loss; `without`: gains over attention to oneself alone "
            "(`context`) and over none (`attention`); recon_mse: of targets of variance 1"
        ),
        "settings": runs[0]["run"]["sizes"],
        "rows": rows,
        "conditions": runs[-1]["conditions"],
    }


def _shared(run: dict[str, Any]) -> dict[str, Any]:
    names = ("steps", "seconds", "verdict")
    return {**{name: run[name] for name in names}, "commit": run["conditions"].get("commit")}


def found_in(verdict: dict[str, Any]) -> str:
    """`A`, `B`, or `drift`: B whose alphas rose all the same."""
    return DRIFT if verdict["alpha_drift"] else verdict["mechanism"]


def grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Rows by the values of these names, in the order in which they come."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def features_table(content: dict[str, Any], group: str) -> Table:
    """By arm: what is kept of held-out features, and how the frames lie."""
    headers = ["model", "parameters", "numbers per token", "cosine", "PCA", "mean deviation"]
    headers += ["largest (random frames)", "inside (random frames)", "alpha", "gain", "mechanism"]
    lines = []
    for (arm,), rows in grouped([x for x in content["rows"] if x["group"] == group], "arm").items():
        verdicts = [row["verdict"] for row in rows]
        lines.append(
            [
                arm,
                f"{verdicts[0]['n_params']:,}",
                str(rows[0]["numbers_per_token"]),
                spread((x["recon_cosine"] for x in verdicts), "{:.4f}"),
                f"{statistics.fmean(row['principal_cosine'] for row in rows):.4f}",
                spread((x["frame_deviation"] for x in verdicts), "{:+.4f}"),
                _beside(verdicts, "deviation_absmax", max, "{:.3f}"),
                _beside(verdicts, "frac_in_envelope", statistics.fmean, "{:.2%}"),
                *_attention_cells(verdicts),
                counted(found_in(x) for x in verdicts),
            ]
        )
    return headers, lines


def _beside(verdicts: Rows, name: str, over: Callable[[list[float]], float], form: str) -> str:
    """What the frames have, and in brackets what as many random ones have."""
    own = f"frame_{name}" if name.startswith("deviation") else name
    values = [over([verdict[key] for verdict in verdicts]) for key in (own, f"random_{name}")]
    return f"{form.format(values[0])} ({form.format(values[1])})"


def _attention_cells(verdicts: Rows) -> list[str]:
    """Mean alpha and gain; dashes where there is no attention."""
    if any(verdict["mean_alpha"] is None for verdict in verdicts):
        return [NONE, NONE]
    return [
        spread((verdict["mean_alpha"] for verdict in verdicts), "{:.4f}"),
        spread((verdict["coordination_gain"] for verdict in verdicts), "{:+.4f}"),
    ]


def mechanisms_table(content: dict[str, Any]) -> Table:
    """By task: the mechanism that it calls for, and what was found with either attention."""
    headers = ["task", "expected"]
    attentions = [name for (name,) in grouped(content["rows"], "attention")]
    for name in attentions:
        headers += [f"{ATTENTION_NAMES[name]}: found", "alpha", "gain"]
    lines = []
    for (task, expected), rows in grouped(content["rows"], "task", "expected").items():
        by = grouped(rows, "attention")
        cells = [cell for name in attentions for cell in _found_cells(by.get((name,), []))]
        lines.append([task, expected, *cells])
    return headers, lines


def _found_cells(rows: Rows) -> list[str]:
    if not rows:
        return [NONE] * 3
    return [
        counted(row["found"] for row in rows),
        *_attention_cells([row["verdict"] for row in rows]),
    ]


def criteria_table(content: dict[str, Any]) -> Table:
    """By criterion: how many runs of either kind it calls A, and the tasks that it takes for A."""
    rows = content["rows"]
    needs = {kind: [row for row in rows if row["expected"] == kind] for kind in ("A", "B")}
    lines = []
    for title, holds in CRITERIA.items():
        wrong = [row for row in needs["B"] if holds(row)]
        tasks = "; ".join(dict.fromkeys(row["task"] for row in wrong)) or NONE
        right = sum(holds(row) for row in needs["A"])
        found = [f"{right} of {len(needs['A'])}", f"{len(wrong)} of {len(needs['B'])}"]
        lines.append([title, *found, tasks])
    return ["criterion", "A found where it is", "A where B is right", "in the tasks"], lines


def _alphas_rose(row: dict[str, Any]) -> bool:
    """By as much as the verdict asks for: both its conditions hold, or this one without a gain."""
    return row["verdict"]["mechanism"] == "A" or row["verdict"]["alpha_drift"]


CRITERIA: dict[str, Callable[[dict[str, Any]], bool]] = {
    "context swap and alphas: the verdict": lambda row: row["verdict"]["mechanism"] == "A",
    "context swap alone": lambda row: row["verdict"]["coordination_gain"] >= ENGAGED_GAIN,
    "alphas alone": _alphas_rose,
    "each attends to itself, and alphas": lambda row: (
        _alphas_rose(row) and row["without"]["context"] >= ENGAGED_GAIN
    ),
    "attention taken out, and alphas": lambda row: (
        _alphas_rose(row) and row["without"]["attention"] >= ENGAGED_GAIN
    ),
    "attention taken out alone": lambda row: row["without"]["attention"] >= ENGAGED_GAIN,
}


def spread(values: Iterable[float], form: str) -> str:
    """`mean ± standard deviation` over seeds; the mean alone where there is one seed."""
    known, unsigned = list(values), form.replace("+", "")
    mean = form.format(statistics.fmean(known))
    if not float(mean):
        mean = unsigned.format(0.0)
    return mean if len(known) < 2 else f"{mean} ± {unsigned.format(statistics.stdev(known))}"


def counted(values: Iterable[str]) -> str:
    """`A` where all agree, else how often each was found."""
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {value}" for value, count in counts.most_common())
