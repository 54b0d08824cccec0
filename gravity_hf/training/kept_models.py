"""The best and the last model of a run, each in a folder of its own that loads as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .files import write_json
from .folders import BEST, LAST, VALIDATION_FILE, whole_folder

__all__ = ["BEST", "LAST", "VALIDATION_FILE", "KeepModels"]


class KeepModels(TrainerCallback):
    """Keeps the model with the lowest validation loss in `best/`, and what `keep` is asked to.

    A folder has weights, config, tokenizer and `validation.json` (step, loss); it is written whole
    or not at all. A run that is resumed knows the losses before from its checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.best = math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.best = math.inf
        if Path(str(args.output_dir), BEST, VALIDATION_FILE).is_file():
            losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            self.best = min(losses, default=math.inf)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.nan)
        if loss < self.best:
            self.best = loss
            self.keep(BEST, loss)

    def keep(self, name: str, loss: float) -> None:
        """Write the model as it is now into the folder `name` of the run. All processes call it."""
        trainer = self.trainer
        target = Path(str(trainer.args.output_dir), name)
        if not trainer.is_world_process_zero():
            # Sharded models are gathered by all; only the main process writes.
            trainer.save_model(str(target), _internal_call=True)
            return
        with whole_folder(target) as room:
            trainer.save_model(str(room), _internal_call=True)
            # A pickle, of use to Trainer alone.
            (room / "training_args.bin").unlink(missing_ok=True)
            write_json(room / VALIDATION_FILE, {"step": trainer.state.global_step, "loss": loss})
