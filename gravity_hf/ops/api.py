"""`gravity_attention`: checks, then exactly one implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_call
from .chunked import gravity_attention_chunked
from .curvature import Curvature
from .cutoff import Cutoff
from .exporting import is_exporting
from .flex import flex_refusal, gravity_attention_flex
from .ranges import ranges_from_cu_seqlens
from .reference import compute_dtype, gravity_attention_reference


def gravity_attention(
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
    cu_seqlens: Tensor | None = None,
    exclude_self: bool = False,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention in which a token attends to what is near it: `softmax_j(score_ij) v_j`.

    `score_ij = (M_h^2 / (d_ij^2 + eps_h) + beta_h) a_i b_j` (law `"force"`) or
    `score_ij = -M_h^2 ln(d_ij^2 + eps_h) + ln b_j` (law `"power"`, so that weights are
    `b_j (d_ij^2 + eps_h)^(-M_h^2)`), with `d_ij^2 = max(|q_i|^2 + kappa_j - 2 q_i.k_j, 0)`.
    Derivation and gradients: README.md beside this file.

    A query sees the keys that `mask`, `causal`, `window`, `key_ranges` and a hard cutoff all leave
    visible; one that sees none gives zeros. Query i stands at position `p_i = i + Tk - Tq`.

    Args:
        q: queries `[B, H, Tq, D]`; None with `inverse_distance`.
        k: keys `[B, Hkv, Tk, D]`; `H` is a multiple of `Hkv`, consecutive query heads share one.
            None with `inverse_distance`.
        v: values `[B, Hkv, Tk, Dv]` in the dtype of q and k, or in bfloat16 or float16 where those
            are float32: distances keep all their digits, in a model of half precision, too.
        mass: `M` `[H]`, not negative.
        eps: softening in units of squared distance, a number or `[H]`; positive, or with a
            curvature not negative. None with `inverse_distance`.
        law: `"force"` or `"power"`.
        key_radius_sq: `R^2` `[Hkv]`. Given: lifted keys, `kappa_j = R^2`. Absent: `kappa_j =
            |k_j|^2`.
        query_mass: `a` `[B, H, Tq]`, force law only (under the power law it would cancel).
        key_mass: `b` `[B, H, Tk]`; positive under the power law.
        log_key_mass: `ln b` `[B, H, Tk]` in place of `key_mass`, under the power law: for masses
            whose ratios leave the range of numbers, such as those that fade with distance in time.
        head_bias: `beta` `[H]`, added to the force before the tokens' masses; force law only.
        repulsive: the force is `-M^2 / (d^2 + eps)`: what is near is avoided. Force law only.
        cutoff: a radius per head; see `gravity_hf.ops.cutoff.Cutoff`.
        curvature: of the space that q and k are positions in: `D(d^2)` takes the place of `d^2`
            before `eps` is added; see `gravity_hf.ops.curvature.Curvature`. Not beside lifted keys,
            a cutoff, a softcap, sinks or `inverse_distance`.
        max_force: a ceiling `c` of the score, before cutoff and mask; force law only.
        force_cap: what `max_force` does: `"clamp"`, `min(score, c)`, or `"tanh"`,
            `c tanh(score / c)`, which has a slope everywhere and needs `c > 0`.
        inverse_distance: takes the place of `1 / (d^2 + eps)`: `[Tq, Tk]`, for all batch entries
            and heads, or `[B, 1, Tq, Tk]`, for all heads. Positive under the power law. Gradients
            reach it.
        softcap: `c`, in nats. A score departs by less than `c` from the neutral score of its pair,
            `n_ij`, which is that of a key at a right angle to the query, `q_i.k_j = 0`: `n_ij + c
            tanh((score_ij - n_ij) / c)`, before the mask. As eps grows this becomes a host's `c
            tanh(scaling q.k / c)`.
        sinks: `[H]` or `[B, H, Tq]`, in nats. One more key at the origin, with value zero, seen by
            every query, whose score is the law's plus `sinks`: it takes a share of the weights. As
            eps grows this becomes a host's sink logit.
        mask: broadcastable to `[B, H, Tq, Tk]`. Bool: True = attend. Float: added to the score;
            entries at or below half of the dtype's lowest value are hidden.
        causal: query i sees keys `j <= p_i`.
        window: query i sees keys less than this many positions away: `p_i - j < window` if causal,
            `|p_i - j| < window` otherwise.
        key_ranges: int32 `[B|1, Tq|1, 2]`: query i sees keys `start_i <= j < stop_i`; starts and
            stops must not decrease along the queries (not checked).
        cu_seqlens: int32 `[N + 1]`, for `B = 1` and `Tq = Tk`: tokens see their own document only,
            document n being `cu_seqlens[n] <= t < cu_seqlens[n + 1]`. Instead of `key_ranges`.
        exclude_self: a query gives no weight to the key at its own position, `j = p_i`, unless it
            sees no other.
        dropout_p: probability of dropping a weight, applied whenever it is not 0.
        impl: `"reference"`, `"chunked"`, `"flex"`, `"triton"`, or `"auto"`, which chooses by device
            and by what the call needs. A named implementation that cannot serve the call is an
            error; it never turns into another one.

    `softcap` and `sinks` are for patched hosts: they go with masks, `causal`, `window`,
    `key_ranges`, dropout and each other, not with the other terms.

    Returns:
        `[B, H, Tq, Dv]` in the dtype of `v`. Arithmetic is float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or that `impl` cannot serve.
    """
    options: dict[str, Any] = {
        "eps": eps,
        "law": law,
        "key_radius_sq": key_radius_sq,
        "query_mass": query_mass,
        "key_mass": key_mass,
        "log_key_mass": log_key_mass,
        "head_bias": head_bias,
        "repulsive": repulsive,
        "cutoff": cutoff,
        "curvature": curvature,
        "max_force": max_force,
        "force_cap": force_cap,
        "inverse_distance": inverse_distance,
        "softcap": softcap,
        "sinks": sinks,
        "mask": mask,
        "causal": causal,
        "window": window,
        "key_ranges": key_ranges,
        "exclude_self": exclude_self,
        "dropout_p": dropout_p,
    }
    check_call(q, k, v, mass, options, cu_seqlens, impl)
    if cu_seqlens is not None:
        options["key_ranges"] = ranges_from_cu_seqlens(cu_seqlens, v.shape[2])
    if impl == "auto":
        impl = choose_implementation(q, k, v, mass, options)
    if impl == "chunked":
        return gravity_attention_chunked(q, k, v, mass, **options)
    if eps is not None and not isinstance(eps, Tensor):
        dtype = compute_dtype(v.dtype)
        options["eps"] = torch.full(mass.shape, eps, dtype=dtype, device=mass.device)
    if impl == "reference":
        return gravity_attention_reference(q, k, v, mass, **options).output
    if impl == "flex":
        return gravity_attention_flex(q, k, v, mass, **options)
    return _triton(q, k, v, mass, options)


