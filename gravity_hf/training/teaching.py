"""Teacher and student in one model: the same weights under dot product and under gravity.

Observers stand in the attention modules during a forward pass: they choose which law flows on and
keep what both laws put out. They are gone when the pass is over, also when it fails, so that
checkpointed layers are recomputed as plain gravity: the losses are made outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..integration.attention import AttentionCall
from ..layers.modes import in_evaluation
from ..layers.parameters import GravityParameters
from .transfer_batches import (
    Inputs,
    asked_positions,
    end_tensors,
    forward_arguments,
    last_tensor,
    real_rows,
)
from .transfer_terms import attention_divergence, logits_divergence, relative_squared_error

if TYPE_CHECKING:
    from .transfer import TransferSettings


# Where transformers' modules keep dropout probabilities: `p` of nn.Dropout, plain floats elsewhere.
_DROPOUT_NAMES = (
    "p",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "drop_prob",
    "layerdrop",
)


class TransferResult(NamedTuple):
    """`total` is what trains; `losses` the terms before their coefficients; `outputs` the model's:
    the student's end to end, the host's in layerwise mode."""

    total: Tensor
    losses: dict[str, Tensor]
    outputs: Any


class _Seen(NamedTuple):
    """What one attention call put out, `[B, Tq, H, Dv]`; the call itself where weights count."""

    output: Tensor
    call: AttentionCall | None


class _Pair(NamedTuple):
    student: _Seen
    teacher: _Seen
    rows: Tensor | None


class _Watcher:
    """Observer of one attention module through one forward pass, teacher, student or both."""

    def __init__(self, keeps_calls: bool) -> None:
        self.keeps_calls = keeps_calls
        self.teacher: list[_Seen] = []
        self.student: list[_Seen] = []

    def _seen(self, output: Tensor, call: AttentionCall) -> _Seen:
        return _Seen(output, call if self.keeps_calls else None)


class _Teacher(_Watcher):
    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = call.dot_product()
        self.teacher.append(self._seen(output, call))
        return output, weights


class _Student(_Watcher):
    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = call.gravity()
        self.student.append(self._seen(output, call))
        return output, weights


class _Both(_Watcher):
    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        # Detached: each layer learns from what the host shows it, and teaches no layer before it.
        call = call.detached()
        with torch.no_grad():
            output, weights = call.dot_product()
        self.teacher.append(self._seen(output, call))
        self.student.append(self._seen(call.gravity()[0], call))
        return output, weights


def transfer_losses(
    model: nn.Module, inputs: Inputs, settings: TransferSettings, *, wrapped: Any = None
) -> TransferResult:
    """The transfer loss of one batch; see `TransferSettings` for its terms.

    Args:
        model: patched, possibly under LoRA.
        inputs: of its forward; `labels` are used by `logits` and `loss`.
        settings: mode and coefficients.
        wrapped: what is called instead of `model`, such as DDP around it.

    Raises:
        RuntimeError: the model is not patched, or layerwise with adapters.
        ValueError: a term that the model or the batch cannot give.
    """
    run = model if wrapped is None else wrapped
    arguments = forward_arguments(model, inputs, settings)
    if settings.mode == "layerwise":
        refuse_adapters(model)
        with in_evaluation(model), _watching(model, _Both, settings) as watchers:
            gather = partial(_gather, model, inputs, settings, watchers, watchers, None)
            return _run(run, model, arguments, gather)
    with in_evaluation(model), without_adapters(model), torch.no_grad():
        with _watching(model, _Teacher, settings) as teachers:
            taught = run(**arguments)
        taught = end_tensors(taught, settings)
    with _watching(model, _Student, settings) as students:
        gather = partial(_gather, model, inputs, settings, students, teachers, taught)
        return _run(run, model, arguments, gather)


def refuse_adapters(model: nn.Module) -> None:
    """Raise RuntimeError if `model` has adapters: its host would not be what flows on."""
    found = next((name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None)
    if found is not None:
        raise RuntimeError(
            f"layerwise transfer trains masses and softenings only, expected a model without "
            f"adapters, got one at {found}. Do it before LoRA, or use "
            "TransferSettings(mode='end_to_end'), whose teacher runs with the adapters off"
        )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model under the adapters, as it was trained by its makers. Unlike peft's own switch this
    leaves every `requires_grad` as it was, frozen adapters included."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    switched = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not module.disable_adapters
    ]
    try:
        for module in switched:
            module.enable_adapters(False)
        yield
    finally:
        for module in switched:
            module.enable_adapters(True)
        for parameter, flag in trains.items():
            parameter.requires_grad = flag


@contextmanager
def host_dropout_off(model: nn.Module) -> Iterator[None]:
    """Every dropout of the host at 0: its noise would drown what is to be learned (dozens of times
    the loss, on a tiny BERT at 0.1). The dropout of LoRA stays. Modes are left alone, because
    layers that are checkpointed must see the same dropouts when they run again."""
    adapters = {
        inner
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names + module.other_param_names
        if isinstance(layer := getattr(module, name, None), nn.Module)
        for inner in layer.modules()
    }
    before = [
        (module, name, value)
        for module in model.modules()
        if module not in adapters
        for name in _DROPOUT_NAMES
        if isinstance(value := getattr(module, name, None), float)
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _run(
    run: Callable[..., Any], model: nn.Module, arguments: Inputs, gather: Callable[[Any], Any]
) -> TransferResult:
    # A hook, because DDP must find the loss in what the forward pass returns; a plain dict, because
    # model outputs cannot be rebuilt with a field of ours in them.
    hook = model.register_forward_hook(lambda module, args, output: gather(output)._asdict())
    try:
        return TransferResult(**run(**arguments))
    finally:
        hook.remove()


def _gather(
    model: nn.Module,
    inputs: Inputs,
    settings: TransferSettings,
    students: Mapping[str, _Watcher],
    teachers: Mapping[str, _Watcher],
    taught: dict[str, Tensor] | None,
    outputs: Any,
) -> TransferResult:
    pairs = _pairs(model, inputs, students, teachers)
    losses: dict[str, Tensor] = {}
    if settings.outputs:
        terms = [relative_squared_error(p.student.output, p.teacher.output, p.rows) for p in pairs]
        losses["outputs"] = torch.stack(terms).mean()
    if settings.weights:
        losses["weights"] = torch.stack([_weights_term(pair) for pair in pairs]).mean()
    if taught is not None:
        told = end_tensors(outputs, settings)
        decoded = real_rows(model, inputs, "decoder")
        if settings.states:
            losses["states"] = relative_squared_error(told["states"], taught["states"], decoded)
        if settings.logits:
            where = asked_positions(model, inputs, told["logits"], decoded)
            losses["logits"] = logits_divergence(
                told["logits"], taught["logits"], where, settings.temperature
            )
        if settings.loss:
            losses["loss"] = outputs["loss"]
    total = sum(getattr(settings, name) * value for name, value in losses.items())
    if taught is not None and torch.is_grad_enabled():
        total = _Tied.apply(total, last_tensor(outputs))
    return TransferResult(total, {k: v.detach() for k, v in losses.items()}, outputs)  # type: ignore[arg-type]


class _Tied(torch.autograd.Function):
    """`loss`, with a gradient of zero for `end`.

    The last layers' projections may feed no term of the loss; without a gradient DDP and FSDP would
    wait for them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end.new_zeros(()).expand(end.shape))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, ctx.saved_tensors[0]


