"""What the sparse operator refuses, before anything is computed. Reads shapes and dtypes only."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .budget import KeyBudget
from .scores import Gravity, Score, is_score

IMPLEMENTATIONS = ("auto", "reference", "masked", "gathered", "routed", "flex", "triton", "fused")
METRICS = ("dot", "distance")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, dropout_p: float, impl: str
) -> None:
    if not is_score(score):
        _refuse("score", "a DotProduct or a Gravity", type(score).__name__)
    _expect(impl in IMPLEMENTATIONS, "impl", f"one of {list(IMPLEMENTATIONS)}", impl)
    _expect(0.0 <= dropout_p < 1.0, "dropout_p", "a number in [0, 1)", dropout_p)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _expect_heads(name, tensor)
    for name, tensor in (("k", k), ("v", v)):
        _expect(tensor.dtype == q.dtype, name, f"the dtype of q, {q.dtype}", tensor.dtype)
        _expect(tensor.device == q.device, name, f"the device of q, {q.device}", tensor.device)
    _check_pair("k", q, k)
    fits = v.shape[:3] == k.shape[:3]
    _expect(fits, "v", f"{list(k.shape[:3])} and a width", tuple(v.shape))
    if isinstance(score, Gravity):
        heads = q.shape[1]
        _expect(score.mass.shape == (heads,), "score.mass", f"[{heads}]", tuple(score.mass.shape))
        radius = score.key_radius_sq
        fits = radius is None or radius.shape == k.shape[1:2]
        _expect(fits, "score.key_radius_sq", f"[{k.shape[1]}]", radius if fits else radius.shape)


def check_selection(
    screen_q: Tensor,
    screen_k: Tensor,
    budget: KeyBudget,
    metric: str,
    mask: Tensor | None,
    positions: Tensor | None,
    origin: Tensor | None,
) -> None:
    _expect(isinstance(budget, KeyBudget), "budget", "a KeyBudget", type(budget).__name__)
    _expect(metric in METRICS, "metric", f"one of {list(METRICS)}", metric)
    for name, tensor in (("screen_q", screen_q), ("screen_k", screen_k)):
        _expect_heads(name, tensor)
    _check_pair("screen_k", screen_q, screen_k)
    check_visible(screen_q, screen_k.shape[2], mask, positions, origin)


def check_visible(
    q: Tensor, keys: int, mask: Tensor | None, positions: Tensor | None, origin: Tensor | None
) -> None:
    batch, _, queries, _ = q.shape
    if mask is not None:
        full = (batch, 1, queries, keys)
        tail = (batch, keys) if mask.dim() == 2 else full[4 - mask.dim() :]
        fits = 2 <= mask.dim() <= 4
        fits = fits and all(m in (1, f) for m, f in zip(mask.shape, tail, strict=True))
        expected = f"broadcastable to {list(full)}, or key padding [{batch}, {keys}]"
        _expect(fits, "mask", expected, tuple(mask.shape))
        kinds = mask.dtype == torch.bool or mask.is_floating_point() or mask.dim() == 2
        _expect(kinds, "mask", "bool (True = attend) or float (added)", mask.dtype)
    if positions is not None:
        shape = tuple(positions.shape)
        fits = shape in ((queries,), (1, queries), (batch, queries))
        expected = f"[{queries}] or [{batch}, {queries}], the key of each query"
        _expect(fits and not positions.is_floating_point(), "positions", expected, shape)
    if origin is not None:
        fits = tuple(origin.shape) in ((1,), (batch,)) and not origin.is_floating_point()
        _expect(fits, "origin", f"[1] or [{batch}], the first key of each row", origin.shape)


def _check_pair(name: str, q: Tensor, k: Tensor) -> None:
    batch, heads, _, width = q.shape
    fits = k.shape[0] == batch and k.shape[3] == width and heads % max(k.shape[1], 1) == 0
    _expect(fits, name, f"[{batch}, a divisor of {heads}, Tk, {width}]", tuple(k.shape))


def _expect_heads(name: str, tensor: Tensor) -> None:
    _expect(tensor.dim() == 4, name, "4 dimensions [B, heads, T, width]", tuple(tensor.shape))
    _expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        _refuse(name, expected, got)


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"sparse_attention: {name}: expected {expected}, got {got}")
