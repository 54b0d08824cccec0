"""Coordinates of tokens for TensorBoard's projector."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .measures import evaluating
from .repulsion import require_coordinates
from .streams import RandomWindows

MOST_TOKENS = 1024
TAG = "coordinates"
_HEADER = ["token", "mass", "place"]


class ProjectCoordinates(TrainerCallback):
    """Every `interval` steps: the last coordinates of the first validation tokens, with their text,
    mass and place. It draws no random number: a run is the same with it and without.

    Raises:
        ValueError: nothing reports to TensorBoard, or the model is sharded.
        TypeError: a model without coordinates.
    """

    def __init__(self, trainer: Trainer, windows: RandomWindows, interval: int) -> None:
        if "tensorboard" not in trainer.args.report_to:
            raise ValueError(
                "--projector_interval: expected --report_to tensorboard beside it, got "
                f"{trainer.args.report_to or 'none'}"
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "--projector_interval: expected 0 under FSDP, where no process has the whole "
                f"model, got {interval}"
            )
        require_coordinates(trainer.model, "--projector_interval")
        self.trainer, self.windows, self.interval = trainer, windows, interval

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.interval or not state.is_world_process_zero:
            return
        writer = self._writer()
        if writer is None:
            return
        model = self.trainer.model
        rows = max(1, MOST_TOKENS // len(self.windows[0]))
        ids = self.windows.__getitems__(list(range(min(rows, len(self.windows)))))
        with evaluating(model):
            output = model(input_ids=ids.to(model.device), output_coordinates=True, use_cache=False)
        points = output.coordinates.flatten(0, 1)[:MOST_TOKENS].float().cpu()
        masses = output.masses.flatten().tolist()
        places = list(range(ids.shape[1])) * ids.shape[0]
        texts = [shown(self.trainer.processing_class.decode([i])) for i in ids.flatten().tolist()]
        metadata = [
            [text, f"{mass:.4g}", str(place)]
            for text, mass, place in zip(texts, masses, places, strict=True)
        ]
        writer.add_embedding(
            points,
            metadata=metadata[: len(points)],
            metadata_header=_HEADER,
            tag=TAG,
            global_step=state.global_step,
        )

    def _writer(self) -> Any:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                return callback.tb_writer
        return None


def shown(text: str) -> str:
    """In quotes, with tabs and line ends as escapes: a table of tokens has one line for each."""
    return repr(text)
