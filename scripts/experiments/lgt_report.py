"""What lgt_language_model.py found: one JSON file, a table, learning curves, and what a card of the
trained model says."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
FIGURE_LIST = "figures.json"


def summary(
    runs: Rows,
    tuned: Rows,
    counted: Rows,
    settings: dict[str, Any],
    command: str,
    replaced: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that was measured, in bits per byte of held-out text.

    Args:
        runs, tuned: as `work` gives them, of all seeds and of the one for learning rates.
        counted: unigram and bigram.
        settings: sizes, steps and learning rates that were tried.
        command: that makes all of this.
        replaced: runs whose learning rate turned out too high.
    """
    text = runs[0]["text"]
    bits = 1 / (math.log(2) * text["bytes_per_token"])
    tokens = settings["validation_windows"] * (settings["length"] - 1)
    return {
        "format": 1,
        "settings": settings,
        "text": text,
        "held_out_tokens": tokens,
        "rows": [
            *(_counted(row, bits) for row in counted),
            *(_row(run, bits) for run in runs),
        ],
        "tuning": [
            {
                "arm": run["run"]["arm"],
                "learning_rate": run["run"]["rate"],
                "bits_per_byte": run["loss"] * bits,
            }
            for run in tuned
        ],
        "replaced": [_row(run, bits) for run in replaced],
        "conditions": {**runs[0]["conditions"], "command": command},
    }


def _counted(row: dict[str, Any], bits: float) -> dict[str, Any]:
    kept = {key: row[key] for key in ("arm", "parameters", "constant")}
    return {**kept, "seed": None, "bits_per_byte": row["loss"] * bits}


def _row(run: dict[str, Any], bits: float) -> dict[str, Any]:
    return {
        "arm": run["run"]["arm"],
        "seed": run["run"]["seed"],
        "learning_rate": run["run"]["rate"],
        "steps": run["run"]["steps"],
        "bits_per_byte": run["loss"] * bits,
        **{key: run[key] for key in ("parameters", "tokens", "seconds", "peak_gib")},
        "evaluations": {step: loss * bits for step, loss in run["evaluations"].items()},
        **({"samples": run["samples"]} if "samples" in run else {}),
    }


def by_arm(content: dict[str, Any]) -> dict[str, Rows]:
    """The rows of each arm, in the order of the file."""
    found: dict[str, Rows] = {}
    for row in content["rows"]:
        found.setdefault(row["arm"], []).append(row)
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(content: dict[str, Any]) -> str:
    """Markdown: each arm's bits per byte over its seeds, with its size and speed."""
    lines = [
        "| model | parameters | bits per byte | learning rate | seconds | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, rows in by_arm(content).items():
        bits = mean_and_spread([row["bits_per_byte"] for row in rows])
        trained = rows[0]["seed"] is not None
        rate = f"{rows[0]['learning_rate']:g}" if trained else "–"
        seconds = f"{statistics.median(row['seconds'] for row in rows):.0f}" if trained else "–"
        seeds = str(len(rows)) if trained else "–"
        count = f"{rows[0]['parameters']:,}"
        lines.append(f"| {arm} | {count} | {bits} | {rate} | {seconds} | {seeds} |")
    return "\n".join(lines)


def complete_folders(content: dict[str, Any], runs: Rows) -> None:
    """results.json and figures beside every LGT that was kept, for its card."""
    from gravity_hf.training.files import write_json

    figures = learning_curves(content)
    for run in runs:
        if not run["run"]["model"]:
            continue
        folder = Path(run["run"]["model"])
        if (folder / "config.json").is_file() and _is_lgt(folder):
            write_json(folder / "results.json", results_of(content, run))
            (folder / "figures").mkdir(exist_ok=True)
            for name, data in figures.items():
                (folder / "figures" / name).write_bytes(data)


def _is_lgt(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["model_type"] == "lgt"


def results_of(content: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What a card of one of the models says, from the summary and from its run."""
    settings, arm, training = content["settings"], run["run"]["arm"], run["training"]
    return {
        "format": 1,
        "model_type": "lgt",
        "training": {
            "seed": run["run"]["seed"],
            "steps": run["run"]["steps"],
            "rows": settings["rows"],
            "length": settings["length"],
            "tokens": run["tokens"],
            "learning_rate": run["run"]["rate"],
            "learning_rates_tried": list(settings["rates"]),
            "warmup_steps": training["warmup_steps"],
            "weight_decay": training["weight_decay"],
            "bfloat16": training["bf16"],
            "text": content["text"]["description"],
            "digest": content["text"]["digest"],
        },
        "evaluation": {
            "measure": "bits_per_byte",
            "text": content["text"]["description"],
            "digest": content["text"]["digest"],
            "tokens": content["held_out_tokens"],
            "length": settings["length"],
            "rows": [
                {
                    "key": "this" if name == arm else name,
                    "title": name,
                    "parameters": rows[0]["parameters"],
                    "bits_per_byte": [row["bits_per_byte"] for row in rows],
                }
                for name, rows in by_arm(content).items()
            ],
            "own": run["loss"] / (math.log(2) * content["text"]["bytes_per_token"]),
            "samples": list(run["samples"]),
        },
        "conditions": {**run["conditions"], "command": content["conditions"]["command"]},
    }


def learning_curves(content: dict[str, Any]) -> dict[str, bytes]:
    """Learning curves of the first seed as PNG and SVG, with the list that cards read, by the names
    of the files. Nothing where matplotlib is not installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        print("figures: left out, matplotlib is not installed")
        return {}
    from gravity_hf.viz.histories import LossPanel, TrainingCurve
    from gravity_hf.viz.losses import loss_curves
    from gravity_hf.viz.style import themes_of

    curves = {}
    for arm, rows in by_arm(content).items():
        points = sorted((int(step), bits) for step, bits in rows[0].get("evaluations", {}).items())
        if points:
            steps, bits = zip(*points, strict=True)
            curves[arm] = TrainingCurve(steps, bits)
    panel = LossPanel("Held-out text", curves, "bits per byte")
    title, name = "Learning curves on held-out text", "learning-curves"
    drawn = loss_curves([panel], title).files(themes_of("light")[0])
    entry = {
        "name": name,
        "file": f"{name}.png",
        "title": title,
        "caption": "Bits per byte of held-out text in the course of training, first seed; the same "
        "windows in the same order for all.",
        "svg": f"{name}.svg",
    }
    files = {f"{name}.{ending}": data for ending, data in drawn.items()}
    return {**files, FIGURE_LIST: json.dumps([entry], indent=2).encode()}
