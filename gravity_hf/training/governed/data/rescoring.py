"""Tiers that follow the model while it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from ...callback_state import restore
from .sampling import TieredSampler
from .scoring import sample_losses
from .tiers import TierSettings

if TYPE_CHECKING:
    from ....runtime.ledger import Ledger


class RescoringCallback(TrainerCallback, ExportableState):
    """Scores a part of the dataset anew every so many optimiser steps, and tells the sampler.

    Parts follow each other through a fixed random order of the dataset, so that after `1/fraction`
    of them every sample has a tier of late. The state of the sampler is kept in Trainer's
    checkpoints: a resumed run draws what the uninterrupted one would have drawn.

    In several processes each scores the same samples, and the losses of the first one count.

    Args:
        sampler: what Trainer draws by.
        dataset: that is drawn from, of mappings with `input_ids`; `labels` and `attention_mask`
            where it has them.
        every: optimiser steps between two parts.
        fraction: of the dataset: one part.
        batch_size: samples at a time.
        settings: where tiers begin.
        seed: of the order.
        ledger: where `rescored` lines go, with what the sampler has covered; None: nowhere.

    Raises:
        ValueError: settings out of range; a dataset of another size than the sampler's.
    """

    def __init__(
        self,
        sampler: TieredSampler,
        dataset: Any,
        *,
        every: int = 1000,
        fraction: float = 0.1,
        batch_size: int = 32,
        settings: TierSettings | None = None,
        seed: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        if every < 1 or not 0 < fraction <= 1:
            raise ValueError(
                "RescoringCallback: expected every of 1 or more and fraction above 0 to 1, got "
                f"{every!r} and {fraction!r}"
            )
        if len(dataset) != len(sampler.tiers):
            raise ValueError(
                f"RescoringCallback: expected the dataset of the sampler ({len(sampler.tiers)} "
                f"samples), got one of {len(dataset)}"
            )
        self.sampler, self.dataset = sampler, dataset
        self.every, self.fraction, self.batch_size = every, fraction, batch_size
        self.settings = settings or TierSettings()
        self.seed = seed
        self.ledger = ledger
        # What the sampler of a resumed run starts from.
        self.progress: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Constructor arguments and progress, JSON-able; transformers stores it in checkpoints."""
        return {
            "args": {"every": self.every, "fraction": self.fraction, "seed": self.seed},
            "attributes": {"progress": self.sampler.state_dict()},
        }

    def part(self, number: int) -> np.ndarray:
        """Indices of the part `number`, from 0 on."""
        size = len(self.dataset)
        count = max(1, round(self.fraction * size))
        order = np.random.default_rng(self.seed).permutation(size)
        return order[(number * count + np.arange(count)) % size]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if restore(self, state) and self.progress is not None:
            # Trainer goes through what it has seen, unless it is told not to.
            self.sampler.load_state_dict(self.progress, replay=not args.ignore_data_skip)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        indices = self.part(state.global_step // self.every - 1)
        found = sample_losses(
            kwargs["model"], self.dataset, indices.tolist(), batch_size=self.batch_size
        )
        losses = _of_the_first_process(found.losses, args.device)
        self.sampler.update(indices, self.settings.tiers(losses))
        if self.ledger is not None and state.is_world_process_zero:
            line = {"step": state.global_step, "scored": len(indices)}
            self.ledger.log("rescored", {**line, **self.sampler.coverage()})


def _of_the_first_process(losses: np.ndarray, device: torch.device) -> np.ndarray:
    """The same in every process: tiers that differed would give each its own order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return losses
    # Not every device has float64.
    shared = torch.from_numpy(losses).float().to(device)
    torch.distributed.broadcast(shared, 0)
    return shared.double().cpu().numpy()