def choose_implementation(
    q: Tensor | None, k: Tensor | None, v: Tensor, mass: Tensor, options: Mapping[str, Any]
) -> str:
    """What `impl="auto"` means for a call; `options`: the keyword arguments of an implementation.

    `explain_implementation` says which one a device gets. Of what it names, two kinds of calls get
    `"chunked"` instead: empty ones, and for flex those that it refuses (gradients, dropout and most
    terms), those with a mask tensor, and those inside `torch.compile`, where flex would be a
    compiler in a compiler.

    Inside `torch.export`, which `torch.onnx.export` uses too, it is `"reference"`: plain
    arithmetic, so that the program runs without this library and can be translated.
    """
    if is_exporting():
        return "reference"
    name, _ = _explain(v.device, v.dtype, *_of_call(q, v, options))
    if v.numel() == 0 or (q is not None and q.numel() == 0):
        return "chunked"
    if name == "flex" and (
        torch.compiler.is_compiling()
        or options["mask"] is not None
        or flex_refusal(q, k, v, mass, options) is not None
    ):
        return "chunked"
    return name


def explain_implementation(
    device: torch.device | str, dtype: torch.dtype, softcap: float | None = None
) -> tuple[str, str]:
    """What `impl="auto"` chooses on a device for values of a dtype, and why, in words."""
    return _explain(torch.device(device), dtype, None, 0, softcap, None)


def _of_call(q: Tensor | None, v: Tensor, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What triton is asked about a call: the mask, the width of its heads, the softcap, and the
    dtype of its vectors."""
    if q is None:
        return options["mask"], v.shape[3], options["softcap"], None
    return options["mask"], max(v.shape[3], q.shape[3]), options["softcap"], q.dtype


def _explain(
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None,
    width: int,
    softcap: float | None,
    vectors: torch.dtype | None,
) -> tuple[str, str]:
    if device.type != "cuda":
        return "chunked", f"the device is {device.type}, and triton and flex are for CUDA"
    if dtype == torch.float32:
        # A distance needs all bits of float32, which tensor cores do not have: on an H100 the
        # kernels take 230 ms where chunked, over cuBLAS, takes 16, and flex 47
        # (scripts/benchmark/results/kernels_float32.csv).
        return (
            "chunked",
            "in float32 it is faster than triton and flex, whose products are slow there",
        )
    from .triton import triton_refusal

    refusal = triton_refusal(device, dtype, mask, width, softcap, vectors)
    if refusal is None:
        return "triton", f"CUDA, {dtype}, and triton is importable"
    if dtype in (torch.bfloat16, torch.float16):
        plain = "chunked where a call has gradients, dropout, a mask tensor or more terms"
        return "flex", f"triton cannot serve: {refusal}; {plain}"
    return "chunked", f"triton cannot serve: {refusal}, nor can flex"


def _triton(
    q: Tensor | None, k: Tensor | None, v: Tensor, mass: Tensor, options: dict[str, Any]
) -> Tensor:
    # Imported here: `import gravity_hf` must not import triton.
    from .triton import gravity_attention_triton, triton_refusal

    refusal = triton_refusal(v.device, v.dtype, *_of_call(q, v, options))
    if refusal is not None:
        raise ValueError(
            f"gravity_attention: impl='triton' cannot serve this call: {refusal}. Use impl='auto' "
            "or impl='chunked'"
        )
    return gravity_attention_triton(q, k, v, mass, **options)
