"""The conversion from beginning to end: what is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ...hub.file_names import RESULTS_FILE
from ..steps.identity import data_identity, host_identity
from ..steps.output import (
    is_saved,
    nothing_left_if_refused,
    require_usable,
    start_folder,
)
from ..steps.runner import choose_device
from ..steps.work import Step, WorkFolder, read_record
from .checks import check_settings
from .context import Context
from .early import calibrate, load, patch
from .evaluating import evaluate
from .saving import can_draw, card, figures, host_card, save
from .settings import STEPS, ConversionSettings


def run_conversion(
    settings: ConversionSettings, console: Console, command: str = ""
) -> dict[str, Any]:
    """Run every step that is not finished under these settings.

    Kill it at any moment and call it again with the same settings: it goes on where it was, and on
    the CPU ends with the same numbers, bit for bit. Under a launcher every process calls it.

    Args:
        settings: checked before anything is done.
        console: what happens is said here, by the main process.
        command: how to repeat it; goes into the results.

    Returns:
        What `results.json` in the output folder holds; nothing in processes that do not write.

    Raises:
        ValueError, ImportError: settings, folders or packages that cannot work; an output folder
            that was new is gone again.
    """
    check_settings(settings)
    context = _prepare(settings, console, command)
    with nothing_left_if_refused(context, "patch"):
        start_folder(context, settings.model.force)
        context.run()
    return read_record(context.out, RESULTS_FILE) or {} if context.is_main else {}


def _prepare(settings: ConversionSettings, console: Console, command: str) -> Context:
    out = Path(settings.model.out).expanduser()
    root = Path(settings.model.work).expanduser() if settings.model.work else out / "work"
    require_usable(out, root, settings.model.model, settings.model.force)
    processes, device = choose_device(settings.model.device)
    work = WorkFolder(
        root,
        _all_steps(settings),
        _settings_of_steps(settings),
        frozenset(STEPS) - settings.active(set(STEPS)),
        processes.num_processes,
    )
    return Context(
        out=out,
        work=work,
        processes=processes,
        device=device,
        console=console,
        command=command,
        seed=settings.data.seed,
        named=tuple(settings.model.skip),
        settings=settings,
    )


def _all_steps(settings: ConversionSettings) -> tuple[Step, ...]:
    control: Callable[..., dict[str, Any]]
    lora: Callable[..., dict[str, Any]]
    transfer: Callable[..., dict[str, Any]]
    if settings.trains:
        # Imported here because peft and accelerate are optional.
        from .training import control, lora, transfer
    else:
        control = lora = transfer = _needs_training
    ways: dict[str, dict[str, Any]] = {
        "load": {"run": load},
        "patch": {"run": patch, "after": ("load",)},
        "calibrate": {"run": calibrate, "after": ("patch",)},
        "transfer": {"run": transfer, "after": ("calibrate",), "together": True, "keeps": True},
        "lora": {"run": lora, "after": ("transfer",), "together": True, "keeps": True},
        "control": {"run": control, "after": ("load",), "together": True, "keeps": True},
        "merge": {"run": merge, "after": ("lora",)},
        "evaluate": {"run": evaluate, "after": ("merge", "control"), "keeps": True},
        "save": {"run": save, "after": ("evaluate", "merge"), "is_intact": is_saved},
        "figures": {"run": figures, "after": ("save",), "is_intact": is_saved},
        "card": {"run": card, "after": ("save", "figures"), "is_intact": is_saved},
    }
    return tuple(Step(name, **ways[name]) for name in STEPS)


def _needs_training(context: Context, folder: Path) -> dict[str, Any]:
    raise RuntimeError("convert: expected training steps only where the settings train")


def merge(context: Context, folder: Path) -> dict[str, Any]:
    """LoRA goes into the weights. They are written once, by `save`; here the result is checked."""
    import torch

    model = context.final()
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(
            f"merge: expected finite weights, got others in {len(broken)} tensors, such as "
            f"{broken[0]}. Training diverged: lower lora_learning_rate"
        )
    return {"class": type(model).__name__, "parameters": model.num_parameters()}


def _settings_of_steps(settings: ConversionSettings) -> dict[str, dict[str, Any]]:
    """What each step depends on, besides the steps before it."""
    every = settings.to_dict()

    def chosen(*names: str) -> dict[str, Any]:
        return {name: every[name] for name in names}

    data = {**vars(settings.data), "files": data_identity(settings.data)}
    text = {**data, "samples": every["samples"], "trains": settings.trains}
    training = {**data, **settings.training.that_matter()}
    budget = chosen("lora_steps", "lora_rank", "lora_alpha", "lora_dropout", "lora_learning_rate")
    return {
        "load": {**chosen("model", "dtype"), "host": host_identity(settings.model.model)},
        "patch": settings.config().to_dict(),
        "calibrate": {**chosen("softness", "max_kl", "fit", "distance"), **text},
        "transfer": {**vars(settings.transfer), **training},
        "lora": {**budget, **chosen("distillation", "temperature", "anneal_to"), **training},
        "control": {**budget, **training},
        "merge": {},
        "evaluate": {**vars(settings.evaluation), **data},
        # It gets a licence, or another one, without any change of the host itself.
        "save": {**chosen("base_model"), "host's card": host_card(settings.model)},
        # Drawn once matplotlib is there.
        "figures": {"matplotlib": can_draw()},
        "card": {},
    }
