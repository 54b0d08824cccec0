"""A training run as a step: Trainer underneath, a bar above, checkpoints to go on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ...training.recipe import TrainingOptions, arguments_of, train_resumably
from ..console import progress_bar
from .runner import Runner


def training_arguments(
    runner: Runner, options: TrainingOptions, folder: Path, steps: int, learning_rate: float
) -> TrainingArguments:
    """TrainingArguments of a run whose checkpoints lie in `folder`."""
    arguments = arguments_of(
        options,
        folder,
        steps=steps,
        learning_rate=learning_rate,
        seed=runner.seed,
        use_cpu=runner.use_cpu,
    )
    if runner.processes.num_processes == 1:
        # Without a launcher one GPU is meant; Trainer would split each batch over all it sees.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def train_with_bar(runner: Runner, trainer: Trainer, label: str) -> list[dict[str, float]]:
    """Train to the end, from where it stopped; the logged losses from the first step on."""
    # It prints raw dicts; the bar says the same.
    trainer.remove_callback(PrinterCallback)
    bar: Any = nullcontext(lambda note="": None)
    if runner.is_main:
        bar = progress_bar(runner.console, label, trainer.args.max_steps)
    with bar as advance:
        trainer.add_callback(_Bar(advance))
        return train_resumably(trainer)


class _Bar(TrainerCallback):
    """Moves a bar once for every optimiser step, those before a resumed run included."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.advance, self.note = advance, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step):
            self.advance("")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.note)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"
