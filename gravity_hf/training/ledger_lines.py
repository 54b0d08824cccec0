"""Trainer's course in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

if TYPE_CHECKING:
    from ..runtime.ledger import Ledger


class LedgerCallback(TrainerCallback):
    """Writes what Trainer logs into a ledger, on the main process only.

    `train_step {step, loss, ...}` for each logged loss, with the other numbers of that log;
    `eval_step {step, val_loss, ...}` for each evaluation; `checkpoint {step}` for each one saved;
    `training_started`, `training_finished {step, stopped}`. The ledger is flushed whenever a
    checkpoint is saved and at the end, so that no checkpoint is younger than its lines.

    Args:
        ledger: where to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(state, "training_started", {"max_steps": state.max_steps})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._log(state, "train_step", logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = metrics or {}
        loss = {"val_loss": metrics["eval_loss"]} if "eval_loss" in metrics else {}
        rest = {name: value for name, value in metrics.items() if name != "eval_loss"}
        self._log(state, "eval_step", {**loss, **rest})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(state, "checkpoint", {})
        self._flush(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        early = state.global_step < state.max_steps
        self._log(state, "training_finished", {"stopped": early})
        self._flush(state)

    def _log(self, state: TrainerState, event: str, payload: Mapping[str, Any]) -> None:
        if state.is_world_process_zero:
            self.ledger.log(event, {"step": state.global_step, **payload})

    def _flush(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.ledger.flush()
