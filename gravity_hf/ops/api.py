"""`gravity_attention`: checks, then exactly one implementation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..config import IMPLEMENTATIONS, LAWS
from .chunked import gravity_attention_chunked
from .flex import gravity_attention_flex
from .reference import gravity_attention_reference


def gravity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    *,
    eps: float | Tensor,
    law: str = "force",
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention in which a token attends to what is near: `softmax_j(score_ij) v_j`.

    `score_ij = M_h^2 a_i b_j / (d_ij^2 + eps_h)` (law `"force"`) or
    `score_ij = -M_h^2 ln(d_ij^2 + eps_h) + ln b_j` (law `"power"`, so that weights are
    `b_j (d_ij^2 + eps_h)^(-M_h^2)`), with `d_ij^2 = max(|q_i|^2 + kappa_j - 2 q_i.k_j, 0)`.

    Args:
        q: queries `[B, H, Tq, D]`.
        k: keys `[B, Hkv, Tk, D]`; `H` is a multiple of `Hkv`, consecutive query heads share one.
        v: values `[B, Hkv, Tk, Dv]`.
        mass: `M` `[H]`, not negative.
        eps: softening in units of squared distance, a number or `[H]`; positive.
        law: `"force"` or `"power"`.
        key_radius_sq: `R^2` `[Hkv]`. Given: lifted keys, `kappa_j = R^2`. Absent: `kappa_j =
            |k_j|^2`.
        query_mass: `a` `[B, H, Tq]`, force law only (under the power law it would cancel).
        key_mass: `b` `[B, H, Tk]`; positive under the power law.
        mask: broadcastable to `[B, H, Tq, Tk]`. Bool: True = attend. Float: added to the score;
            entries at or below half of the dtype's lowest value are hidden.
        causal: row i sees keys `j <= i + Tk - Tq`; combines with `mask`.
        dropout_p: probability of dropping a weight, applied whenever it is not 0.
        impl: `"reference"`, `"chunked"`, `"flex"`, or `"auto"`, which chooses by device and by what
            the call needs. A named implementation that cannot serve the call is an error; it never
            turns into another one.

    Returns:
        `[B, H, Tq, Dv]` in the dtype of `v`. Arithmetic is float32 (float64 for float64 inputs). A
        row that may attend to no key gives zeros.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
    """
    _check(q, k, v, mass, law, key_radius_sq, query_mass, key_mass, mask, dropout_p, impl)
    if not isinstance(eps, Tensor):
        if not eps > 0:
            raise ValueError(f"gravity_attention: eps must be positive, got {eps!r}")
        eps = torch.full_like(mass, eps)
    elif eps.shape != mass.shape:
        raise ValueError(
            f"gravity_attention: eps must be a number or [H] = {tuple(mass.shape)}, "
            f"got {tuple(eps.shape)}"
        )
    options: dict[str, Any] = {
        "eps": eps,
        "law": law,
        "key_radius_sq": key_radius_sq,
        "query_mass": query_mass,
        "key_mass": key_mass,
        "mask": mask,
        "causal": causal,
        "dropout_p": dropout_p,
    }
    if impl == "auto":
        impl = choose_implementation(q, mask, dropout_p, (k, v, mass, *options.values()))
    if impl == "reference":
        return gravity_attention_reference(q, k, v, mass, **options).output
    if impl == "flex":
        return gravity_attention_flex(q, k, v, mass, **options)
    return gravity_attention_chunked(q, k, v, mass, **options)


def choose_implementation(
    q: Tensor, mask: Tensor | None, dropout_p: float, others: Iterable[object] = ()
) -> str:
    """What `impl="auto"` means for a call: `"flex"` where it is fused, faster and able (CUDA,
    bfloat16 or float16, no gradient, no dropout, no mask tensor), `"chunked"` everywhere else, also
    inside `torch.compile`, where flex would be a compiler in a compiler.

    In float32 flex's products leave the tensor cores and it takes 2.7 times as long as chunked
    (scripts/benchmark/results/h100_fp32.json).
    """
    if torch.compiler.is_compiling() or q.numel() == 0:
        return "chunked"
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cuda" or not half or dropout_p > 0 or mask is not None:
        return "chunked"
    tensors = (x for x in (q, *others) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "chunked"
    return "flex"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    law: str,
    key_radius_sq: Tensor | None,
    query_mass: Tensor | None,
    key_mass: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    impl: str,
) -> None:
    _expect(law in LAWS, "law", f"one of {list(LAWS)}", law)
    _expect(impl in IMPLEMENTATIONS, "impl", f"one of {list(IMPLEMENTATIONS)}", impl)
    _expect(0.0 <= dropout_p < 1.0, "dropout_p", "a number in [0, 1)", dropout_p)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _expect(tensor.dim() == 4, name, "4 dimensions [B, H, T, D]", tuple(tensor.shape))
        _expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype)
        _expect(tensor.dtype == q.dtype, name, f"the dtype of q, {q.dtype}", tensor.dtype)
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    fits = k.shape[0] == batch and k.shape[3] == width and heads % kv_heads == 0
    _expect(fits, "k", f"[{batch}, a divisor of {heads}, Tk, {width}]", tuple(k.shape))
    fits = v.shape[:3] == k.shape[:3]
    _expect(fits, "v", f"[{batch}, {kv_heads}, {keys}, Dv]", tuple(v.shape))
    _expect(mass.shape == (heads,), "mass", f"[{heads}]", tuple(mass.shape))
    if key_radius_sq is not None:
        shape = tuple(key_radius_sq.shape)
        _expect(shape == (kv_heads,), "key_radius_sq", f"[{kv_heads}]", shape)
    if query_mass is not None:
        shape = tuple(query_mass.shape)
        _expect(shape == (batch, heads, queries), "query_mass", "[B, H, Tq]", shape)
        _expect(law == "force", "query_mass", "law='force' (it cancels under 'power')", law)
    if key_mass is not None:
        shape = tuple(key_mass.shape)
        _expect(shape == (batch, heads, keys), "key_mass", "[B, H, Tk]", shape)
    if mask is not None:
        dtype_fits = mask.dtype == torch.bool or mask.is_floating_point()
        _expect(dtype_fits, "mask", "bool (True = attend) or float (added)", mask.dtype)
        full = (batch, heads, queries, keys)
        tail = full[len(full) - mask.dim() :]
        # Written out: `in` does not compare the symbolic lengths of a compiled graph.
        pairs = zip(mask.shape, tail, strict=True)
        fits = mask.dim() <= 4 and all(m == 1 or m == f for m, f in pairs)
        _expect(fits, "mask", f"broadcastable to {full}", tuple(mask.shape))


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"gravity_attention: {name}: expected {expected}, got {got}")
