"""The end of a training run under the mask that sparse feed-forward layers will have in use."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..layers.sparse_feed_forward import SparseFeedForward


class MaskAwarePhase(TrainerCallback):
    """Trains dense first and, over the last `share` of the steps, masked: forward each token has
    its blocks only, backward the mask is straight-through, so the network gets used to it and the
    predictors learn from its loss.

    >>> Trainer(model, arguments, callbacks=[MaskAwarePhase(share=0.2)], ...)

    When it ends, layers have the policies that they had before. The phase follows from the step,
    so a resumed run goes on in the right one.

    Args:
        share: of the optimizer steps, in (0, 1].

    Raises:
        ValueError: another share. When training begins: a model without such layers.
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(
                f"MaskAwarePhase: share: expected more than 0 and at most 1, got {share!r}"
            )
        self.share = share
        self._before: dict[SparseFeedForward, str] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, SparseFeedForward)] if model else []
        if not layers:
            raise ValueError(
                "MaskAwarePhase: expected a model with sparse feed-forward layers, got "
                f"{type(model).__name__} without any. Use a LeanFormer, or call "
                "sparsify_feed_forward(model) first"
            )
        self._before = {layer: layer.policy for layer in layers}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        masked = state.global_step >= self.first_masked_step(state.max_steps)
        for layer in self._before:
            layer.policy = "masked" if masked else "dense"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for layer, policy in self._before.items():
            layer.policy = policy
        self._before = {}

    def first_masked_step(self, steps: int) -> int:
        """How many of `steps` are dense: all but the share, which is one step at least."""
        return steps - max(1, round(self.share * steps))
