"""Attention transfer: the host teaches its own gravity, with no second copy in memory.

The teacher is the student's weights under dot product (LoRA off), so it costs a forward pass and no
memory for weights. Two stages, as in lolcats (arXiv 2410.10254): first masses and softenings alone,
then LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..integration.hosts import gravity_modules
from .optim import GravityTrainer
from .teaching import TransferResult, host_dropout_off, refuse_adapters, transfer_losses

__all__ = ["TransferSettings", "TransferTrainer", "train_only_gravity", "transfer_losses"]

MODES = ("layerwise", "end_to_end")
_TERMS = ("outputs", "weights", "states", "logits", "loss")
# In layerwise mode the host's activations flow on: what comes out of the model is the host's.
_END_TERMS = ("states", "logits", "loss")


@dataclass(frozen=True)
class TransferSettings:
    """What gravity learns from its host. Each of the five numbers weighs one term; 0 leaves it out.

    Args:
        mode: `"layerwise"`: one forward pass; every attention module computes both laws on the
            same q, k, v, and the host's output flows on. Only masses and softenings learn; no
            dropout. `"end_to_end"`: the host runs first (evaluation mode, adapters off), then
            the student in the model's own mode; gravity's output flows on.
        outputs: relative squared error of the attention outputs, before the output projection,
            mean over layers.
        weights: KL of the attention weights, nats, mean over layers. Costs `Tq * Tk` memory for one
            layer at a time.
        logits: KL of the predictions at `temperature`, where labels ask for one (else wherever
            there is no padding); end to end only.
        loss: the host's own loss on the labels; end to end only.
        temperature: of the predictions that `logits` compares.
        states: relative squared error of the final hidden states, which is what an encoder without
            a head hands out; end to end only.

    Raises:
        ValueError: a value outside its range, no teacher's term at all, or one that the mode cannot
            have.
    """

    mode: str = "end_to_end"
    outputs: float = 1.0
    weights: float = 0.0
    logits: float = 0.0
    loss: float = 0.0
    temperature: float = 1.0
    states: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(_message("mode", f"one of {list(MODES)}", self.mode))
        for name in _TERMS:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(_message(name, "a finite number >= 0", value))
        if not math.isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(_message("temperature", "a finite number > 0", self.temperature))
        if not any(getattr(self, name) for name in _TERMS if name != "loss"):
            raise ValueError(
                _message("outputs", "a term from the teacher > 0 (or weights, logits, states)", 0)
                + "; to train on labels alone use GravityTrainer"
            )
        for name in _END_TERMS:
            if self.mode == "layerwise" and getattr(self, name):
                raise ValueError(
                    _message(name, "0 in mode 'layerwise'", getattr(self, name))
                    + "; the host's own activations flow on, so this term would teach nothing. "
                    "Use mode='end_to_end'"
                )


@contextmanager
def train_only_gravity(model: nn.Module, *, softenings: bool = True) -> Iterator[None]:
    """Everything frozen except the masses and softenings in force; afterwards every `requires_grad`
    is what it was. Works with and without LoRA.

    Args:
        model: patched.
        softenings: False freezes these, too: the model stays as gravitational as it is.

    Raises:
        RuntimeError: the model is not patched.
    """
    modules = gravity_modules(model)
    if not modules:
        raise RuntimeError(
            f"train_only_gravity: expected a patched model, got {type(model).__name__}. "
            "Call patch_with_gravity(model) first"
        )
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    learning = {
        parameter
        for module in modules.values()
        for name, parameter in module.named_parameters()
        if softenings or name != "softening_log"
    }
    try:
        for parameter in before:
            parameter.requires_grad = parameter in learning
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad = flag


class TransferTrainer(GravityTrainer):
    """`GravityTrainer` with the transfer loss. Logs each term as `transfer_<term>`; evaluation
    computes the same loss and terms, with or without labels, and no metrics of predictions.

    The loss is a mean over the sequences of a batch, so gradient accumulation and several processes
    average it rightly; the host's own loss (`loss > 0`) is averaged over micro-batches, too.
    While `train` runs the host's dropouts are off (LoRA's stays on), and in layerwise mode
    everything but gravity is frozen. Softenings that are frozen beforehand stay so in both modes.

    Args:
        transfer: mode and terms.

    Raises:
        RuntimeError: from `train`, layerwise with LoRA, or end to end with trainable weights that
            the teacher shares and that would move it.
    """

    def __init__(self, *args: Any, transfer: TransferSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"TransferTrainer: expected one process per GPU, got {self.args.n_gpu} GPUs in "
                "this one. Start it with `accelerate launch` or `torchrun`, or show it one GPU"
            )
        self.transfer = transfer
        # Our loss is a mean over the micro-batch: Trainer is to divide it by their number.
        self.model_accepts_loss_kwargs = False
        self._training_meter, self._evaluation_meter = _Meter(), _Meter()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.transfer.mode == "end_to_end":
            _refuse_moving_teacher(self.model)
            with host_dropout_off(self.model):
                return super().train(*args, **kwargs)
        refuse_adapters(self.model)
        softenings = any(
            p.requires_grad for n, p in self.model.named_parameters() if n.endswith("softening_log")
        )
        with train_only_gravity(self.model, softenings=softenings):
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result = transfer_losses(self.model, inputs, self.transfer, wrapped=model)
        if torch.is_grad_enabled():
            self._training_meter.add(result, 1)
        return (result.total, result.outputs) if return_outputs else result.total

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            result = transfer_losses(self.model, inputs, self.transfer, wrapped=model)
        size = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
        self._evaluation_meter.add(result, size)
        return result.total.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluation_meter.drain(self.accelerator)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self._evaluation_meter.drain(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_transfer_{name}"] = value
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, value in self._training_meter.drain(self.accelerator).items():
                logs[f"transfer_{name}"] = value
        super().log(logs, *args, **kwargs)


class _Meter:
    """Running means of the terms of the loss, over all processes once drained."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, result: TransferResult, weight: int) -> None:
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value.detach()
        self.weight += weight

    def drain(self, accelerator: Any) -> dict[str, float]:
        means = {}
        for name, value in self.sums.items():
            both = torch.stack([value, torch.full_like(value, self.weight)])
            total, weight = accelerator.gather(both[None]).sum(0).tolist()
            means[name] = total / weight
        self.sums, self.weight = {}, 0
        return means


def _refuse_moving_teacher(model: nn.Module) -> None:
    own = {p for module in gravity_modules(model).values() for p in module.parameters()}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for layer in module.adapter_layer_names:
                own.update(_parameters_of(getattr(module, layer, None)))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own.update(set(module.parameters()) - set(module.original_module.parameters()))
    moving = [n for n, p in model.named_parameters() if p.requires_grad and p not in own]
    if moving:
        raise RuntimeError(
            f"end_to_end transfer: expected only gravity and adapters to be trainable, "
            f"{len(moving)} other parameters are, such as {moving[0]}: the teacher shares them and "
            "would move. Put LoRA on the model with gravity_lora(model), or train inside "
            "`with train_only_gravity(model):`"
        )


def _parameters_of(layer: Any) -> set[nn.Parameter]:
    return set(layer.parameters()) if isinstance(layer, (nn.Module, nn.ParameterDict)) else set()


def _message(field: str, expected: str, got: object) -> str:
    return f"TransferSettings.{field}: expected {expected}, got {got!r}"
