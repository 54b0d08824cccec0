"""One call of the operator as the kernels see it: tensors, options, and what follows from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, remembered
from .tiles import Tiles, Widths, forward_tiles, key_tiles, query_tiles

# Bytes that a tile's rows must be aligned to for Hopper's copy engine.
ALIGNMENT = 16
# Keys and values of the heads that run at the same time should stay in the second-level cache.
CACHE_BYTES = 16 * 2**20
# How float32 vectors are multiplied beside values in half precision: "bf16x6", "tf32x3" or "ieee".
MIXED_PRECISION = "bf16x6"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Form:
    """What calls have in common whose tensors differ only in what and where they are.

    Attributes:
        layout: shape and strides of the output.
        numbers: arguments that all kernels share, `Problem.numbers`.
        widths: of heads.
        plain, boundable, shared: as of the problem.
        tiles: of each kernel.
        launches: those that were made, by kernel and what else they depend on.
    """

    layout: tuple[tuple[int, ...], tuple[int, ...]]
    numbers: dict[str, Any]
    widths: Widths
    plain: bool
    boundable: bool
    shared: int
    tiles: dict[str, Tiles]
    launches: dict[Any, Launch]


_FORMS: dict[Any, Form] = {}


@dataclass(frozen=True)
class Problem:
    """Fields in the order of the operator's schema; kappa: None where distances are not curved.

    q: `[B, H, Tq, D]`, k `[B, N, Tk, D]`, absent with a table; float32 or the dtype of v. v: `[B,
    N, Tk, Dv]`. strength: `M^2` `[H]`, eps `[H]`, key_radius_sq `[N]`, query_mass `[B, H, Tq]`,
    key_term `[B, H, Tk]` (factor of the force; under the power law a summand, in units of log2 e),
    head_bias `[H]`, radius `[H]`, table `[B|1, Tq, Tk]` (inverse distances; under the power law
    their logarithms), sink `[B, H, Tq]` (`sinks.sink_scores`; only where `plain` and without a
    key_term or exclude_self): all float32 and contiguous. mask: bool or float, at most 4
    dimensions. key_ranges: int32 `[B|1, Tq|1, 2]`. seed: int64 `[1]`.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    strength: Tensor
    eps: Tensor | None
    key_radius_sq: Tensor | None
    query_mass: Tensor | None
    key_term: Tensor | None
    head_bias: Tensor | None
    radius: Tensor | None
    table: Tensor | None
    sink: Tensor | None
    mask: Tensor | None
    key_ranges: Tensor | None
    seed: Tensor | None
    law: str
    causal: bool
    window: int
    exclude_self: bool
    repulsive: bool
    cutoff: str
    width: float
    max_force: float
    dropout_p: float
    cap: str = "clamp"
    kappa: float | None = None
    horizon: float = 1.0

    @cached_property
    def form(self) -> Form:
        """Found by all that an argument of a kernel is made from, but for addresses."""
        whole = (self.q, self.k, self.v, self.table, self.mask, self.key_ranges)
        small = (self.eps, self.key_radius_sq, self.query_mass, self.key_term, self.head_bias)
        key = (
            *[None if x is None else (x.shape, x.stride(), x.dtype) for x in whole],
            *[x is None for x in (*small, self.radius, self.sink, self.seed)],
            self.strength.shape,
            self.v.device,
            (self.law, self.causal, self.window, self.exclude_self, self.repulsive, self.cutoff),
            (self.width, self.max_force, self.dropout_p, self.cap, self.kappa, self.horizon),
            MIXED_PRECISION,
        )
        return remembered(_FORMS, key, self._form)

    def _form(self) -> Form:
        return Form(
            layout=self.layout(),
            numbers=self.numbers(),
            widths=self.widths,
            plain=self.plain,
            boundable=self.boundable,
            shared=self.shared,
            tiles={
                "forward": forward_tiles(self.widths, self.plain, self.v.device),
                "query": query_tiles(self.widths, self.plain, self.v.device),
                "key": key_tiles(self.widths, self.plain, self.v.device),
            },
            launches={},
        )

    @property
    def batch(self) -> int:
        return self.v.shape[0]

    @property
    def heads(self) -> int:
        return self.strength.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.v.shape[1]

    @property
    def queries(self) -> int:
        return self.table.shape[1] if self.q is None else self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.v.shape[2]

    @property
    def width_k(self) -> int:
        return 16 if self.q is None else self.q.shape[3]

    @property
    def width_v(self) -> int:
        return self.v.shape[3]

    @property
    def widths(self) -> Widths:
        vectors = self.v.dtype if self.q is None else self.q.dtype
        return Widths(vectors, self.v.dtype, block_of(self.width_k), block_of(self.width_v))

    @property
    def empty(self) -> bool:
        """No query or no key: nothing for a kernel to do."""
        return 0 in (self.batch, self.heads, self.queries, self.keys, self.width_v)

    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape `[B, H, Tq, Dv]` and strides of the output, in memory `[B, Tq, H, Dv]`, as models
        go on with it."""
        batch, heads, queries, width = self.batch, self.heads, self.queries, self.width_v
        strides = (queries * heads * width, width, heads * width, 1)
        return (batch, heads, queries, width), strides

    @property
    def plain(self) -> bool:
        """The law with nothing that changes a pair's score, but for what the power law adds to it
        for each key."""
        absent = (self.query_mass, self.head_bias, self.radius, self.table)
        return (
            all(x is None for x in absent)
            and (self.key_term is None or self.law == "power")
            and not self.repulsive
            and self.max_force == float("inf")
            and self.kappa is None
        )

    @property
    def boundable(self) -> bool:
        """Scores have two-sided bounds, and weights of 2^(+-100) fit the dtype of the product."""
        added = self.mask is not None and self.mask.is_floating_point()
        added = added or self.key_term is not None or self.exclude_self
        return self.plain and not added and self.v.dtype != torch.float16

    @property
    def precision(self) -> str:
        """Of the products q.k of float32 vectors."""
        if self.v.dtype == torch.float32:
            return "ieee"
        return MIXED_PRECISION if self.mixed else "tf32"

    @property
    def mixed(self) -> bool:
        """q and k in float32 beside v in half precision."""
        return self.q is not None and self.q.dtype != self.v.dtype

    @property
    def shared(self) -> int:
        """Whether q and k are the same for all heads (1), all batch entries (2) or both (3), as
        positions are: a view that `expand` made, which kernels read in place."""
        if self.q is None or self.k is None:
            return 0

        def same(dimension: int) -> bool:
            sides = [(x.shape[dimension], x.stride(dimension)) for x in (self.q, self.k)]
            return sides[0][0] > 1 and all(n == 1 or stride == 0 for n, stride in sides)

        return int(same(1)) + 2 * int(same(0))

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """q and k `aligned`, of size 1 in the dimensions in which they are `shared`."""
        shared = self.form.shared
        if shared == 0:
            return aligned(self.q), aligned(self.k)
        batch, heads = slice(1 if shared >= 2 else None), slice(1 if shared % 2 == 1 else None)
        return aligned(self.q[batch, heads]), aligned(self.k[batch, heads])

    def flags(self) -> dict[str, Any]:
        """Compile-time arguments that all kernels share."""
        law = "table" if self.table is not None else self.law
        mask = "none"
        if self.mask is not None:
            mask = "float" if self.mask.is_floating_point() else "bool"
        return {
            "LAW": law,
            "PLAIN": self.plain,
            "LIFTED": self.key_radius_sq is not None,
            "HAS_A": self.query_mass is not None,
            "HAS_B": 0 if self.key_term is None else 1 if self.law == "force" else 2,
            "HAS_BIAS": self.head_bias is not None,
            "REPULSIVE": self.repulsive,
            "CAP": "none" if self.max_force == float("inf") else self.cap,
            "CURVED": self.kappa is not None,
            "CUTOFF": self.cutoff,
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "RANGES": self.key_ranges is not None,
            "MASK": mask,
            "EXCLUDE_SELF": self.exclude_self,
            "DROPOUT": self.dropout_p > 0,
            "SHARED": self.shared,
            "PRECISION": self.precision,
            "NATIVE": not interpreted(),
        }

    def numbers(self) -> dict[str, Any]:
        """Arguments that all kernels share and that are no tensors: run-time ones, then `flags`."""
        strides = (0, 0, 0, 0)
        lowest = 0.0
        if self.mask is not None:
            mask = self.mask[(None,) * (4 - self.mask.dim())]
            pairs = zip(mask.stride(), mask.shape, strict=True)
            strides = tuple(0 if size == 1 else stride for stride, size in pairs)
            if mask.is_floating_point():
                lowest = torch.finfo(mask.dtype).min / 2
        ranges_b, ranges_row = range_strides(self.key_ranges)
        many_tables = self.table is not None and self.table.shape[0] > 1
        return {
            "ranges_b": ranges_b,
            "ranges_row": ranges_row,
            "mask_b": strides[0],
            "mask_h": strides[1],
            "mask_row": strides[2],
            "mask_column": strides[3],
            "mask_lowest": lowest,
            "dropout": self.dropout_p,
            "shift": self.keys - self.queries,
            "window": self.window,
            "table_batch": self.queries * self.keys if many_tables else 0,
            "table_stride": self.keys,
            "width": self.width,
            "ceiling": self.max_force,
            "kappa": self.kappa or 0.0,
            "horizon": self.horizon,
            "batches": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "queries": self.queries,
            "keys": self.keys,
            **self.flags(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Those that all kernels share. An absent one is stood in for by another, which its
        compile-time flag keeps from being read."""
        strength, mask = self.strength, self.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.int8)
        return {
            "strength": strength,
            "eps": strength if self.eps is None else self.eps,
            "key_radius_sq": strength if self.key_radius_sq is None else self.key_radius_sq,
            "query_mass": strength if self.query_mass is None else self.query_mass,
            "key_term": strength if self.key_term is None else self.key_term,
            "head_bias": strength if self.head_bias is None else self.head_bias,
            "radius": strength if self.radius is None else self.radius,
            "table": strength if self.table is None else self.table,
            "ranges": strength if self.key_ranges is None else self.key_ranges,
            "mask": strength if mask is None else mask,
        }

    def tensors_by_row(self, columns: int) -> dict[str, Any]:
        """As `tensors`, of the kernels that go over keys and add up rows: the key term described as
        `[B H, T]`, and the sink."""
        found: dict[str, Any] = self.tensors()
        if self.key_term is not None:
            found["key_term"] = vectors(aligned(self.key_term), columns)
        found["sink"] = self.strength if self.sink is None else self.sink
        return found

    def heads_together(self) -> int:
        """How many query heads of all batch entries run at the same time: see CACHE_BYTES."""
        head_bytes = self.keys * self.width_v * self.v.element_size()
        if self.k is not None:
            head_bytes += self.keys * self.width_k * self.k.element_size()
        shared = max(1, CACHE_BYTES // max(1, head_bytes)) * (self.heads // self.kv_heads)
        return max(1, min(shared, self.batch * self.heads))


def range_strides(ranges: Tensor | None) -> tuple[int, int]:
    """Of key ranges `[B|1, T|1, 2]`; 0 in a dimension of size 1."""
    if ranges is None:
        return 0, 0
    steps = zip(ranges.stride()[:2], ranges.shape[:2], strict=True)
    batch, row = (0 if size == 1 else step for step, size in steps)
    return batch, row


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as the copy engine takes it: last dimension dense, rows on 16 bytes. What already
    is, views included, is not copied; a width that is not a multiple of 16 bytes is padded."""
    size = tensor.element_size()
    shape, stride = tensor.shape, tensor.stride()
    short = -shape[-1] % (ALIGNMENT // size)
    if short:
        return torch.nn.functional.pad(tensor, (0, short))
    dense = stride[-1] == 1 and tensor.data_ptr() % ALIGNMENT == 0
    for step, length in zip(stride[:-1], shape[:-1], strict=True):
        dense = dense and (length == 1 or (step > 0 and step * size % ALIGNMENT == 0))
    return tensor if dense else tensor.clone(memory_format=torch.contiguous_format)


def tiles(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A description of `[B, H, T, D]` from which kernels load `[1, 1, rows, width]`, zeros outside.
    The tensor must be `aligned`."""
    strides = list(tensor.stride())
    if 1 in tensor.shape:
        per = ALIGNMENT // tensor.element_size()
        step = -(-tensor.shape[3] // per) * per
        strides = [s if n > 1 else step for s, n in zip(strides, tensor.shape, strict=True)]
    strides[3] = 1
    return _descriptor(tensor, strides, [1, 1, rows, width])


def vectors(tensor: Tensor, length: int) -> TensorDescriptor:
    """A description of `[rows, T]`, rows on 16 bytes, from which kernels load `[1, length]`. Of a
    dense tensor all dimensions but the last are rows."""
    if tensor.dim() == 2:
        return _descriptor(tensor, list(tensor.stride()), [1, length])
    wide = tensor.shape[-1]
    return _descriptor(tensor, [wide, 1], [1, length], [tensor.numel() // wide, wide])


def _descriptor(
    tensor: Tensor, strides: list[int], block: list[int], shape: list[int] | None = None
) -> TensorDescriptor:
    """Without the constructor's checks, which hold by construction here: a call makes a dozen of
    these, and checking them takes as long as a small kernel."""
    description = object.__new__(TensorDescriptor)
    description.base, description.shape = tensor, shape or list(tensor.shape)
    description.strides, description.block_shape = strides, block
    return description


def block_of(width: int) -> int:
    """The power of two that a width is padded to inside a kernel; products need 16."""
    return max(16, 1 << (width - 1).bit_length())
