"""What `gravity_attention` refuses, before anything is computed. Reads shapes and dtypes only.

Lengths are put into words where a call is refused and nowhere else: to write a symbolic length of a
compiled graph would bind the graph to its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..config import IMPLEMENTATIONS, LAWS
from .curvature import Curvature
from .cutoff import Cutoff

# Terms that have no meaning under the power law; under it the queries' masses would cancel.
_FORCE_ONLY = ("query_mass", "head_bias", "repulsive", "max_force")
FORCE_CAPS = ("clamp", "tanh")
_HALF = (torch.bfloat16, torch.float16)
# What a patched host never has; beside it a neutral score or a key at the origin is not defined.
_WITHOUT_HOST_TERMS = (
    "query_mass",
    "key_mass",
    "log_key_mass",
    "head_bias",
    "repulsive",
    "cutoff",
    "curvature",
    "max_force",
    "inverse_distance",
    "exclude_self",
)


class _Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int


def check_call(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    mass: Tensor,
    options: Mapping[str, Any],
    cu_seqlens: Tensor | None,
    impl: str,
) -> None:
    """Raise ValueError for what does not fit. `options`: the keyword arguments of
    `gravity_attention` by name, without `cu_seqlens` and `impl`."""
    law, dropout_p = options["law"], options["dropout_p"]
    _expect(law in LAWS, "law", f"one of {list(LAWS)}", law)
    _expect(impl in IMPLEMENTATIONS, "impl", f"one of {list(IMPLEMENTATIONS)}", impl)
    _expect(0.0 <= dropout_p < 1.0, "dropout_p", "a number in [0, 1)", dropout_p)
    if options["inverse_distance"] is None:
        sizes = _check_vectors(q, k, v, mass, options)
    else:
        sizes = _check_table(q, k, v, mass, options)
    _check_terms(sizes, options)
    _check_host_terms(sizes, options)
    _check_visible(sizes, options, cu_seqlens)
    _expect(mass.is_floating_point(), "mass", "a floating dtype", mass.dtype)
    given = {"q": q, "k": k, "mass": mass, "cu_seqlens": cu_seqlens, **options}
    for name, value in given.items():
        if isinstance(value, Tensor):
            _expect(value.device == v.device, name, f"the device of v, {v.device}", value.device)


def _check_vectors(
    q: Tensor | None, k: Tensor | None, v: Tensor, mass: Tensor, options: Mapping[str, Any]
) -> _Sizes:
    if q is None or k is None:
        got = "None: give q and k, or inverse_distance instead of both"
        _refuse("q" if q is None else "k", "a tensor [B, H, T, D]", got)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _expect_values(name, tensor)
    _expect(k.dtype == q.dtype, "k", f"the dtype of q, {q.dtype}", k.dtype)
    _check_values_dtype(q.dtype, v.dtype)
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    fits = k.shape[0] == batch and k.shape[3] == width and heads % kv_heads == 0
    if not fits:
        _refuse("k", f"[{batch}, a divisor of {heads}, Tk, {width}]", tuple(k.shape))
    fits = v.shape[:3] == k.shape[:3]
    if not fits:
        _refuse("v", f"[{batch}, {kv_heads}, {keys}, Dv]", tuple(v.shape))
    _expect(mass.shape == (heads,), "mass", f"[{heads}]", tuple(mass.shape))
    eps = options["eps"]
    if isinstance(eps, Tensor):
        _expect(eps.shape == (heads,), "eps", f"a number or [H] = [{heads}]", tuple(eps.shape))
    elif options["curvature"] is None:
        _expect(eps is not None and eps > 0, "eps", "a positive number or [H]", eps)
    else:
        _expect(eps is not None and eps >= 0, "eps", "a number >= 0 or [H]", eps)
    return _Sizes(batch, heads, kv_heads, queries, keys)


def _check_values_dtype(vectors: torch.dtype, values: torch.dtype) -> None:
    """float32 vectors may come with values in half precision, for distances need more digits."""
    if vectors == values or (vectors == torch.float32 and values in _HALF):
        return
    expected = f"the dtype of q, {vectors}"
    if vectors == torch.float32:
        expected += f", or {' or '.join(map(str, _HALF))}"
    _refuse("v", expected, values)


def _check_table(
    q: Tensor | None, k: Tensor | None, v: Tensor, mass: Tensor, options: Mapping[str, Any]
) -> _Sizes:
    names = ("eps", "key_radius_sq", "cutoff", "curvature")
    distance = {"q": q, "k": k, **{x: options[x] for x in names}}
    for name, value in distance.items():
        _expect(value is None, name, "None beside inverse_distance, which replaces it", value)
    _expect_values("v", v)
    batch, kv_heads, keys, _ = v.shape
    fits = mass.dim() == 1 and mass.shape[0] % kv_heads == 0
    _expect(fits, "mass", f"[H], H a multiple of v's {kv_heads} heads", tuple(mass.shape))
    table = options["inverse_distance"]
    fits = table.is_floating_point() and (table.dim() == 2 or table.dim() == 4)
    fits = fits and table.shape[-1] == keys
    if fits and table.dim() == 4:
        fits = table.shape[1] == 1 and (table.shape[0] == batch or table.shape[0] == 1)
    if not fits:
        got = f"{table.dtype} {tuple(table.shape)}"
        expected = f"a floating [Tq, {keys}] or [{batch}, 1, Tq, {keys}]"
        _refuse("inverse_distance", expected, got)
    return _Sizes(batch, mass.shape[0], kv_heads, table.shape[-2], keys)


def _check_terms(sizes: _Sizes, options: Mapping[str, Any]) -> None:
    per_head = (sizes.heads,)
    shapes = {
        "key_radius_sq": ((sizes.kv_heads,), f"[{sizes.kv_heads}]"),
        "query_mass": ((sizes.batch, sizes.heads, sizes.queries), "[B, H, Tq]"),
        "key_mass": ((sizes.batch, sizes.heads, sizes.keys), "[B, H, Tk]"),
        "log_key_mass": ((sizes.batch, sizes.heads, sizes.keys), "[B, H, Tk]"),
        "head_bias": (per_head, f"[{sizes.heads}]"),
    }
    for name, (shape, words) in shapes.items():
        tensor = options[name]
        if tensor is not None:
            _expect(tensor.shape == shape, name, words, tuple(tensor.shape))
    if options["law"] != "force":
        for name in _FORCE_ONLY:
            fits = not _given(options, name)
            _expect(fits, name, "law='force', which alone has it", options["law"])
    logs = options["log_key_mass"]
    if logs is not None:
        _expect(options["law"] == "power", "log_key_mass", "law='power'", options["law"])
        both = options["key_mass"] is not None
        _expect(not both, "log_key_mass", "no key_mass beside it", "both: give one of them")
    limit = options["max_force"]
    if limit is not None:
        finite = not isinstance(limit, bool) and -math.inf < limit < math.inf
        _expect(finite, "max_force", "a finite number", limit)
    cap = options["force_cap"]
    _expect(cap in FORCE_CAPS, "force_cap", f"one of {list(FORCE_CAPS)}", cap)
    if cap == "tanh" and limit is not None:
        _expect(limit > 0, "max_force", "a number > 0 beside force_cap='tanh'", limit)
    _check_curvature(options)
    cutoff = options["cutoff"]
    if cutoff is not None:
        _expect(isinstance(cutoff, Cutoff), "cutoff", "a gravity_hf.ops.cutoff.Cutoff", cutoff)
        shape = tuple(cutoff.radius.shape)
        _expect(shape == per_head, "cutoff.radius", f"[{sizes.heads}]", shape)
        fits = cutoff.kind != "soft" or options["law"] == "force"
        _expect(fits, "cutoff", "kind 'hard' or 'log' under law='power'", cutoff.kind)


def _check_curvature(options: Mapping[str, Any]) -> None:
    curvature = options["curvature"]
    if curvature is None:
        return
    fits = isinstance(curvature, Curvature)
    _expect(fits, "curvature", "a gravity_hf.ops.curvature.Curvature", curvature)
    for name in ("key_radius_sq", "cutoff"):
        value = options[name]
        _expect(value is None, name, "None beside curvature, which bends distances", value)


def _check_host_terms(sizes: _Sizes, options: Mapping[str, Any]) -> None:
    softcap, sinks = options["softcap"], options["sinks"]
    if softcap is not None:
        number = isinstance(softcap, (int, float)) and not isinstance(softcap, bool)
        fits = number and 0 < softcap < math.inf
        _expect(fits, "softcap", "a finite number > 0, or None", softcap)
    if sinks is not None:
        _expect(isinstance(sinks, Tensor), "sinks", "a tensor [H] or [B, H, Tq]", sinks)
        _expect(sinks.is_floating_point(), "sinks", "a floating dtype", sinks.dtype)
        full = (sizes.batch, sizes.heads, sizes.queries)
        fits = sinks.shape == full[1:2] or sinks.shape == full
        if not fits:
            _refuse("sinks", f"[{sizes.heads}] or {list(full)}", tuple(sinks.shape))
    for name in ("softcap", "sinks"):
        if options[name] is not None:
            others = [other for other in _WITHOUT_HOST_TERMS if _given(options, other)]
            expected = f"none of {list(_WITHOUT_HOST_TERMS)} beside it"
            _expect(not others, name, expected, f"{others}: leave out one or the other")


def _check_visible(sizes: _Sizes, options: Mapping[str, Any], cu_seqlens: Tensor | None) -> None:
    batch, _, _, queries, keys = sizes
    mask, window, ranges = options["mask"], options["window"], options["key_ranges"]
    if mask is not None:
        dtype_fits = mask.dtype == torch.bool or mask.is_floating_point()
        _expect(dtype_fits, "mask", "bool (True = attend) or float (added)", mask.dtype)
        full = (batch, sizes.heads, queries, keys)
        # Written out: `in` does not compare the symbolic lengths of a compiled graph.
        tail = full[len(full) - mask.dim() :]
        pairs = zip(mask.shape, tail, strict=True)
        fits = mask.dim() <= 4 and all(m == 1 or m == f for m, f in pairs)
        if not fits:
            _refuse("mask", f"broadcastable to {full}", tuple(mask.shape))
    if window is not None:
        fits = isinstance(window, int) and not isinstance(window, bool) and window >= 1
        _expect(fits, "window", "a number of keys, an integer >= 1", window)
    if ranges is not None:
        one = ranges.dtype == torch.int32 and ranges.dim() == 3 and ranges.shape[2] == 2
        fits = one and (ranges.shape[0] == 1 or ranges.shape[0] == batch)
        fits = fits and (ranges.shape[1] == 1 or ranges.shape[1] == queries)
        if not fits:
            got = f"{ranges.dtype} {tuple(ranges.shape)}"
            _refuse("key_ranges", f"int32 [1 or {batch}, 1 or {queries}, 2]", got)
    if cu_seqlens is not None:
        fits = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1
        fits = fits and cu_seqlens.shape[0] > 0
        if not fits:
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            _refuse("cu_seqlens", "int32 [documents + 1]", got)
        _expect(ranges is None, "cu_seqlens", "no key_ranges beside it", "both: give one of them")
        if batch != 1 or queries != keys:
            got = f"B = {batch}, Tq = {queries}, Tk = {keys}: use key_ranges there"
            _refuse("cu_seqlens", "B = 1 and Tq = Tk (documents packed into one row)", got)


def _given(options: Mapping[str, Any], name: str) -> bool:
    return options[name] is not None and options[name] is not False


def _expect_values(name: str, tensor: Tensor) -> None:
    _expect(tensor.dim() == 4, name, "4 dimensions [B, H, T, D]", tuple(tensor.shape))
    _expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        _refuse(name, expected, got)


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"gravity_attention: {name}: expected {expected}, got {got}")
