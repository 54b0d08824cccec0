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

import torch
from torch import Tensor

from .cutoff import Cutoff
from .reference import split_mask

# Terms that this implementation does not have, by the value that leaves each out.
_ABSENT = {
    "head_bias": None,
    "repulsive": False,
    "cutoff": None,
    "max_force": None,
    "inverse_distance": None,
    "softcap": None,
    "sinks": None,
    "window": None,
    "key_ranges": None,
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
    head_bias: Tensor | None = None,
    repulsive: bool = False,
    cutoff: Cutoff | None = None,
    max_force: float | None = None,
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
    tensors = (q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, mask)
    options = {
        "eps": eps,
        "key_radius_sq": key_radius_sq,
        "query_mass": query_mass,
        "key_mass": key_mass,
        "head_bias": head_bias,
        "repulsive": repulsive,
        "cutoff": cutoff,
        "max_force": max_force,
        "inverse_distance": inverse_distance,
        "softcap": softcap,
        "sinks": sinks,
        "mask": mask,
        "window": window,
        "key_ranges": key_ranges,
        "exclude_self": exclude_self,
        "dropout_p": dropout_p,
    }
    refusal = flex_refusal(q, k, v, mass, options)
    if refusal is not None:
        raise ValueError(f"gravity_attention: impl='flex' expects {refusal}, or use impl='chunked'")
    # Under no_grad the leaves still say requires_grad, which FlexAttention refuses on a CPU.
    q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, mask = (
        None if x is None else x.detach() for x in tensors
    )
    query_term = q.float().square().sum(-1)
    if key_radius_sq is None:
        key_term = k.float().square().sum(-1)
    else:
        key_term = key_radius_sq.float()[None, :, None].expand(k.shape[:3]).contiguous()
    strength = mass.float().square()[None, :, None].expand(q.shape[:3])
    if query_mass is not None:
        strength = strength * query_mass.float()
    if key_mass is not None:
        key_mass = key_mass.float().log() if law == "power" else key_mass.float()
    allowed, bias = (None, None) if mask is None else split_mask(mask)
    if mask is not None:
        allowed = allowed[(None,) * (4 - mask.dim())]
    if bias is not None:
        bias = bias.float()[(None,) * (4 - mask.dim())]
    block_mask = _causal_blocks(q.shape[2], k.shape[2], q.device) if causal else None
    q, k, v, strength = (x.contiguous() for x in (q, k, v, strength))
    if q.device.type != "cpu":
        # Lengths may vary without compiling again; torch fails on varying head counts and widths.
        for x in (q, k, v):
            torch._dynamo.mark_static(x, [1, 3])
        for x in (query_term, key_term, strength):
            torch._dynamo.mark_static(x, 1)
    return _runner(q.device.type)(
        q,
        k,
        v,
        query_term,
        key_term,
        strength,
        eps.float(),
        law,
        key_mass,
        allowed,
        bias,
        block_mask,
    )


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
    if v.dtype == torch.float64:
        return "float32, bfloat16 or float16, got torch.float64: convert the inputs"
    if q is None or k is None or 0 in (*q.shape, *k.shape):
        shapes = [None if x is None else tuple(x.shape) for x in (q, k)]
        return f"no empty dimension, got q {shapes[0]}, k {shapes[1]}"
    return None


def _score_mod(
    query_term: Tensor,
    key_term: Tensor,
    strength: Tensor,
    eps: Tensor,
    law: str,
    key_mass: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
) -> Callable[..., Tensor]:
    """`q.k` to score. Captured tensors: per query `[B, H, Tq]`, per key `[B, Hkv, Tk]`."""
    groups = query_term.shape[1] // key_term.shape[1]

    def gravity(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance_sq = query_term[b, h, i] + key_term[b, h // groups, j] - 2.0 * product
        softened = torch.clamp(distance_sq, min=0.0) + eps[h]
        if law == "power":
            score = -strength[b, h, i] * torch.log(softened)
            if key_mass is not None:
                score = score + key_mass[b, h, j]
        else:
            score = strength[b, h, i] / softened
            if key_mass is not None:
                score = score * key_mass[b, h, j]
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


@functools.cache
def _runner(device_type: str) -> Callable[..., Tensor]:
    """Imported and compiled on first use: importing the package must not start a compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, query_term: Tensor, key_term: Tensor, *rest: object
    ) -> Tensor:
        *score, block_mask = rest
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
            score_mod=_score_mod(query_term, key_term, *score),
            block_mask=block_mask,
            scale=1.0,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options or None,
        )

    return run if device_type == "cpu" else torch.compile(run)


@functools.lru_cache(maxsize=32)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    shift = keys - queries

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + shift

    return create_block_mask(visible, None, None, queries, keys, device=device)
