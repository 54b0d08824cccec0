"""What the comparison of codes found: a summary of runs, a table, a picture, and who won where."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

NONE = "–"
# Bytes that the table shows, if they were measured.
SHOWN = (18, 24, 36, 48, 72, 96, 144, 192, 288, 384)
# Cosines whose price is asked for.
ASKED = (0.8, 0.9, 0.95, 0.99)
_TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def compression_summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was measured, JSON-able: a row for each code and seed; the best code of each
    method at each number of bytes; the fewest bytes for some cosines."""
    rows = [row for run in runs for row in _rows(run)]
    means = [row for row in mean_rows(rows) if row["is_quantised"]]
    trained = next((run for run in runs if "steps" in run), runs[0])
    sizes = [size for run in runs for size in run["run"].get("budgets", ())]
    return {
        "format": 1,
        "unit": (
            "cosine: mean over held-out tokens in the z-scored space, raw_cosine: of the features "
            "as they are; bytes_per_token: of packed storages; side_bytes: what a reader needs "
            "once; means over seeds where there are several"
        ),
        "settings": trained["run"].get("training", {}),
        "data": runs[0]["data"],
        "at_bytes": [_at(means, size) for size in sorted(set(sizes))],
        "bytes_for": [_price(means, cosine) for cosine in ASKED],
        "rows": rows,
        "conditions": runs[-1]["conditions"],
    }


def mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each code, its cosines averaged over seeds, with their spread."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["method"], row["size"], row["bits"], row["bytes_per_token"])
        found.setdefault(key, []).append(row)
    means = []
    for same in found.values():
        cosines = [row["cosine"] for row in same]
        spread = statistics.stdev(cosines) if len(cosines) > 1 else None
        raw = statistics.fmean(row["raw_cosine"] for row in same)
        kept = {**same[0], "cosine": statistics.fmean(cosines), "raw_cosine": raw}
        means.append({**kept, "spread": spread, "seeds": len(same)})
    return means


def compression_table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """By bytes of a token: the cosine that each method keeps, with its size and bits."""
    methods = list(content["at_bytes"][0]["methods"]) if content["at_bytes"] else []
    lines = []
    for at in content["at_bytes"]:
        if at["bytes"] in SHOWN or len(content["at_bytes"]) <= len(SHOWN):
            cells = [_cell(at["methods"][name], name == at["best"]) for name in methods]
            lines.append([str(at["bytes"]), *cells])
    return ["bytes per token", *methods], lines


def winners(content: dict[str, Any]) -> list[str]:
    """A line for each method that has codes so small: where it is the best one, or that it is
    nowhere."""
    where: dict[str, list[str]] = {}
    for at in content["at_bytes"]:
        for name in (name for name, best in at["methods"].items() if best is not None):
            where.setdefault(name, [])
        where[at["best"]].append(str(at["bytes"]))
    return [
        f"{name}: best at {', '.join(sizes)} bytes" if sizes else f"{name}: never best"
        for name, sizes in where.items()
    ]


def draw(content: dict[str, Any], file: Path) -> Path:
    """Cosine against bytes, both as ratios: the best code of each method, the others faint."""
    from gravity_hf.viz.style import (
        BLUE,
        GREEN,
        GREY,
        LIGHT,
        ORANGE,
        PURPLE,
        drawing_in,
        new_figure,
    )

    colors = dict(zip(_methods(), (ORANGE, BLUE, GREY, GREEN, PURPLE), strict=True))
    means = [row for row in mean_rows(content["rows"]) if row["is_quantised"]]
    with drawing_in(LIGHT):
        figure = new_figure(6.4, 4.4, title="What codes keep of a token's features")
        axis = figure.subplots()
        for name, color in colors.items():
            own = sorted((r for r in means if r["method"] == name), key=_bytes)
            axis.scatter(*_places(own), s=12, color=color, alpha=0.35, linewidths=0)
            front = [r for r in own if r["cosine"] >= max(_cosines(own, r["bytes_per_token"]))]
            axis.plot(*_places(front), marker="o", markersize=4, color=color, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.invert_yaxis()
        sizes = sorted({at["bytes"] for at in content["at_bytes"]} & set(SHOWN))
        axis.set_xticks(sizes, [str(size) for size in sizes])
        low, high = sorted(axis.get_ylim())
        ticks = [1 - x for x in _TICKS if low <= 1 - x <= high]
        axis.set_yticks(ticks, [f"{1 - tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(True)
        axis.set_xlabel("bytes per token, of codes alone")
        axis.set_ylabel("mean cosine, held-out tokens")
        axis.legend(loc="upper left")
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.tmp")
        figure.savefig(unfinished, dpi=160, format=file.suffix.lstrip(".") or "png")
    unfinished.replace(file)
    return file


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("parameters", "steps", "last_loss", "seconds")
    shared = {name: run.get(name) for name in names}
    shared |= {"seed": run["seed"], "commit": run["conditions"].get("commit")}
    # A trained code comes without quantisation, too, last of its points.
    last = len(run["points"]) - 1 if run["kind"] != "linear" else None
    return [
        {**point, "is_quantised": index != last, **shared}
        for index, point in enumerate(run["points"])
    ]


def _methods() -> tuple[str, ...]:
    from gravity_hf.training.geolip.compression import METHODS

    return METHODS


def _at(means: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """The best code of each method in at most so many bytes; None where it has none so small."""
    found: dict[str, Any] = {}
    for name in _methods():
        own = [r for r in means if r["method"] == name and r["bytes_per_token"] <= size]
        best = max(own, key=lambda row: row["cosine"], default=None)
        names = ("cosine", "spread", "seeds", "raw_cosine", "size", "bits")
        names = (*names, "bytes_per_token", "side_bytes")
        found[name] = None if best is None else {key: best[key] for key in names}
    there = {name: x["cosine"] for name, x in found.items() if x is not None}
    return {"bytes": size, "best": max(there, key=there.__getitem__), "methods": found}


def _price(means: list[dict[str, Any]], cosine: float) -> dict[str, Any]:
    """The fewest bytes at which each method keeps a cosine; None where it never does."""
    found = {}
    for name in _methods():
        own = [r for r in means if r["method"] == name and r["cosine"] >= cosine]
        found[name] = min((r["bytes_per_token"] for r in own), default=None)
    return {"cosine": cosine, "methods": found}


def _cell(best: dict[str, Any] | None, is_best: bool) -> str:
    if best is None:
        return NONE
    text = f"{best['cosine']:.4f}"
    if best["spread"] is not None:
        text += f" ± {best['spread']:.4f}"
    bits = "" if best["bits"] is None else f" x {best['bits']}"
    return f"{'**' if is_best else ''}{text}{'**' if is_best else ''} ({best['size']}{bits})"


def _places(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [_bytes(row) for row in rows], [1 - row["cosine"] for row in rows]


def _bytes(row: dict[str, Any]) -> float:
    return row["bytes_per_token"]


def _cosines(rows: list[dict[str, Any]], size: float) -> list[float]:
    """Of all codes that are no larger."""
    return [row["cosine"] for row in rows if row["bytes_per_token"] <= size]
