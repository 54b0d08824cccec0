"""A training loop without a framework: containment, curvature, the Bekenstein term, checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..runtime.mirror import MirrorLayer
from .bekenstein import ChargedState, charged_states, state_arguments, states_penalty
from .containment_protocol import ContainmentConfig, ContainmentProtocol
from .curvature import MetaCurvatureScheduler
from .loop_batches import main_tensor, moved, pass_over
from .loop_checkpoint import (
    checkpoint_name,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_random_states,
)
from .loop_config import TrainingConfig
from .measures import evaluating
from .watching import ForceWatch

if TYPE_CHECKING:
    from ..runtime.ledger import Ledger

__all__ = ["TrainingConfig", "TrainingLoop"]

Batch = tuple[Any, Any]


class TrainingLoop:
    """Trains `model` on `(inputs, targets)` batches.

    The published loop, but for what was wrong with it: checkpoints are written and resumed from,
    the model is moved to `device`, no batch is drawn that is not used, gradients left over at the
    end of `fit` are stepped (as a mean over the batches that there were), an evaluation leaves the
    model as it was unless `use_meta_curvature` says otherwise, diagnostics are the true forces, an
    empty ledger is written to, and the Bekenstein term acts on hidden states, at every step, with
    a floor.

    Args:
        model: called with `inputs`, or `**inputs` for a mapping. May give a tensor, a
            transformers output (its logits count, else the last hidden state), or a tuple of a
            tensor and diagnostics.
        optimizer: over the model's parameters.
        loss_fn: `(output, targets)` to a scalar.
        config: settings.
        containment_config: limits, and the weight of the Bekenstein term.
        ledger: where to log.
        scheduler: stepped with the optimiser.
        device: where model and batches go; None leaves them where they are.
        mirror: what measures the forces; None makes one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Tensor, Any], Tensor],
        config: TrainingConfig | None = None,
        containment_config: ContainmentConfig | None = None,
        ledger: Ledger | None = None,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        *,
        mirror: MirrorLayer | None = None,
    ) -> None:
        self.config = TrainingConfig() if config is None else config
        self.model = model if device is None else model.to(device)
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.ledger = ledger
        self.scheduler = scheduler
        self.device = device
        limits = ContainmentConfig() if containment_config is None else containment_config
        self.containment = ContainmentProtocol(limits, model, ledger)
        self.meta_curvature = self._meta_curvature() if self.config.use_meta_curvature else None
        # Batches that were trained on, and the loss of each.
        self.step = 0
        self.losses: list[float] = []
        if mirror is None:
            mirror = MirrorLayer(ledger, max_force_threshold=limits.max_attention_force)
        self._watch = ForceWatch(mirror)
        self._accepts = set(inspect.signature(model.forward).parameters)
        # Since the last optimiser step: losses, and the newest diagnostics.
        self._window: list[Tensor] = []
        self._diagnostics: Any = None
        # Of this `fit`: batches trained on, batches drawn from a validation iterator.
        self._fitted = 0
        self._val_drawn = 0

    @property
    def proposals(self) -> list[dict[str, Any]]:
        """What was proposed to grow; a copy."""
        return list(self.containment.proposals)

    def train_step(self, batch: Batch, return_diagnostics: bool = False) -> dict[str, Any]:
        """Forward, loss and backward; the optimiser's step where a window of batches is full.

        Args:
            batch: `(inputs, targets)`.
            return_diagnostics: measure the forces, for containment to see.

        Returns:
            `loss` (with the Bekenstein term), `stopped`, `stability`; at the end of a window also
            `grad_norm_clipped`, `attention_damped`, `proposal`.
        """
        inputs, targets = self._placed(batch)
        self.model.train()
        config = self.config
        charged = config.use_bekenstein_penalty and self.step % config.bekenstein_every == 0
        output, states = self._forward(inputs, charged, return_diagnostics)
        loss = self.loss_fn(output, targets)
        if charged:
            weight = self.containment.config.bekenstein_lambda
            loss = loss + states_penalty(states, weight, config.bekenstein_floor)
        (loss / config.grad_accumulation_steps).backward()
        self._window.append(loss.detach())
        value = loss.item()
        self.step += 1
        self.losses.append(value)
        result: dict[str, Any] = {"loss": value}
        if len(self._window) == config.grad_accumulation_steps:
            result |= self._update()
        else:
            result |= {"stopped": False, "stability": self.containment.stability}
        if config.log_every and self.step % config.log_every == 0:
            line = {"step": self.step, "loss": value, "stability": result["stability"]}
            self._log("train_step", line)
        return result

    def eval_step(self, batch: Batch) -> float:
        """The loss of one batch, in evaluation mode; moves curvatures where that is on."""
        return self._evaluated([batch])

    def fit(
        self,
        train_iter: Iterable[Batch],
        val_iter: Iterable[Batch] | None = None,
        on_proposal: Callable[[dict[str, Any]], Any] | None = None,
        *,
        resume: bool | str | Path = False,
    ) -> dict[str, Any]:
        """Train until `max_steps`, the end of the batches or a stop by containment.

        Args:
            train_iter: batches, gone through once.
            val_iter: an iterator gives one batch to each evaluation, until it is empty; anything
                else that can be iterated (a list, a DataLoader) gives all of its batches.
            on_proposal: called with each proposal to grow.
            resume: continue from the newest checkpoint in `checkpoint_dir`, or from this one. The
                model, optimiser and iterators are made as for the first run, seeds included: the
                batches that were trained on are passed over, then the generators' states are set.
                An iterator that shuffles needs a generator of its own, such as `DataLoader(...,
                generator=torch.Generator().manual_seed(0))`: with the global one a resumed run
                gets other batches. A curvature that had grown is restored.

        Returns:
            `steps` (of the whole run), `final_loss` (infinity if there was none), `proposals`.

        Raises:
            FileNotFoundError: nothing to resume from.
            ValueError, RuntimeError: a checkpoint of another model or other parts.
        """
        train, val = iter(train_iter), val_iter
        self._fitted, self._val_drawn = 0, 0
        if resume:
            self._resume(resume, train, val)
        else:
            self._drop_window()
        on_proposal = on_proposal or (lambda proposal: None)
        bar = tqdm(
            total=self.config.max_steps,
            initial=self._fitted,
            desc="training",
            unit="step",
            disable=None if self.config.progress is None else not self.config.progress,
        )
        with bar:
            while self._fitted < self.config.max_steps:
                batch = next(train, None)
                if batch is None:
                    break
                if not self._fit_step(batch, val, on_proposal):
                    break
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", refresh=False)
                bar.update()
        if self._window:
            self._step_tail(on_proposal)
        return {
            "steps": self.step,
            "final_loss": self.losses[-1] if self.losses else math.inf,
            "proposals": self.proposals,
        }

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint, which `fit(resume=folder)` continues from.

        Raises:
            RuntimeError: gradients of an unfinished window would be lost.
        """
        if self._window:
            raise RuntimeError(
                f"TrainingLoop.save: expected a finished window of "
                f"{self.config.grad_accumulation_steps} batches, got {len(self._window)}. Save "
                "after the step that completes it"
            )
        if self.ledger is not None:
            self.ledger.flush()
        head = getattr(self.ledger, "head", None)
        state = {
            "step": self.step,
            "fitted": self._fitted,
            "val_drawn": self._val_drawn,
            "losses": self.losses,
            "containment": self.containment.state_dict(),
            "curvature_level": self.meta_curvature.level if self.meta_curvature else None,
            "ledger": None if head is None else head._asdict(),
            "config": asdict(self.config),
        }
        return save_checkpoint(Path(folder), self.model, self._parts(), state)

    def _fit_step(
        self, batch: Batch, val: Iterable[Batch] | None, on_proposal: Callable[[dict], Any]
    ) -> bool:
        """One step of `fit`, with all that is due after it. Whether training goes on."""
        index, config = self._fitted, self.config
        watches = config.diagnostics_every > 0 and index % config.diagnostics_every == 0
        result = self.train_step(batch, return_diagnostics=watches)
        self._fitted += 1
        if result["stopped"]:
            self._log("training_stopped", {"step": self.step, "loss": result["loss"]})
            return False
        if result.get("proposal"):
            on_proposal(result["proposal"])
        if val is not None and config.eval_every and index % config.eval_every == 0:
            self._evaluate(val)
        every, window = config.checkpoint_every, config.grad_accumulation_steps
        # A checkpoint waits for the end of its window.
        if every and not self._window and self.step % every < min(window, every):
            self.save(Path(config.checkpoint_dir, checkpoint_name(self.step)))
        return True

    def _evaluate(self, val: Iterable[Batch]) -> None:
        if isinstance(val, Iterator):
            batch = next(val, None)
            batches = [] if batch is None else [batch]
            self._val_drawn += len(batches)
        else:
            batches = list(val)
        if batches:
            self._log("eval_step", {"step": self.step, "val_loss": self._evaluated(batches)})

    def _evaluated(self, batches: list[Batch]) -> float:
        with evaluating(self.model):
            losses = []
            for batch in batches:
                inputs, targets = self._placed(batch)
                output, _ = self._forward(inputs, False, False)
                losses.append(self.loss_fn(output, targets).item())
        loss = sum(losses) / len(losses)
        updates = self.meta_curvature.step(loss) if self.meta_curvature is not None else {}
        if updates:
            self._log("meta_curvature_update", {"updates": updates})
        return loss

    def _forward(
        self, inputs: Any, charged: bool, watched: bool
    ) -> tuple[Tensor, list[ChargedState]]:
        """The output, and the states that the Bekenstein term is charged on."""
        asked = state_arguments(self.model) if charged else {}
        told = watched and "return_diagnostics" in self._accepts
        if told:
            asked["return_diagnostics"] = True
        elif watched:
            self._watch.arm(self.model)
        given = (
            self.model(**inputs, **asked)
            if isinstance(inputs, Mapping)
            else self.model(inputs, **asked)
        )
        if watched:
            self._diagnostics = given[1] if told else self._watch.collect()
        output = main_tensor(given)
        return output, charged_states(given, inputs) or [ChargedState(output, None)]

    def _update(self) -> dict[str, Any]:
        loss = torch.stack(self._window).mean()
        summary = self.containment.step(loss, self._diagnostics)
        if not summary["stopped"]:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        self._drop_window()
        return {
            "grad_norm_clipped": summary["clipped"],
            "attention_damped": summary["damped"],
            "stopped": summary["stopped"],
            "stability": summary["stability"],
            "proposal": summary["proposal"],
        }

    def _step_tail(self, on_proposal: Callable[[dict], Any]) -> None:
        """The optimiser's step of a window that the batches did not fill."""
        missing = self.config.grad_accumulation_steps / len(self._window)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(missing)
        result = self._update()
        if result["stopped"]:
            self._log("training_stopped", {"step": self.step, "loss": self.losses[-1]})
        elif result["proposal"]:
            on_proposal(result["proposal"])

    def _drop_window(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._window = []
        self._diagnostics = None

    def _resume(
        self, source: bool | str | Path, train: Iterator[Batch], val: Iterable[Batch] | None
    ) -> None:
        if isinstance(source, bool):
            folder = latest_checkpoint(Path(self.config.checkpoint_dir))
        else:
            folder = Path(source)
        state, generators = load_checkpoint(folder, self.model, self._parts())
        self._drop_window()
        self.step, self.losses = state["step"], list(state["losses"])
        self._fitted, self._val_drawn = state["fitted"], state["val_drawn"]
        self.containment.load_state_dict(state["containment"])
        if self.meta_curvature is not None:
            self.meta_curvature.level = state["curvature_level"]
        pass_over(train, self._fitted)
        if isinstance(val, Iterator):
            pass_over(val, self._val_drawn)
        set_random_states(generators)
        # A ledger is never cut: its lines after this position belong to the run that ended.
        self._log("training_resumed", {"step": self.step, "ledger": state["ledger"]})

    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler}

    def _meta_curvature(self) -> MetaCurvatureScheduler:
        return MetaCurvatureScheduler(
            self.model,
            self.config.meta_curvature_lr,
            smoothing=self.config.meta_curvature_smoothing,
        )

    def _placed(self, batch: Any) -> Any:
        return batch if self.device is None else moved(batch, self.device)

    def _log(self, event: str, payload: dict[str, Any]) -> None:
        if self.ledger is not None:
            self.ledger.log(event, payload)
