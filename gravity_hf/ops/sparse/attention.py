"""`sparse_attention`: a choice of keys, then exact attention to them."""

from __future__ import annotations

from torch import Tensor

from ..reference import compute_dtype
from .budget import KeyBudget
from .checks import check_attention, check_selection, check_visible
from .choosing import choose_implementation
from .dense import dense_attention
from .flex import sparse_flex_attention
from .gathered import gathered_attention
from .masked import selection_masked_attention
from .reference import reference_attention
from .routed import plan_of, routed_attention
from .scores import Score
from .selecting import Selection, select_keys
from .triton import fused_refusal, triton_fused_attention, triton_routed_attention


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score,
    budget: KeyBudget,
    screen: tuple[Tensor, Tensor] | None = None,
    means: Tensor | None = None,
    selection: Selection | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    origin: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Causal attention in which each query sees at most `budget.top_k` keys.

    A cheap pass over screening vectors chooses the keys (`select_keys`), an exact one computes the
    softmax over them. Where the budget covers all `Tk` keys it is `dense_attention`, bit for bit.

    Args:
        q: queries `[B, H, Tq, D]`.
        k, v: keys `[B, G, Tk, D]` and values `[B, G, Tk, Dv]`; `H` is a multiple of `G`,
            consecutive query heads share one, and with it a choice of keys.
        score: `DotProduct(scaling)` or `Gravity(mass, softening, ...)`.
        screen: screening queries `[B, H, Tq, ds]` and keys `[B, G, Tk, ds]`; None: q and k.
        means: `block_means` of the screening keys, where a cache keeps them.
        selection: of `select_keys`, in place of choosing here.
        mask: key padding `[B, Tk]` (True or 1: a key), or bool (True: attend) or float (added;
            entries at or below half of the dtype's lowest value hide), broadcastable to
            `[B, 1, Tq, Tk]`. Causality holds whatever it says.
        positions: int `[Tq]` or `[B, Tq]`, the key of each query, where that is not `i + Tk - Tq`:
            a static cache is longer than what is in it.
        origin: see `select_keys`.
        dropout_p: probability of dropping a weight, applied whenever it is not 0.
        impl: `"reference"` (the definition), `"masked"` (dense, the selection as its mask),
            `"gathered"` (each query's keys), `"routed"` (each block's queries), `"flex"`,
            `"triton"` (routed, on a GPU, its gradients too), `"fused"` (a few queries, their
            choice and attention in two kernels, on a GPU), or `"auto"`: `"fused"` on a GPU where
            it serves, else see `choosing.choose_implementation`. `"routed"` gathers where dropout,
            an additive mask or one with holes leaves it no blocks.

    Returns:
        `[B, H, Tq, Dv]` in the dtype of `v`. A query that sees no key gives zeros. Gradients reach
        q, k, v and the tensors of the score, not the screening vectors: `screening_loss` trains
        those.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
    """
    check_attention(q, k, v, score, dropout_p, impl)
    check_visible(q, k.shape[2], mask, positions, origin)
    if selection is None and budget.covers(k.shape[2]):
        return dense_attention(
            q, k, v, score=score, mask=mask, positions=positions, dropout_p=dropout_p
        )
    if impl == "fused" or (impl == "auto" and q.device.type == "cuda"):
        hidden = any(x is not None for x in (mask, positions, origin, selection))
        call = (q, k, v, score, budget, screen or (q, k), means)
        check_selection(*call[5], budget, score.metric, None, None, None)
        refusal = fused_refusal(*call, hidden, dropout_p)
        if refusal is None:
            return triton_fused_attention(*call)
        if impl == "fused":
            raise ValueError(f"sparse_attention: impl='fused': expected {refusal}. Use impl='auto'")
    if selection is None:
        screen_q, screen_k = (q, k) if screen is None else screen
        selection = select_keys(
            screen_q,
            screen_k,
            budget,
            metric=score.metric,
            mask=mask,
            positions=positions,
            origin=origin,
            means=means,
        )
    if impl == "auto":
        impl = choose_implementation(q, k, v, score, selection, dropout_p)
    return _IMPLEMENTATIONS[impl](q, k, v, score, selection, dropout_p)


def _routed(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> Tensor:
    """By blocks where the call has what that needs, and each query by itself otherwise."""
    plan = None
    if dropout_p == 0 and selection.visible.bias is None:
        plan = plan_of(selection, score, compute_dtype(q.dtype))
    if plan is None:
        return gathered_attention(q, k, v, score, selection, dropout_p)
    return routed_attention(q, k, v, score, plan)


_IMPLEMENTATIONS = {
    "reference": reference_attention,
    "masked": selection_masked_attention,
    "gathered": gathered_attention,
    "routed": _routed,
    "flex": sparse_flex_attention,
    "triton": triton_routed_attention,
}
