"""Gravity attention in plain torch with memory linear in length: for CPUs, and for all training.

The numbers are those of `reference.py`. One product gives softened distances:
`[-2q, 1, |q|^2 + eps] . [k, |k|^2, 1] = |q|^2 + |k|^2 - 2 q.k + eps`. The augmentation is ordinary
differentiable torch, so the operator behind it (`blockwise.py`) needs only the gradient of
`softmax(score(q'k'^T)) v`, and q, k and radii get theirs from autograd. So do the terms that are
folded here into fewer ones: `strength` is `+-M^2 a_i`, `offset` is `beta a_i`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blockwise import attention_forward
from .curvature import Curvature
from .cutoff import Cutoff
from .problem import DecodingProblem
from .reference import compute_dtype
from .registry import attention, is_observed
from .shared_op import shared_attention

# Up to this many queries per key head, reading the keys costs more than the scores do, and
# augmenting them (a second copy of the key cache) would double the time of a generated token.
DECODE_QUERIES = 16


def gravity_attention_chunked(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    mass: Tensor,
    *,
    eps: float | Tensor | None,
    law: str = "force",
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
    log_key_mass: Tensor | None = None,
    head_bias: Tensor | None = None,
    repulsive: bool = False,
    cutoff: Cutoff | None = None,
    curvature: Curvature | None = None,
    max_force: float | None = None,
    force_cap: str = "clamp",
    inverse_distance: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_ranges: Tensor | None = None,
    exclude_self: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Same numbers as `gravity_attention_reference`, one block of scores at a time.

    Shapes and meanings as in `gravity_hf.ops.api.gravity_attention`. First derivatives for every
    floating tensor, a float mask and the cutoff's radius included.
    """
    dtype, out_dtype = compute_dtype(v.dtype), v.dtype
    plain = (
        head_bias is None
        and log_key_mass is None
        and cutoff is None
        and softcap is None
        and sinks is None
    )
    plain = plain and key_radius_sq is None and dropout_p == 0
    plain = plain and not (mask is not None and mask.requires_grad)
    if plain and (inverse_distance is not None or _share_distances(q, k, eps, curvature)):
        distance = (q, k, eps, curvature, inverse_distance)
        masses = (mass, query_mass, key_mass, repulsive)
        seen = (mask, key_ranges, causal, window, exclude_self)
        output = _shared(v.to(dtype), law, distance, masses, seen, max_force, force_cap)
        return output.to(out_dtype)
    if eps is not None and not isinstance(eps, Tensor):
        eps = torch.full(mass.shape, eps, dtype=dtype, device=mass.device)
    radius = None if cutoff is None else cutoff.radius
    tensors = (q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, head_bias)
    q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, head_bias, radius, table = (
        None if x is None else x.to(dtype) for x in (*tensors, radius, inverse_distance)
    )
    strength = (-mass.square() if repulsive else mass.square())[None, :, None]
    offset = None if head_bias is None else head_bias[None, :, None]
    if query_mass is not None:
        strength = strength * query_mass
        offset = None if offset is None else offset * query_mass
    key_term = key_mass.log() if key_mass is not None and law == "power" else key_mass
    key_term = key_term if log_key_mass is None else log_key_mass.to(dtype)
    radius_sq = None if radius is None else radius.square()
    # Drawn from torch's own generator: manual_seed and checkpointing's replay reach the dropout.
    seed = torch.randint(2**62, (1,)) if dropout_p > 0 else None
    fade = (None, 1.0) if cutoff is None else (cutoff.kind, cutoff.width)

    table = table[None, None] if table is not None and table.dim() == 2 else table
    bent = (None, 1.0) if curvature is None else (curvature.kappa, curvature.horizon)
    sink = None
    if sinks is not None:
        sink = _sink_score(_query_term(q, k, eps, key_radius_sq), strength, law, sinks.to(dtype))
    floating = (v, strength, eps, offset, key_term, radius_sq, table, sink, mask)
    rules = (law, causal, window, exclude_self, *fade, max_force, dropout_p)
    rules = (*rules, softcap, key_radius_sq is not None, *bent, force_cap == "tanh")
    arguments = (*floating, key_ranges, seed, *rules)
    # A cutoff and a curvature need the distance without eps.
    softening = eps if cutoff is None and curvature is None else None
    if q is None:
        output = attention(None, None, *arguments)
    elif _is_decoding(q, k, *arguments):
        query_term = _query_term(q, k, softening, key_radius_sq)
        if key_radius_sq is None:
            kappa = k.square().sum(-1, keepdim=True)
        else:
            kappa = k.new_zeros(1).expand(*k.shape[:3], 1)
        output = attention_forward(DecodingProblem(q, k, *arguments, query_term, kappa))
    else:
        augmented = augment(q, k, softening, key_radius_sq)
        output = attention(*augmented, *arguments)
    return output.to(out_dtype)


def _share_distances(
    q: Tensor, k: Tensor, eps: float | Tensor | None, curvature: Curvature | None
) -> bool:
    """Whether all heads have the same positions, in the same memory."""
    if isinstance(eps, Tensor):
        return False
    alone = curvature is not None and q.shape[1] == 1
    return alone or (_is_expanded(q, 1) and _is_expanded(k, 1))


