"""The steps of a LoRA run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config import GravityConfig
from ...hub.card_public import is_local, public
from ...hub.file_names import CALIBRATION_FILE, RESULTS_FILE
from ...integration.calibration import calibrate
from ...integration.patching import gravity_status, patch_with_gravity
from ...training.conditions import run_conditions
from ...training.distributed import save_whole
from ...training.files import write_json, write_text
from ...training.lora import gravity_lora
from ...training.optim import GravityTrainer
from ..steps.batches import batches_of, held_out_loss
from ..steps.output import new_contents, publish
from ..steps.states import save_gravity_state
from ..steps.train import train_with_bar, training_arguments
from .context import LoraContext

_MEASURED_ROWS = 64


def load(context: LoraContext, folder: Path) -> dict[str, Any]:
    """The gravity model; a host is converted in closed form."""
    run = context.settings.run
    if run.softness is not None and not context.is_host:
        raise ValueError(
            f"softness: expected none for a gravity model, it has its own, got "
            f"{run.softness:g}. Leave --softness out"
        )
    model = context.base()
    data = context.data_for(model)
    if not context.is_host:
        context.say(str(gravity_status(model)))
        return {"class": type(model).__name__, "calibration": None}
    patch_with_gravity(model, GravityConfig(law=run.law))
    count = min(run.samples, len(data.train))
    batches = batches_of(data.train, data.collator, count, labels=False)
    report = calibrate(model, batches, run.softness)
    save_gravity_state(model, folder)
    write_text(folder / CALIBRATION_FILE, report.to_json() + "\n")
    context.say(str(gravity_status(model)))
    return {"class": type(model).__name__, "calibration": report.summary()}


def lora(context: LoraContext, folder: Path) -> dict[str, Any]:
    """Train; the adapter goes into `folder`."""
    settings, run = context.settings, context.settings.run
    base = context.patched()
    if run.qlora:
        from peft import prepare_model_for_kbit_training

        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=settings.training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    # The first process of a machine fills the cache of datasets, the others read it.
    with context.processes.local_main_process_first():
        data = context.data_for(base)
    model = gravity_lora(base, r=run.rank, alpha=run.alpha, dropout=run.dropout)
    arguments = training_arguments(context, settings.training, folder, run.steps, run.learning_rate)
    trainer = GravityTrainer(
        model=model, args=arguments, train_dataset=data.train, data_collator=data.collator
    )
    losses = train_with_bar(context, trainer, "LoRA under gravity")
    save_whole(trainer.accelerator.unwrap_model(trainer.model), folder)
    return {"losses": losses, "text": data.description, "digest": data.digest}


def save(context: LoraContext, folder: Path) -> dict[str, Any]:
    """Adapter, masses, tokenizer, and the loss on held-out text with and without the adapter."""
    # Imported here because peft is optional.
    from ...integration.adapters import load_gravity_adapter

    model = load_gravity_adapter(context.patched(), context.work.folder("lora")).eval()
    new = new_contents(context)
    model.save_pretrained(new)
    # peft's own card says how to load it without gravity.
    (new / "README.md").unlink(missing_ok=True)
    context.tokenizer.save_pretrained(new)
    calibration = context.work.folder("load") / CALIBRATION_FILE
    if calibration.is_file():
        write_text(new / CALIBRATION_FILE, calibration.read_text(encoding="utf-8"))
    results = {
        "format": 1,
        "settings": context.settings.to_dict(),
        "model": {
            **(context.result("load") or {}),
            "local": is_local(context.settings.run.model),
            "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        },
        "training": context.result("lora"),
        "evaluation": _measure(context, model),
        "conditions": {
            **run_conditions(context.device),
            "command": context.command,
            "processes": context.processes.num_processes,
        },
    }
    write_json(new / RESULTS_FILE, public(results))
    return publish(context, new, ("save",))


def _measure(context: LoraContext, model: Any) -> dict[str, Any] | None:
    data = context.data_for(model.get_base_model())
    if data.validation is None:
        return None
    count = min(len(data.validation), _MEASURED_ROWS)
    batches = batches_of(data.validation, data.collator, count)
    after = held_out_loss(model, batches)
    with model.disable_adapter():
        before = held_out_loss(model, batches)
    return {"loss_before": before, "loss_after": after, "examples": count}