def _weights_term(pair: _Pair) -> Tensor:
    # Recomputed in the backward pass: the `[B, H, Tq, Tk]` of one layer at a time, not of all.
    term = partial(attention_divergence, pair.student.call, pair.teacher.call, pair.rows)
    return checkpoint(term, use_reentrant=False)  # type: ignore[no-any-return]


def _pairs(
    model: nn.Module,
    inputs: Inputs,
    students: Mapping[str, _Watcher],
    teachers: Mapping[str, _Watcher],
) -> list[_Pair]:
    pairs = []
    for name, watcher in students.items():
        seen, taught = watcher.student, teachers[name].teacher
        if len(seen) != len(taught):
            raise ValueError(
                f"transfer: {name}: expected as many attention calls by the student as by the "
                f"teacher, got {len(seen)} and {len(taught)}. Set the host's layer dropout to 0"
            )
        for student, teacher in zip(seen, taught, strict=True):
            rows = real_rows(model, inputs, name, student.output.shape[:2])
            pairs.append(_Pair(student, teacher, rows))
    if not pairs:
        raise ValueError(
            "transfer: expected a batch that reaches a converted layer, it reached none"
        )
    return pairs


@contextmanager
def _watching(
    model: nn.Module, kind: type[_Watcher], settings: TransferSettings
) -> Iterator[dict[str, Any]]:
    # Every copy that peft keeps is watched: which one is in force changes with the adapters.
    copies = {
        name: [m for m in child.modules() if isinstance(m, GravityParameters)]
        for name, module in model.named_modules()
        if (child := module._modules.get("gravity")) is not None
    }
    copies = {name: found for name, found in copies.items() if found}
    if not copies:
        raise RuntimeError(
            f"transfer: expected a patched model, got {type(model).__name__}. The order is: load, "
            "patch_with_gravity, calibrate, transfer"
        )
    watchers = {name: kind(keeps_calls=settings.weights > 0) for name in copies}
    try:
        for name, found in copies.items():
            for module in found:
                module.observer = watchers[name]
        yield watchers
    finally:
        for found in copies.values():
            for module in found:
                module.observer = None
