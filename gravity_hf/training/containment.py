"""Containment under transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from ..runtime.mirror import MirrorLayer
from .callback_state import base_model, restore
from .containment_protocol import ContainmentConfig, ContainmentProtocol
from .watching import ForceWatch, force_over_processes

if TYPE_CHECKING:
    from ..runtime.ledger import Ledger

__all__ = ["ContainmentCallback", "ContainmentConfig", "ContainmentProtocol"]


class ContainmentCallback(TrainerCallback, ExportableState):
    """`ContainmentProtocol` under transformers' Trainer.

    Before each optimiser step gradients are clipped, every `every` steps the true mean force is
    measured in the forward that runs anyway, and gravity damped if it is over the limit. Gradients
    that are not finite are dropped and training stops, so that the model stays as it was (under
    float16 they are left to the loss scaler). Each logged loss is checked: one outside of
    `min_loss` and `max_loss` stops training.

    Trainer clips first: with `TrainingArguments(max_grad_norm=0)` the clipping is this callback's
    alone, otherwise the smaller limit holds. Its NaN filter hides a NaN loss from the log; the
    gradients of such a step are what is seen here.

    Args:
        config: limits; a mapping of them is taken too.
        ledger: where to log.
        mirror: what measures forces and keeps their history; None makes one.
        every: steps from one measurement to the next; 0 measures nothing and damps nothing.

    Raises:
        ValueError: `every` below 0.
    """

    def __init__(
        self,
        config: ContainmentConfig | Mapping[str, Any] | None = None,
        *,
        ledger: Ledger | None = None,
        mirror: MirrorLayer | None = None,
        every: int = 10,
    ) -> None:
        if every < 0:
            raise ValueError(f"ContainmentCallback.every: expected 0 or more, got {every!r}")
        if not isinstance(config, ContainmentConfig):
            config = ContainmentConfig(**(config or {}))
        self.config = config
        self.ledger = ledger
        self.every = every
        self.protocol: ContainmentProtocol | None = None
        # What the protocol of a resumed run starts from.
        self.progress: dict[str, Any] | None = None
        self._mirror = mirror
        self._watch: ForceWatch | None = None
        self._stopped = False

    def state(self) -> dict[str, Any]:
        """Constructor arguments and progress, JSON-able; transformers stores it in checkpoints."""
        progress = self.progress if self.protocol is None else self.protocol.state_dict()
        return {
            "args": {"config": asdict(self.config), "every": self.every},
            "attributes": {"progress": progress},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        restore(self, state)
        self._stopped = False
        ledger = self.ledger if state.is_world_process_zero else None
        protocol = ContainmentProtocol(self.config, base_model(kwargs["model"]), ledger)
        if self.progress is not None:
            protocol.load_state_dict(self.progress)
        self.protocol = protocol
        limit = self.config.max_attention_force
        mirror = self._mirror or MirrorLayer(ledger, max_force_threshold=limit)
        self._watch = ForceWatch(mirror)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch is not None and self.every and state.global_step % self.every == 0:
            self._watch.arm(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        protocol = self._protocol()
        protocol.step_count += 1
        reports = None if self._watch is None else self._watch.collect()
        if args.fp16:
            stopped = False
        else:
            _, stopped = protocol.clip()
        if stopped:
            # Without gradients the optimiser passes every parameter over, decay included.
            kwargs["model"].zero_grad(set_to_none=True)
            self._stopped = control.should_training_stop = True
            return
        if reports is not None:
            force = force_over_processes(reports, args.device)
            protocol.damp({"mean_force": force})
        protocol.propose()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if (
            self.protocol is not None
            # The log of a step whose gradients have ended training tells nothing new.
            and not self._stopped
            and logs
            and "loss" in logs
            and self.protocol.stops(logs["loss"])
        ):
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch is not None:
            self._watch.disarm()

    def _protocol(self) -> ContainmentProtocol:
        if self.protocol is None:
            raise RuntimeError(
                "ContainmentCallback: expected on_train_begin before any step, got a step. Pass "
                "the callback to Trainer(callbacks=[...])"
            )
        return self.protocol
