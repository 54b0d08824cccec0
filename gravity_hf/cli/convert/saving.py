"""The last steps: the finished folder, and its card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...hub.cards import write_card
from ...training.conditions import run_conditions
from ...training.files import write_json
from ..status import CALIBRATION_FILE
from ..steps.output import new_contents, publish
from ..steps.work import read_record
from .context import Context
from .early import CALIBRATION_TABLE

RESULTS_FILE = "results.json"
CARD_FILE = "README.md"


def save(context: Context, folder: Path) -> dict[str, Any]:
    """Model (or adapter), tokenizer, calibration and results into OUT."""
    new = new_contents(context)
    context.final().save_pretrained(new)
    # peft writes a card of its own.
    (new / CARD_FILE).unlink(missing_ok=True)
    context.tokenizer.save_pretrained(new)
    if "calibrate" not in context.work.skipped:
        for name in (CALIBRATION_FILE, CALIBRATION_TABLE):
            shutil.copyfile(context.work.folder("calibrate") / name, new / name)
    write_json(new / RESULTS_FILE, results(context))
    return publish(context, new, ("save", "card"))


def card(context: Context, folder: Path) -> dict[str, Any]:
    """README.md of the finished folder, from results.json alone."""
    write_card(context.out / RESULTS_FILE, context.out / CARD_FILE)
    return {"files": [CARD_FILE]}


def results(context: Context) -> dict[str, Any]:
    """Everything that was measured, with its conditions; None where a step was left out."""
    host = context.result("load") or {}
    calibration = context.result("calibrate")
    return {
        "format": 1,
        "host": {"name": context.settings.model.model, **host},
        "saved": "adapter" if _is_adapter(context) else "model",
        "law": context.settings.config().to_dict()["law"],
        "settings": context.settings.to_dict(),
        "left_out": sorted(context.work.skipped),
        "patch": context.result("patch"),
        "calibration": None if calibration is None else calibration["summary"],
        "training": {name: _training(context, name) for name in ("transfer", "lora", "control")},
        "evaluation": context.result("evaluate"),
        "conditions": {
            **run_conditions(context.device),
            "command": context.command,
            "processes": context.processes.num_processes,
        },
    }


def _training(context: Context, name: str) -> dict[str, Any] | None:
    result = context.result(name)
    if result is None:
        return None
    record = read_record(context.work.folder(name)) or {}
    return {**result, "seconds": record.get("seconds"), "settings": record.get("settings")}


def _is_adapter(context: Context) -> bool:
    return "lora" not in context.work.skipped and "merge" in context.work.skipped
