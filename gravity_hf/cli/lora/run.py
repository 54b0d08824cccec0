"""LoRA on a gravity model: load, train, save the adapter. What is finished is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ...hub.file_names import RESULTS_FILE
from ..steps.output import (
    is_saved,
    nothing_left_if_refused,
    require_usable,
    start_folder,
)
from ..steps.runner import choose_device
from ..steps.work import Step, WorkFolder, read_record
from .context import LoraContext
from .settings import LoraSettings
from .steps import load, lora, save

_STEPS = (
    Step("load", load),
    Step("lora", lora, after=("load",), together=True, keeps=True),
    Step("save", save, after=("lora",), is_intact=is_saved),
)


def run_lora(settings: LoraSettings, console: Console, command: str = "") -> dict[str, Any]:
    """Train LoRA, masses and softenings of a gravity model, and save the adapter.

    Kill it at any moment and call it again with the same settings: it goes on where it was. Under
    a launcher every process calls it.

    Returns:
        What `results.json` in the output folder holds; nothing in processes that do not write.

    Raises:
        ValueError, ImportError: settings, folders or packages that cannot work.
    """
    settings.check()
    run = settings.run
    out = Path(run.out).expanduser()
    root = Path(run.work).expanduser() if run.work else out / "work"
    require_usable(out, root, run.model, run.force)
    processes, device = choose_device(run.device)
    work = WorkFolder(
        root, _STEPS, _settings_of_steps(settings), frozenset(), processes.num_processes
    )
    context = LoraContext(
        out=out,
        work=work,
        processes=processes,
        device=device,
        console=console,
        command=command,
        seed=settings.data.seed,
        named=(),
        settings=settings,
    )
    with nothing_left_if_refused(context, "load"):
        start_folder(context, run.force)
        context.run()
    return read_record(out, RESULTS_FILE) or {} if context.is_main else {}


def _settings_of_steps(settings: LoraSettings) -> dict[str, dict[str, Any]]:
    from ..steps.identity import data_identity, host_identity

    every = settings.to_dict()
    data = {**vars(settings.data), "files": data_identity(settings.data)}
    before = ("model", "dtype", "softness", "law", "samples", "qlora")
    budget = ("steps", "rank", "alpha", "dropout", "learning_rate")
    return {
        "load": {
            **{name: every[name] for name in before},
            **data,
            "host": host_identity(settings.run.model),
        },
        "lora": {**{name: every[name] for name in budget}, **settings.training.that_matter()},
        "save": {},
    }
