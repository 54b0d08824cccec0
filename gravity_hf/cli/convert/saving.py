"""The last steps: the finished folder, its figures and its card."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from ... import __version__
from ...hub.card_facts import gravity_block
from ...hub.card_host import read_host_card
from ...hub.card_public import public
from ...hub.card_tensors import count_parameters, gravity_layers
from ...hub.cards import write_card
from ...hub.file_names import CALIBRATION_FILE, CARD_FILE, FIGURES_FOLDER, RESULTS_FILE
from ...training.conditions import run_conditions
from ...training.files import write_json
from ..steps.output import new_contents, publish
from ..steps.work import read_record
from .context import Context
from .early import CALIBRATION_TABLE
from .settings import ModelArguments

# Figures show one text or few; the rest is for quantiles.
_FIGURE_BATCHES = 4


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
    write_json(new / RESULTS_FILE, public(results(context, new)))
    return publish(context, new, ("save", "figures", "card"))


def figures(context: Context, folder: Path) -> dict[str, Any]:
    """Pictures of the finished model beside its host, on held-out text where there is some."""
    if not can_draw():
        context.say("No figures: matplotlib is not installed (pip install 'gravity_hf[viz]')")
        return {"files": []}
    # Imported here because matplotlib is optional.
    from ...viz.export import write_figures

    batches = (context.data.held_out or context.data.calibration)[:_FIGURE_BATCHES]
    write_figures(
        context.final(),
        context.out / FIGURES_FOLDER,
        batches=[{k: v for k, v in batch.items() if k != "labels"} for batch in batches],
        host=context.host(),
        results=read_record(context.out, RESULTS_FILE),
        calibration=(read_record(context.out, CALIBRATION_FILE) or {}).get("rows"),
        tokenizer=context.tokenizer,
    )
    return {"files": [FIGURES_FOLDER]}


def can_draw() -> bool:
    """Whether figures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def card(context: Context, folder: Path) -> dict[str, Any]:
    """README.md of the finished folder, from what lies in it."""
    write_card(context.out, context.out / CARD_FILE)
    return {"files": [CARD_FILE]}


def results(context: Context, saved: Path) -> dict[str, Any]:
    """Everything that was measured, with its conditions; None where a step was left out.

    `saved`: where the model lies already; its constants are read from there.
    """
    host = context.result("load") or {}
    calibration = context.result("calibrate")
    return {
        "format": 1,
        "gravity_hf": __version__,
        "host": {**host, **_host(context)},
        "saved": "adapter" if _is_adapter(context) else "model",
        "law": context.settings.config().to_dict()["law"],
        "settings": context.settings.to_dict(),
        "gravity": gravity_block(saved),
        "layers": gravity_layers(saved),
        "parameters": count_parameters(saved),
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


def _host(context: Context) -> dict[str, Any]:
    """Whose work it is."""
    model = context.settings.model
    return {"name": model.model, "base_model": model.base_model, "card": host_card(model)}


def host_card(model: ModelArguments) -> dict[str, Any]:
    """The host's card; that of its copy on the Hub where its folder has none."""
    card = read_host_card(model.model)
    if model.base_model and not card["found"]:
        on_the_hub = read_host_card(model.base_model)
        return on_the_hub if on_the_hub["found"] else card
    return card


def _training(context: Context, name: str) -> dict[str, Any] | None:
    result = context.result(name)
    if result is None:
        return None
    record = read_record(context.work.folder(name)) or {}
    return {**result, "seconds": record.get("seconds"), "settings": record.get("settings")}


def _is_adapter(context: Context) -> bool:
    return "lora" not in context.work.skipped and "merge" in context.work.skipped
