"""Governed training at work between Trainer's steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..callback_state import restore
from ..files import write_json
from .audit import Audit, weights_digest
from .checks import check_training
from .measuring import GroupSignal, StepMeter
from .optimizers import Rates, check_optimizer, owned_in_order
from .probe import ProbeData
from .run import GovernedRun, new_run
from .state import StepOutcome

if TYPE_CHECKING:
    from .governed_training import GovernedTraining

GOVERNANCE_FILE = "governance.json"


class GovernedCallback(TrainerCallback, ExportableState):
    """What `GovernedTraining.callback` gives; nothing of it is called by hand.

    A checkpoint keeps its state with Trainer's own, in `trainer_state.json`, so that there is no
    checkpoint without it; `governance.json` beside it says the same to people, with the report.
    """

    def __init__(self, governed: GovernedTraining) -> None:
        self.governed = governed
        self.run: GovernedRun | None = None
        self._is_on = False
        # What a resumed run starts from.
        self.progress: dict[str, Any] | None = None
        self._meter = StepMeter()
        self._audit: Audit | None = None
        self._sampler: Any = None
        # The limit that was taken over from these arguments.
        self._clipping: tuple[TrainingArguments, float] | None = None
        self._applied: dict[str, float] = {}
        self._learned: set[str] = set()
        self._outcome = StepOutcome((), ())

    def state(self) -> dict[str, Any]:
        """Progress, JSON-able; transformers stores it in checkpoints."""
        progress = self.progress if self.run is None else self.run.state_dict()
        return {"args": {}, "attributes": {"progress": progress}}

    def samples(self) -> dict[str, int] | None:
        """What the sampler counts, where it does."""
        coverage = getattr(self._sampler, "coverage", None)
        found = coverage() if callable(coverage) else coverage
        return dict(found) if isinstance(found, Mapping) else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.leave()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        check_training(args, model, is_routed=self.governed.router is not None)
        check_optimizer(kwargs["optimizer"], self.governed.members())
        self._sampler, self.progress = _sampler_of(loader), None
        data = ProbeData.of(loader, args)
        run = new_run(self.governed, args, state, model, Rates(kwargs["optimizer"]), data)
        self.run, self._is_on = run, True
        try:
            self._begin_or_go_on(run, state, model)
        except BaseException:
            self.leave()
            raise
        self._take_clipping(args)
        run.openings.open(state.global_step)

    def leave(self) -> None:
        """The model as it was before a run that has ended with an error: nothing frozen, nothing
        routed. Nothing happens where there was none."""
        if self.run is not None and self._is_on:
            self.run.openings.close()
        self._is_on = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._running()
        if run.openings.routing is not None:
            run.openings.routing.end()
        limit = self._clipping[1] if self._clipping is not None else 0.0
        owned = list(owned_in_order(kwargs["model"], self.governed.members()))
        self._meter.before(owned, limit if limit > 0 else None)
        self._applied = run.machines.multipliers(state.global_step)
        run.rates.multiply(self._applied)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._running()
        run.rates.restore()
        signals = self._meter.after()
        _require_finite(signals, state.global_step + 1)
        self._learned = set(signals)
        run.history.count(self._learned, self._applied)
        self._outcome = run.machines.advance(state.global_step + 1, signals)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run, step = self._running(), state.global_step
        run.openings.count(self._learned)
        for outcome in (self._outcome, run.openings.probe(step)):
            run.history.note(outcome)
            self._tell("governed_change", outcome.changes)
            self._tell("governed_activation", outcome.activations)
            if run.evaluations is not None:
                run.evaluations.changed(change.group for change in outcome.changes)
        if run.evaluations is not None and run.evaluations.step(step):
            control.should_evaluate = True
        if run.gate is not None:
            self._tell("governed_gate", run.gate.step(run.machines.states))
            run.machines.boost(run.gate.feedback())
        run.history.sample(step, state.max_steps, run.machines)
        if self._audit is not None:
            self._audit.step(step, self._line(run))
        if run.machines.learning():
            run.openings.open(step)
        else:
            control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        run = self.run
        if run is None or run.evaluations is None:
            return
        found = run.evaluations.evaluated(state.global_step, metrics or {})
        run.history.regressions += [regression._asdict() for regression in found]
        self._tell("governed_regression", found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        digest = weights_digest(kwargs["model"])
        content = {
            "step": state.global_step,
            "weights": digest,
            "report": self.governed.report(),
            "state": self.state()["attributes"]["progress"],
        }
        write_json(folder / GOVERNANCE_FILE, content)
        if self._audit is not None:
            self._audit.checkpoint(state.global_step, folder.name, digest)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.leave()
        if self._clipping is not None:
            args.max_grad_norm = self._clipping[1]
            self._clipping = None
        if self._audit is not None:
            line = self._line(self._running())
            self._audit.event("governed_end", {"step": state.global_step, **line})
            self._audit.close()

    def _begin_or_go_on(self, run: GovernedRun, state: TrainerState, model: nn.Module) -> None:
        resumed = state.global_step > 0
        if restore(self, state) and self.progress is not None:
            run.load_state_dict(self.progress)
        elif resumed:
            raise ValueError(
                f"GovernedTraining: expected the checkpoint of a governed run, got one of step "
                f"{state.global_step} without its state. Resume it without governed training, or "
                "begin in another folder"
            )
        else:
            run.openings.check_paths()
        settings = self.governed.audit
        if settings is None or not state.is_world_process_zero:
            return
        self._audit = Audit(settings)
        if resumed:
            self._audit.check_weights(state.global_step, weights_digest(model))
        begun = {"step": state.global_step, "groups": self.governed.sizes(), "resumed": resumed}
        self._audit.event("governed_begin", begun)

    def _take_clipping(self, args: TrainingArguments) -> None:
        # A run that has ended with an error has left the 0 that it had set.
        if self._clipping is None or self._clipping[0] is not args or args.max_grad_norm:
            self._clipping = (args, float(args.max_grad_norm or 0.0))
        args.max_grad_norm = 0.0

    def _tell(self, event: str, things: Any) -> None:
        """Tuples with names, as events of the ledger."""
        if self._audit is not None:
            for thing in things:
                self._audit.event(event, thing._asdict())

    def _line(self, run: GovernedRun) -> dict[str, Any]:
        budget = run.machines.budget
        return {
            "states": {name: state.value for name, state in run.machines.states.items()},
            "gradients": run.machines.gradient_ratios,
            "allocations": None if budget is None else dict(budget.allocations),
            "multipliers": dict(self._applied),
            "samples": self.samples(),
        }

    def _running(self) -> GovernedRun:
        if self.run is None:
            raise RuntimeError(
                "GovernedCallback: expected on_train_begin before any step, got a step. Pass the "
                "callback to Trainer(callbacks=[...])"
            )
        return self.run


def _sampler_of(loader: Any) -> Any:
    """The sampler of a loader, under the wrappers that accelerate puts around it."""
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)
    return getattr(batches, "sampler", None)


def _require_finite(signals: Mapping[str, GroupSignal], step: int) -> None:
    wrong = sorted(
        name
        for name, signal in signals.items()
        if not (math.isfinite(signal.gradient) and math.isfinite(signal.update))
    )
    if wrong:
        raise FloatingPointError(
            f"GovernedTraining: expected finite gradients, got others at step {step} in {wrong}: "
            "the weights are lost. Resume from the last checkpoint with a lower learning rate, or "
            "put a ContainmentCallback before this one, which drops such gradients"
        )
