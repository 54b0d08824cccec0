"""What ngt_language_model.py found: one JSON object of all runs, and tables of it in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ngt_arms import ALIBI, ARMS, V2, VANILLA

Rows = list[dict[str, Any]]
NONE = "–"
TWINS = (VANILLA, ALIBI)


def summary(runs: Rows, tuned: Rows, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything that was measured.

    Args:
        runs, tuned: results of `train`, of the seeds that are compared and of that for learning
            rates.
        settings: the shape, and what the runs share.
        command: the last one that added to them.

    Returns:
        A JSON-able dict. `rows`: runs at the learning rate that the tuning chose; `replaced`: at
        others; `tuning`. What goes together, one text with one tokenizer for so long, has one
        `section`.
    """
    texts = {_section(run): run["text"] for run in runs}
    for run in [*runs, *tuned]:
        known = texts.get(_section(run), run["text"])
        if known["digest"] != run["text"]["digest"]:
            raise ValueError(
                f"{run['id']}: expected a run on the text that the others of its section saw "
                f"({known['digest']}), got {run['text']['digest']}. Use another --out for it"
            )
    rates = _rates(runs, tuned)
    at = [run["run"]["rate"] == rates[_section(run), run["run"]["arm"]] for run in runs]
    return {
        "format": 1,
        "unit": "nats per token of held-out text; `best`: the lowest of all evaluations",
        "settings": settings,
        "texts": texts,
        "rows": [_row(run) for run, fits in zip(runs, at, strict=True) if fits],
        "replaced": [_row(run) for run, fits in zip(runs, at, strict=True) if not fits],
        "tuning": [_row(run, curves=False) for run in tuned],
        "conditions": {**runs[-1]["conditions"], "command": command, **_all([*runs, *tuned])},
    }


def _all(runs: Rows) -> dict[str, list[str]]:
    """Devices and commits of all runs: they need not be of one day."""
    return {
        f"{name}s": sorted({run["conditions"][name] for run in runs if name in run["conditions"]})
        for name in ("device", "commit")
    }


def _section(run: dict[str, Any]) -> str:
    schedule = ", ".join(f"{value:g} {name}" for name, value in run["run"]["schedule"].items())
    return f"{run['run']['data']}, {run['run']['tokenizer']}, {schedule}"


def _rates(runs: Rows, tuned: Rows) -> dict[tuple[str, str], float]:
    """By section and arm: of the rates that were run, the one that did best in the tuning; without
    one the rate with most seeds, the lower one of two."""
    rates = {}
    for key in dict.fromkeys((_section(run), run["run"]["arm"]) for run in runs):
        mine = [x["run"]["rate"] for x in runs if (_section(x), x["run"]["arm"]) == key]
        tried = {
            x["run"]["rate"]: x["best"]
            for x in tuned
            if (_section(x), x["run"]["arm"]) == key and x["best"] is not None
        }

        def rank(rate: float, mine: list[float] = mine, tried: dict[float, float] = tried) -> Any:
            return tried.get(rate, math.inf), -mine.count(rate), rate

        rates[key] = min(set(mine), key=rank)
    return rates


def _row(run: dict[str, Any], curves: bool = True) -> dict[str, Any]:
    bits = 1 / (math.log(2) * run["text"]["bytes_per_token"])
    names = ("parameters", "intermediate_size", "tokens", "validation_tokens", "steps", "seconds")
    names += ("peak_gib", "graphs_compiled", "best", "best_step", "final")
    found = {
        "section": _section(run),
        **{name: run["run"][name] for name in ("data", "arm", "seed")},
        "learning_rate": run["run"]["rate"],
        **{name: run[name] for name in names},
    }
    for name in ("best", "final"):
        value = run[name]
        found[f"{name}_bits_per_byte"] = None if value is None else value * bits
    return {**found, "evaluations": run["evaluations"]} if curves else found


def by_section(content: dict[str, Any]) -> dict[str, dict[str, Rows]]:
    """Rows by section and arm, arms in the order of `ARMS`."""
    found: dict[str, dict[str, Rows]] = {}
    order = list(ARMS)
    for row in sorted(content["rows"], key=lambda row: order.index(row["arm"])):
        found.setdefault(row["section"], {}).setdefault(row["arm"], []).append(row)
    return found


def better_twin(arms: dict[str, Rows]) -> str | None:
    """The twin with the lower mean loss, of the two whose rows are there and finite."""
    means = {twin: mean(arms[twin]) for twin in TWINS if twin in arms}
    finite = {twin: value for twin, value in means.items() if value is not None}
    return min(finite, key=lambda twin: finite[twin]) if finite else None


def mean(rows: Rows, name: str = "best") -> float | None:
    """Over seeds; None where one did not end with a number."""
    values = [row[name] for row in rows]
    return None if None in values else statistics.fmean(values)


def paired(rows: Rows, others: Rows) -> list[float]:
    """Differences of `best`, of the seeds that both have."""
    known = {row["seed"]: row["best"] for row in others if row["best"] is not None}
    return [
        row["best"] - known[row["seed"]]
        for row in rows
        if row["seed"] in known and row["best"] is not None
    ]


def spread(values: Iterable[float | None], signed: bool = False) -> str:
    """`mean ± standard deviation` over seeds; a dash where there is none or one is not finite."""
    known = list(values)
    if not known or None in known:
        return NONE
    text = f"{statistics.fmean(known):{'+' if signed else ''}.4f}"
    return text if len(known) < 2 else f"{text} ± {statistics.stdev(known):.4f}"


def table(content: dict[str, Any], section: str, group: str) -> list[str]:
    """Lines of Markdown: arms of `main` beside the better twin, of `ablations` beside v2."""
    arms = by_section(content)[section]
    shown = [arm for arm in arms if ARMS[arm].group == group]
    if group == "main":
        peer = better_twin(arms)
    else:
        peer, shown = V2, [arm for arm in arms if arm == V2] + shown
    against = f"minus {peer}" if peer in arms else "difference"
    headers = ["model", "parameters", "nats per token", against, "bits per byte", "at the end"]
    headers += ["learning rate", "seeds"]
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    for arm in shown:
        rows = arms[arm]
        gaps = [] if arm == peer or peer not in arms else paired(rows, arms[peer])
        cells = [
            arm,
            f"{rows[0]['parameters']:,}",
            spread(row["best"] for row in rows),
            spread(gaps, signed=True),
            spread(row["best_bits_per_byte"] for row in rows),
            spread(row["final"] for row in rows),
            f"{rows[0]['learning_rate']:g}{at_the_end(content, rows[0])}",
            str(len(rows)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def at_the_end(content: dict[str, Any], row: dict[str, Any]) -> str:
    """A mark where the best learning rate is the highest or the lowest that was tried."""
    tried = [
        x["learning_rate"]
        for x in content["tuning"]
        if (x["section"], x["arm"]) == (row["section"], row["arm"])
    ]
    return "*" if tried and row["learning_rate"] in (min(tried), max(tried)) else ""


def tables(content: dict[str, Any], section: str) -> list[str]:
    """Main arms, then the ablations where there are any."""
    lines = table(content, section, "main")
    if any(ARMS[arm].group == "ablations" for arm in by_section(content)[section]):
        lines += ["", *table(content, section, "ablations")]
    return lines
