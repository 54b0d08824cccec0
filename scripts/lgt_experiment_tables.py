"""README's tables of what LGT learns: recall of tokens, and text, beside softmax and counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lgt_report import by_arm, table
from table_text import (
    NONE,
    Rows,
    Table,
    experiment_conditions,
    markdown,
    result_file,
    result_json,
)

_RECALL_COMMAND = "python scripts/experiments/lgt_recall.py"
_LANGUAGE_MODEL_COMMAND = "python scripts/experiments/lgt_language_model.py --device cuda"
# Names of the experiment's variants; those of a line differ in one thing.
VARIANTS: dict[str, tuple[str, ...]] = {
    "LGT at its defaults": ("defaults",),
    "the published law, made causal": ("published law, made causal",),
    "softening 0.05, softening 1": ("softening 0.05", "softening 1"),
    "flat, fractal positions": ("flat (curvature 0)", "fractal positions"),
    "no cap, smooth cap": ("no cap", "smooth cap (tanh)"),
    "a token does not see itself": ("without itself",),
    "power law (log-space force)": ("power law",),
    "value projection": ("value projection",),
    "softmax attention (GPT-2)": ("softmax attention (GPT-2)",),
}


def recall_text(folder: Path) -> str:
    """Accuracies on the recall tasks, and what chance gives."""
    text = result_file(folder, "lgt_recall.jsonl", _RECALL_COMMAND)
    rows = [json.loads(line) for line in text.splitlines()]
    settings, leak = rows[0]["settings"], max(row["change_of_earlier_logits"] for row in rows)
    note = (
        f"Accuracy, lowest – highest of all runs. Chance is {rows[0]['chance']:.4f}: rows of "
        f"{settings['length']} tokens of {settings['vocabulary']}, {settings['steps']} steps. "
        f"A changed token moves earlier logits by {leak:g} at most."
    )
    return f"{markdown(*recall(rows))}\n{note}\n{experiment_conditions(rows)}"


def recall(rows: Rows) -> Table:
    """By variant: the range of its accuracies on either task."""
    lines = []
    for title, variants in VARIANTS.items():
        mine = [row for row in rows if row["variant"] in variants]
        tasks = ("previous", "first")
        cells = [_range([r["accuracy"] for r in mine if r["task"] == task]) for task in tasks]
        lines.append([title, *cells, str(len({(r["variant"], r["seed"]) for r in mine}))])
    return ["width 64, 2 layers, 2 heads", "token before", "first token", "runs"], lines


def _range(values: list[float]) -> str:
    if not values:
        return NONE
    ends = dict.fromkeys(f"{value:.4f}" for value in (min(values), max(values)))
    return " – ".join(ends)


def language_model_text(folder: Path) -> str:
    """Bits per byte of held-out text: LGT, softmax attention and counting."""
    content = result_json(folder, "lgt_language_model.json", _LANGUAGE_MODEL_COMMAND)
    return f"{table(content)}\n\n{_how(content)}\n{experiment_conditions([content])}"


def _how(content: dict[str, Any]) -> str:
    settings = content["settings"]
    steps = {row["steps"] for rows in by_arm(content).values() for row in rows if row.get("steps")}
    trained = " or ".join(f"{count}" for count in sorted(steps))
    return (
        f"{content['text']['description']}. Width {settings['width']}, {settings['layers']} "
        f"layers, {settings['heads']} heads; {trained} steps of {settings['rows']} x "
        f"{settings['length']} bytes; for each the best of {len(settings['rates'])} learning rates "
        "in short runs, a lower one where that did not last."
    )
