"""One call of attention: what it is given, and how it looks at every key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.reference import gravity_attention_reference, split_mask
from ...ops.sparse import DotProduct, Gravity, dense_attention


class Call(NamedTuple):
    """`queries` `[B, H, Tq, h]`, `keys` and `values` `[B, G, Tk, h]`; `mask`, `slots` and `origin`
    as in `Tokens`; `dropout`: of weights; `eager`: step by step, and the weights are given."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    slots: Tensor | None
    origin: Tensor | None
    score: DotProduct | Gravity
    dropout: float
    eager: bool


class Attended(NamedTuple):
    """`output` `[B, H, Tq, h]`; `weights` `[B, H, Tq, Tk]` of an eager call."""

    output: Tensor
    weights: Tensor | None = None


def attend(call: Call) -> Attended:
    """To every key that the mask shows."""
    if call.eager:
        return eager_attention(call)
    seen = {"mask": call.mask, "positions": call.slots}
    how = {"score": call.score, "dropout_p": call.dropout}
    return Attended(dense_attention(call.queries, call.keys, call.values, **how, **seen))


def eager_attention(call: Call, chosen: Tensor | None = None) -> Attended:
    """Step by step, in float32 inside; rows that see nothing are 0.

    chosen: bool `[B, G, Tq, Tk]`, the keys that a query looks at; None: all.
    """
    q, k, v, score = call.queries, call.keys, call.values, call.score
    mask = seen_by(call)
    if chosen is not None:
        mask = _within(mask, chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1))
    if isinstance(score, Gravity):
        options = {"eps": score.softening, "law": score.law, "dropout_p": call.dropout}
        result = gravity_attention_reference(q, k, v, score.mass, mask=mask, **options)
        return Attended(result.output, result.weights)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen, bias = split_mask(mask)
    scores = (q.float() @ k.float().transpose(-2, -1)) * score.scaling
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = (scores.softmax(-1) * seen).to(v.dtype)
    return Attended(F.dropout(weights, call.dropout) @ v, weights)


def seen_by(call: Call) -> Tensor:
    """Who sees whom, causality included: broadcastable to `[B, 1, Tq, Tk]`, bool or additive."""
    queries, keys = call.queries.shape[2], call.keys.shape[2]
    key = torch.arange(keys, device=call.queries.device)
    own = key[keys - queries :] if call.slots is None else call.slots
    causal = (key <= own[:, None])[None, None]
    mask = call.mask
    if mask is None:
        return causal
    return _within(mask[:, None, None] if mask.dim() == 2 else mask, causal)


def _within(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask with only what is in `seen`, too."""
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
