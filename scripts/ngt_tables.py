"""README's tables of NGT: text beside its twins, ablations, recall, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ngt_recall
from ngt_arms import ARMS, V2, VANILLA
from ngt_report import at_the_end, better_twin, by_section, paired, spread
from ngt_report import table as arms_table
from table_text import (
    NONE,
    Rows,
    Table,
    benchmark_conditions,
    experiment_conditions,
    markdown,
    result_file,
    result_json,
)

_LANGUAGE_MODEL = "ngt_language_model.json"
_LANGUAGE_MODEL_COMMAND = "python scripts/experiments/ngt_language_model.py --device cuda"
_RECALL_COMMAND = "python scripts/experiments/ngt_recall.py"
_SPEED_COMMAND = "python scripts/benchmark/ngt.py"


def tables(results: Path, benchmarks: Path) -> dict[str, Callable[[], str]]:
    """Makers by the names of README's marks. Folders: of the experiments and of the benchmark."""
    return {
        "ngt-language-model": lambda: language_model_text(results),
        "ngt-ablations": lambda: ablations_text(results),
        "ngt-recall": lambda: recall_text(results),
        "ngt-speed": lambda: speed_text(benchmarks, "cuda"),
        "ngt-cpu": lambda: speed_text(benchmarks, "cpu"),
    }


def language_model_text(folder: Path) -> str:
    """Held-out loss on every text: NGT and its twins, and the difference to the better twin."""
    content = result_json(folder, _LANGUAGE_MODEL, _LANGUAGE_MODEL_COMMAND)
    return f"{markdown(*language_model(content))}\n{_how(content)}\n" + experiment_conditions(
        [content]
    )


def language_model(content: dict[str, Any]) -> Table:
    """By model: nats per token of each text, and the paired difference to its better twin."""
    sections = by_section(content)
    headers = ["nats per token", "parameters"]
    for section, arms in sections.items():
        twin = better_twin(arms)
        headers += [section.split(",")[0], f"minus {twin}" if twin else "difference"]
    lines = []
    main = [arm for arm in ARMS if ARMS[arm].group == "main"]
    for arm in [arm for arm in main if any(arm in arms for arms in sections.values())]:
        rows = next(arms[arm] for arms in sections.values() if arm in arms)
        cells = [cell for arms in sections.values() for cell in _loss(content, arms, arm)]
        lines.append([arm, f"{rows[0]['parameters']:,}", *cells])
    return headers, lines


def _loss(content: dict[str, Any], arms: dict[str, Rows], arm: str) -> list[str]:
    if arm not in arms:
        return [NONE, NONE]
    twin = better_twin(arms)
    loss = spread(row["best"] for row in arms[arm]) + at_the_end(content, arms[arm][0])
    gaps = paired(arms[arm], arms[twin]) if twin not in (None, arm) else []
    return [loss, spread(gaps, signed=True)]


def _how(content: dict[str, Any]) -> str:
    settings = content["settings"]
    steps = {
        name: rows[0]["steps"]
        for name, arms in by_section(content).items()
        for rows in arms.values()
    }
    seeds = sorted({row["seed"] for row in content["rows"]})
    rates = sorted({row["learning_rate"] for row in content["tuning"]})
    tuned = f"for each the best of {', '.join(f'{rate:g}' for rate in rates)}" if rates else ""
    long = "; ".join(f"{name}: {count} steps" for name, count in steps.items())
    return (
        f"{long}, of {settings['rows']} x {settings['max_position_embeddings']} tokens; "
        f"{len(seeds)} seeds; learning rate {tuned or 'not tuned'} on another seed, with a star "
        "where that is the first or the last that was tried. The lowest of 20 evaluations of a run."
    )


def ablations_text(folder: Path) -> str:
    """v2 with one thing changed, for every text on which that was tried."""
    content = result_json(folder, _LANGUAGE_MODEL, _LANGUAGE_MODEL_COMMAND)
    parts = []
    for section, arms in by_section(content).items():
        if V2 in arms and any(ARMS[arm].group == "ablations" for arm in arms):
            lines = "\n".join(arms_table(content, section, "ablations"))
            parts.append(f"{section}:\n\n{lines}\n")
    if not parts:
        raise FileNotFoundError(
            f"{_LANGUAGE_MODEL} has no ablations yet: make them with "
            f"`{_LANGUAGE_MODEL_COMMAND} --arms ablations`"
        )
    return "\n".join(parts) + experiment_conditions([content])


def recall_text(folder: Path) -> str:
    """Associative recall: accuracies of all seeds, and how soon."""
    text = result_file(folder, "ngt_recall.jsonl", _RECALL_COMMAND)
    rows = [json.loads(line) for line in text.splitlines()]
    known = rows[0]["settings"]
    note = (
        f"Share of right answers: {known['pairs']} keys of {known['keys']}, each with one of "
        f"{known['values']} values; {known['steps']} steps of {known['rows']} sequences, at two "
        "learning rates; one number for each seed, in the order of the accuracies."
    )
    return f"{ngt_recall.table(rows)}\n\n{note}\n{experiment_conditions(rows)}"


def speed_text(folder: Path, device: str) -> str:
    """Steps, forwards and generation of NGT as times of the vanilla twin's."""
    flag = " --device cuda" if device == "cuda" else ""
    result = result_json(folder, f"ngt_{device}.json", _SPEED_COMMAND + flag)
    known = benchmark_conditions(result["conditions"])
    return f"{markdown(*speed(result['rows']))}\n{known}\n"


def speed(rows: Rows) -> Table:
    """By case: every model's milliseconds, times those of the vanilla twin, and memory."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    keys = ("shape", "work", "mode", "batch", "length")
    lines = []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = {r["model"]: r for r in rows if tuple(r[key] for key in keys) == case}
        peer = mine.get(VANILLA, {})
        cells = [_speed_cell(mine.get(model, {}), peer) for model in models]
        counts = [row["parameters"] for row in mine.values() if "parameters" in row]
        title = _case_in_words(next(iter(mine.values())), max(counts, default=0))
        lines.append([title, *cells])
    return ["ms (x vanilla), memory", *models], lines


def _case_in_words(row: dict[str, Any], parameters: int) -> str:
    size = f"{parameters / 1e6:.0f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} K"
    if row["work"] == "generate":
        return f"{size}: a token generated, of {row['length']}"
    work = {"step": "training step", "forward": "forward"}[row["work"]]
    return f"{size}: {work}, {row['batch']} x {row['length']}, {row['mode']}"


def _speed_cell(row: dict[str, Any], peer: dict[str, Any]) -> str:
    if "median_ms" not in row:
        return NONE
    text = f"{row['median_ms']:.3g}"
    if "ratio" in row and row is not peer:
        text += f" ({row['ratio']:.2f})"
    if "peak_mib" not in row:
        return text
    text += f", {row['peak_mib']:.0f} MiB"
    if row is not peer and peer.get("peak_mib"):
        text += f" ({row['peak_mib'] / peer['peak_mib']:.2f})"
    return text
