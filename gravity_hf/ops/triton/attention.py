"""The Triton implementation behind `gravity_attention`: tensors as the kernels take them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .op import attention
from .sinks import sink_scores


def gravity_attention_triton(
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
    cutoff: Any = None,
    curvature: Any = None,
    max_force: float | None = None,
    force_cap: str = "clamp",
    inverse_distance: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_ranges: Tensor | None = None,
    exclude_self: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Same numbers as `gravity_attention_reference`, in tiles that never leave the processor.

    Shapes and meanings as in `gravity_hf.ops.api.gravity_attention`. First derivatives for all
    tensors but the mask. Products take q, k, v as they are; weights are rounded to the dtype of v
    before their product with v, as in every fused kernel; everything between is float32. Calls with
    few queries and no gradient go to the decoding kernel. Memory is linear in length.
    """
    strength = mass.float().square()
    eps, key_radius_sq, query_mass, head_bias, table = (
        None if x is None else x.float().contiguous()
        for x in (eps, key_radius_sq, query_mass, head_bias, inverse_distance)
    )
    if table is not None:
        # [B|1, Tq, Tk]
        table = table.flatten(0, -3) if table.dim() == 4 else table[None]
        table = table.log() if law == "power" else table
    key_term = None
    if key_mass is not None:
        key_mass = key_mass.float()
        key_term = (key_mass.log2() if law == "power" else key_mass).contiguous()
    elif log_key_mass is not None:
        # In units of log2 e, as scores are.
        key_term = (log_key_mass.float() * math.log2(math.e)).contiguous()
    sink = None
    if sinks is not None:
        sink = sink_scores(q, strength, eps, law, key_radius_sq, sinks, v.shape[1])
    # Drawn on the device, from torch's own generator: manual_seed, checkpointing's replay and
    # captured graphs all reach the dropout.
    seed = torch.randint(2**62, (1,), device=v.device) if dropout_p > 0 else None
    return attention(
        q,
        k,
        v,
        strength,
        eps,
        key_radius_sq,
        query_mass,
        key_term,
        head_bias,
        None if cutoff is None else cutoff.radius.float().contiguous(),
        table,
        sink,
        mask,
        None if key_ranges is None else key_ranges.contiguous(),
        seed,
        law,
        causal,
        window or 0,
        exclude_self,
        repulsive,
        "none" if cutoff is None else cutoff.kind,
        1.0 if cutoff is None else float(cutoff.width),
        float("inf") if max_force is None else float(max_force),
        float(dropout_p),
        force_cap,
        None if curvature is None else float(curvature.kappa),
        1.0 if curvature is None else float(curvature.horizon),
    )
