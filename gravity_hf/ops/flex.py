"""Gravity attention through torch's FlexAttention: a forward pass, compiled and fused on a GPU.

The score function gets `q.k` from the kernel and captures the norms, so FlexAttention needs no
change: an implementation independent of `chunked.py`, without gradients. Torch has no backward for
it on a CPU, and on a GPU the gradient of the captured norms is a scatter of atomic additions,
hundreds of times slower than the forward pass. On a CPU it runs uncompiled, with memory `Tq * Tk`,
as a check on the other implementations: torch 2.13 fails to compile it there for dynamic lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import Curvature
from .cutoff import Cutoff
from .flex_blocks import block_mask
from .reference import split_mask

# What a table's queries and keys, which nobody reads, are wide: the least that products take.
_UNREAD = 16

# Terms that this implementation does not have, by the value that leaves each out.
_ABSENT = {
    "head_bias": None,
    "repulsive": False,
    "cutoff": None,
    "softcap": None,
    "sinks": None,
    "window": None,
    "exclude_self": False,
}


def gravity_attention_flex(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    mass: Tensor,
    *,
    eps: Tensor | None,
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
    """Same numbers as `gravity_attention_reference`, forward only, for calls without the terms that
    `_ABSENT` names.

    Shapes and meanings as in `gravity_hf.ops.api.gravity_attention`.

    Raises:
        ValueError: what `flex_refusal` says.
    """
    options = {
        "eps": eps,
        "key_radius_sq": key_radius_sq,
        "query_mass": query_mass,
        "key_mass": key_mass,
        "log_key_mass": log_key_mass,
        "head_bias": head_bias,
        "repulsive": repulsive,
        "cutoff": cutoff,
        "inverse_distance": inverse_distance,
        "softcap": softcap,
        "sinks": sinks,
        "mask": mask,
        "window": window,
        "exclude_self": exclude_self,
        "dropout_p": dropout_p,
    }
    refusal = flex_refusal(q, k, v, mass, options)
    if refusal is not None:
        raise ValueError(f"gravity_attention: impl='flex' expects {refusal}, or use impl='chunked'")
    # Under no_grad the leaves still say requires_grad, which FlexAttention refuses on a CPU.
    tensors = (q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, inverse_distance, mask)
    q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, table, mask = (
        None if x is None else x.detach() for x in tensors
    )
    if table is not None:
        table = table.float()[(None,) * (4 - table.dim())]
        table = table.log() if law == "power" else table
        q = v.new_zeros(v.shape[0], mass.shape[0], table.shape[2], _UNREAD)
        k = v.new_zeros(*v.shape[:3], _UNREAD)
    strength = mass.float().square()[None, :, None].expand(q.shape[:3])
    if query_mass is not None:
        strength = strength * query_mass.float()
    if key_mass is not None:
        key_mass = key_mass.float().log() if law == "power" else key_mass.float()
    if log_key_mass is not None:
        key_mass = log_key_mass.detach().float()
    allowed, bias = (None, None) if mask is None else split_mask(mask)
    if mask is not None:
        allowed = allowed[(None,) * (4 - mask.dim())]
    if bias is not None:
        bias = bias.float()[(None,) * (4 - mask.dim())]
    terms = _Terms(
        strength.contiguous(),
        key_mass,
        None if table is not None else _distance(q, k, eps, key_radius_sq, curvature),
        table,
        law,
        max_force,
        force_cap,
        allowed,
        bias,
    )
    blocks = block_mask(q.shape[2], k.shape[2], causal, key_ranges, q.device)
    # Positions are the same for all heads or batch entries; to write them out would multiply them.
    q, k, v = (x if 0 in x.stride() else x.contiguous() for x in (q, k, v))
    if q.device.type != "cpu":
        # Lengths may vary without compiling again; torch fails on varying head counts and widths.
        for x in (q, k, v):
            torch._dynamo.mark_static(x, [1, 3])
        torch._dynamo.mark_static(terms.strength, 1)
        if terms.distance is not None:
            for x in terms.distance[:2]:
                torch._dynamo.mark_static(x, 1)
    return _runner(q.device.type)(q, k, v, terms, blocks)


def flex_refusal(
    q: Tensor | None, k: Tensor | None, v: Tensor, mass: Tensor, options: Mapping[str, object]
) -> str | None:
    """What a call would have to be for this implementation to serve it; None: it can."""
    for name, absent in _ABSENT.items():
        value = options.get(name, absent)
        if value is not None and value is not absent:
            return f"no {name}: call it without"
    tensors = (x for x in (q, k, v, mass, *options.values()) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "inputs without gradient, got one that requires it: call it under torch.no_grad()"
    if options["dropout_p"] != 0:
        return f"dropout_p = 0, got {options['dropout_p']}: call it with dropout_p=0"
    if q is not None and q.dtype != v.dtype:
        return f"q, k and v of one dtype, got {q.dtype} and {v.dtype}: convert one of them"
    if v.dtype == torch.float64:
        return "float32, bfloat16 or float16, got torch.float64: convert the inputs"
    table = options.get("inverse_distance")
    sides = (q, k) if table is None else (v, table)
    if any(x is None or 0 in x.shape for x in sides):
        shapes = [None if x is None else tuple(x.shape) for x in sides]
        names = "q {}, k {}" if table is None else "v {}, inverse_distance {}"
        return f"no empty dimension, got {names.format(*shapes)}"
    return None


class _Distance(NamedTuple):
    """Of `|q_i|^2` `[B, H, Tq]` and `kappa_j` `[B, Hkv, Tk]` to a softened, maybe curved distance.
    `eps`, and the curvature's two numbers where there is one: `[H]`; numbers of Python would be
    compiled in."""

    query_term: Tensor
    key_term: Tensor
    eps: Tensor
    kappa: Tensor | None
    horizon: Tensor | None


class _Terms(NamedTuple):
    """What a score is made of: `strength` `[B, H, Tq]` with the queries' masses, `key_mass`
    `[B, H, Tk]` (its logarithm under the power law), and a distance or a table `[B|1, 1, Tq, Tk]`
    (likewise); masks `[B|1, H|1, Tq|1, Tk|1]`."""

    strength: Tensor
    key_mass: Tensor | None
    distance: _Distance | None
    table: Tensor | None
    law: str
    max_force: float | None
    force_cap: str
    allowed: Tensor | None
    bias: Tensor | None


def _distance(
    q: Tensor, k: Tensor, eps: Tensor, key_radius_sq: Tensor | None, curvature: Curvature | None
) -> _Distance:
    eps = eps.float()
    if key_radius_sq is None:
        key_term = k.float().square().sum(-1)
    else:
        key_term = key_radius_sq.float()[None, :, None].expand(k.shape[:3]).contiguous()
    bent: tuple[Tensor | None, ...] = (None, None)
    if curvature is not None:
        numbers = (float(curvature.kappa), float(curvature.horizon))
        bent = tuple(torch.full_like(eps, number) for number in numbers)
    return _Distance(q.float().square().sum(-1), key_term, eps, *bent)


def _softened(distance: _Distance) -> Callable[..., Tensor]:
    """`q.k` to the softened distance."""
    query_term, key_term, eps, kappa, horizon = distance
    groups = query_term.shape[1] // key_term.shape[1]

    def softened(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance_sq = query_term[b, h, i] + key_term[b, h // groups, j] - 2.0 * product
        length = torch.clamp(distance_sq, min=0.0)
        if kappa is not None:
            bend = 1.0 + kappa[h] * torch.cos(torch.sqrt(length + horizon[h]))
            length = torch.maximum(length * bend, horizon[h])
        return length + eps[h]

    return softened


def _score_mod(terms: _Terms) -> Callable[..., Tensor]:
    """`q.k` to score."""
    strength, key_mass, distance, table, law, max_force, force_cap, allowed, bias = terms
    softened = None if distance is None else _softened(distance)

    def gravity(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softened is None:
            score = strength[b, h, i] * _broadcast(table, b, h, i, j)
        elif law == "power":
            score = -strength[b, h, i] * torch.log(softened(product, b, h, i, j))
        else:
            score = strength[b, h, i] / softened(product, b, h, i, j)
        if key_mass is not None and law == "power":
            score = score + key_mass[b, h, j]
        elif key_mass is not None:
            score = score * key_mass[b, h, j]
        if max_force is not None and force_cap == "tanh":
            score = max_force * torch.tanh(score / max_force)
        elif max_force is not None:
            score = torch.clamp(score, max=max_force)
        if bias is not None:
            score = score + _broadcast(bias, b, h, i, j)
        if allowed is not None:
            score = torch.where(_broadcast(allowed, b, h, i, j), score, -float("inf"))
        return score

    return gravity


def _broadcast(tensor: Tensor, *indices: Tensor) -> Tensor:
    """The element at `indices`, where a dimension of size 1 stands for every index."""
    return tensor[
        tuple(
            index * 0 if size == 1 else index
            for size, index in zip(tensor.shape, indices, strict=True)
        )
    ]


# As many as dynamo keeps for one function in all.
_GRAPHS = 256


@functools.cache
def _runner(device_type: str) -> Callable[..., Tensor]:
    """Imported and compiled on first use: importing the package must not start a compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, terms: _Terms, blocks: object) -> Tensor:
        # Whatever the process allows for products, a distance needs all bits of float32.
        options: dict[str, object] = {}
        if q.is_cuda and q.dtype == torch.float32:
            options["FLOAT32_PRECISION"] = "'ieee'"
        if q.is_cuda and q.shape[2] > 1:
            # Torch's kernel for short queries finds no configuration for 57 grouped queries.
            options["FORCE_USE_FLEX_ATTENTION"] = True
        return flex_attention(
            q,
            k,
            v,
            score_mod=_score_mod(terms),
            block_mask=blocks,
            scale=1.0,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options or None,
        )

    return run if device_type == "cpu" else _many_graphs(torch.compile(run))


def _many_graphs(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each shape of head and each combination of terms has a graph of its own. Beyond dynamo's
    limit, 8, calls would run unfused without a word, with all scores in memory."""

    def call(*arguments: object) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled(*arguments)
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            return compiled(*arguments)

    return call
