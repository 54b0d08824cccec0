"""transformers' Trainer, drawing by tiers."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer

from .sampling import TieredSampler


class TieredTrainer(Trainer):
    """Trainer whose training samples are drawn by a `TieredSampler`.

    With a `RescoringCallback` its checkpoints hold where the sampler stood, and a resumed run is
    the uninterrupted one. Without it they do not, and that holds for epochs of "cover" alone.

    Args:
        sampler: of the training dataset.

    Raises:
        ValueError: the training dataset is of another size than the sampler's.

    Example:
        >>> sampler = TieredSampler(size=len(data), seed=0)
        >>> rescoring = RescoringCallback(sampler, data, every=500)
        >>> TieredTrainer(
        ...     model, args, train_dataset=data, sampler=sampler, callbacks=[rescoring]
        ... ).train()
    """

    def __init__(self, *args: Any, sampler: TieredSampler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size = None if self.train_dataset is None else len(self.train_dataset)
        if size != len(sampler.tiers):
            raise ValueError(
                f"TieredTrainer: expected the dataset of the sampler ({len(sampler.tiers)} "
                f"samples) as train_dataset, got one of {size}"
            )
        self.sampler = sampler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TieredSampler:
        return self.sampler
