"""Queries, keys and attention weights of one short input, module by module."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GravityConfig
from ..integration.attention import AttentionCall
from ..integration.hosts import gravity_modules, settings_of
from ..integration.patching import patch_with_gravity, unpatch_gravity
from ..integration.placement import execution_device
from ..training.measures import evaluating

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RecordedAttention:
    """One attention module on the first row of a batch; float32 on the CPU.

    `query` `[H, Tq, D]`, `key` `[H, Tk, D]` (that of its group for every query head), `weights`
    `[H, Tq, Tk]`, `visible` bool of the same shape: which keys a query may attend to.
    `dot_product` is like `weights`, of the host's dot product on the same queries and keys.
    `key_radius_sq` `[H]` where keys are lifted, else None.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    dot_product: Tensor
    visible: Tensor
    key_radius_sq: Tensor | None

    @property
    def received(self) -> Tensor:
        """Attention that each key gets, summed over the queries, `[H, Tk]`."""
        return self.weights.sum(-2)


def record_attention(
    model: nn.Module, inputs: Inputs, only: Collection[str] | None = None
) -> dict[str, RecordedAttention]:
    """What the converted attention modules of a patched model do on `inputs`, by their names.

    Weights are those of `output_attentions=True`; the last call counts where a module is called
    more than once. Changes nothing.

    Args:
        model: patched, wrapped by peft or not.
        inputs: one batch; its first row is recorded.
        only: names of the modules to record; None records all.

    Raises:
        RuntimeError: the model has no gravity.
    """
    return _record(model, inputs, only, is_host=False)


def record_host_attention(
    host: nn.Module, inputs: Inputs, only: Collection[str] | None = None
) -> dict[str, RecordedAttention]:
    """The same of an unpatched model: its own dot product, in `weights` and in `dot_product`.

    It is patched meanwhile, to be looked into by the same names, and unpatched bit for bit.

    Raises:
        TypeError: what `patch_with_gravity` refuses.
        ValueError: the model is patched already.
    """
    if settings_of(host) is not None:
        raise ValueError(
            f"host: expected the unpatched host, got {type(host).__name__}. Load the model that "
            "the gravity model was made from"
        )
    patch_with_gravity(host, GravityConfig())
    try:
        return _record(host, inputs, only, is_host=True)
    finally:
        unpatch_gravity(host)


def first_example(batch: Inputs, tokens: int) -> dict[str, Any]:
    """The first row of a batch; of text only its real tokens, the first `tokens` of them."""
    row = {
        name: value[:1] if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }
    ids = row.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return row
    mask = row.get("attention_mask")
    real = (
        mask[0] if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids[0])
    )
    kept = real.nonzero().flatten()[:tokens]
    return {
        name: value[:, kept] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in row.items()
    }


class _Recorder:
    """The observer of one module, which goes on as it would without."""

    def __init__(self, is_host: bool, keeps: bool) -> None:
        self.is_host, self.keeps = is_host, keeps
        self.seen: RecordedAttention | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if self.keeps:
            self.seen = _recorded(call, self.is_host)
        return call.dot_product() if self.is_host else call.gravity()


def _recorded(call: AttentionCall, is_host: bool) -> RecordedAttention:
    keys, groups = call.key.shape[2], call.query.shape[1] // call.key.shape[1]
    dot_product, visible = _weights(call.dot_product_scores(), keys)
    weights = dot_product if is_host else _weights(call.gravity_scores(), keys)[0]
    radius = call.terms.key_radius_sq
    return RecordedAttention(
        query=call.query[0].detach().float().cpu(),
        key=call.key[0].detach().repeat_interleave(groups, 0).float().cpu(),
        weights=weights,
        dot_product=dot_product,
        visible=visible,
        key_radius_sq=None if radius is None else radius.repeat_interleave(groups).float().cpu(),
    )


def _weights(scores: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """`weights` and `visible` `[H, Tq, Tk]` of the first row. What a sink gets, no key has."""
    scores = scores[0].detach()
    visible = scores > torch.finfo(scores.dtype).min / 2
    # A query that sees nothing attends to nothing.
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    return weights[..., :keys].float().cpu(), visible[..., :keys].cpu()


def _record(
    model: nn.Module, inputs: Inputs, only: Collection[str] | None, is_host: bool
) -> dict[str, RecordedAttention]:
    modules = gravity_modules(model)
    if not modules:
        raise RuntimeError(
            f"record_attention: expected a patched model, got {type(model).__name__} without "
            "gravity. Call patch_with_gravity(model) first"
        )
    recorders = {name: _Recorder(is_host, only is None or name in only) for name in modules}
    device = execution_device(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with _watched(modules, recorders), evaluating(model):
        model(**moved)
    return {name: r.seen for name, r in recorders.items() if r.seen is not None}


@contextmanager
def _watched(modules: Mapping[str, Any], recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    for name, gravity in modules.items():
        gravity.observer = recorders[name]
    try:
        yield
    finally:
        for gravity in modules.values():
            gravity.observer = None