def _is_expanded(x: Tensor, dim: int) -> bool:
    # A leaf has a gradient for each entry, whatever memory they share.
    own_gradient = torch.is_grad_enabled() and x.is_leaf and x.requires_grad
    return x.stride(dim) == 0 and not own_gradient


class _Once(torch.autograd.Function):
    """`[b, T, D]` of an expanded `[B, H, T, D]`, b 1 if batch entries share memory, too. Its
    gradient is spread over what shared it, whose sum is what reaches the tensor behind: no memory
    for each of them."""

    @staticmethod
    def forward(x: Tensor, one: bool) -> Tensor:
        return (x[:1, 0] if one else x[:, 0]).clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor):
        ctx.lead = inputs[0].shape[:2]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        batch, heads = ctx.lead
        share = batch * heads // grad.shape[0]
        return (grad / share)[:, None].expand(batch, heads, -1, -1), None


def _shared(
    v: Tensor,
    law: str,
    distance: tuple,
    masses: tuple,
    seen: tuple,
    max_force: float | None,
    force_cap: str,
) -> Tensor:
    """The path of calls whose heads share one distance; tensors in their own dtypes but `v`."""
    q, k, eps, curvature, table = distance
    mass, query_mass, key_mass, repulsive = masses
    mask, key_ranges, causal, window, exclude_self = seen
    dtype = v.dtype
    strength = mass.to(dtype).square()
    strength = (-strength if repulsive else strength).view(1, -1, 1)
    if query_mass is not None:
        strength = strength * query_mass.to(dtype)
    key_term = None if key_mass is None else key_mass.to(dtype)
    if key_term is not None and law == "power":
        key_term = key_term.log()
    if table is None:
        q, k = augment(*(_Once.apply(x, _is_expanded(x, 0)).to(dtype) for x in (q, k)), None, None)
        batch = max(q.shape[0], k.shape[0])
        q, k = (x.expand(batch, -1, -1) for x in (q, k))
    else:
        table = table.to(dtype)
        table = table.unsqueeze(0).unsqueeze(0) if table.dim() == 2 else table
    bent = (None, 1.0) if curvature is None else (curvature.kappa, curvature.horizon)
    rules = (law, causal, window, exclude_self, max_force, force_cap == "tanh")
    eps = 0.0 if eps is None else float(eps)
    return shared_attention(
        q, k, v, strength, key_term, table, mask, key_ranges, *rules, eps, *bent
    )


def augment(
    q: Tensor, k: Tensor, eps: Tensor | None, key_radius_sq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`q'` `[B, H, Tq, E]` and `k'` `[B, Hkv, Tk, E]` with `q'.k' = d^2 + eps` (`d^2` without
    eps), not clamped. Leading dimensions are those of `q` and `k`.

    `E` is `D + 2`, or `D + 1` with lifted keys, whose `R^2` is the same for all keys of a row.
    """
    query_term = _query_term(q, k, eps, key_radius_sq)
    if key_radius_sq is not None:
        query = torch.cat([-2.0 * q, query_term], -1)
        return query, torch.cat([k, torch.ones_like(k[..., :1])], -1)
    query = torch.cat([-2.0 * q, torch.ones_like(query_term), query_term], -1)
    kappa = k.square().sum(-1, keepdim=True)
    return query, torch.cat([k, kappa, torch.ones_like(kappa)], -1)


def _query_term(q: Tensor, k: Tensor, eps: Tensor | None, key_radius_sq: Tensor | None) -> Tensor:
    """`|q_i|^2 + eps`, plus `R^2` with lifted keys: `[B, H, Tq, 1]`.

    `R^2` is with the row because scores hardly change when all distances of a row grow alike: its
    gradient is a small rest of large terms that cancel within rows, so rows are summed first.
    """
    term = q.square().sum(-1, keepdim=True)
    constant = eps
    if key_radius_sq is not None:
        radius_sq = key_radius_sq.repeat_interleave(q.shape[1] // k.shape[1])
        constant = radius_sq if eps is None else eps + radius_sq
    return term if constant is None else term + constant[:, None, None]


def _sink_score(softened: Tensor, strength: Tensor, law: str, sinks: Tensor) -> Tensor:
    """The score of a key at the origin, `[B, H, Tq]`: its softened distance is `_query_term`."""
    softened = softened.squeeze(-1)
    score = -strength * softened.log() if law == "power" else strength / softened
    return score + (sinks[:, None] if sinks.dim() == 1 else sinks)


def _is_decoding(q: Tensor, k: Tensor, *arguments: object) -> bool:
    """Eager, on real tensors, without gradient, and few queries per key head."""
    # In this order: a graph must not compare its symbolic lengths, which would split their range.
    if torch.compiler.is_compiling() or q.shape[2] * q.shape[1] > DECODE_QUERIES * k.shape[1]:
        return False
    tensors = [x for x in (q, k, *arguments) if isinstance(x, Tensor)]
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not needs_gradient and not is_observed(tensors)
