"""Which rows of a batch go through which low-rank maps, for one thread or task at a time.

A hook on a shared model must not see the rows of another request. The routes therefore live in a
`contextvars.ContextVar`: every thread and every asyncio task has its own, and a new thread starts
without any.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import ValidationError
from .targets import is_linear

Weighted = tuple[str, float]  # an id and the weight of its delta


class RowGroup(NamedTuple):
    """Rows whose deltas have the same total rank `k` at one module.

    Args:
        rows: `[g]` int64, positions among the route's rows.
        A: `[g, k, in]`, the factors of a row's deltas one after the other.
        B: `[g, k, out]`, transposed and with the weights multiplied in.
    """

    rows: Tensor
    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class Route:
    """What to add where during the calls of one `with` block.

    Args:
        count: of rows; a batch has a multiple of them (beams, sequences returned), each row's
            copies beside each other.
        groups: module's name -> rows with deltas there.
        positions: bool `[count, T]`, the tokens that get the update; None for all.
    """

    count: int
    groups: Mapping[str, Sequence[RowGroup]]
    positions: Tensor | None = None


# Owner -> route. Never changed in place: what another context has stays what it was.
_ROUTES: ContextVar[Mapping[int, Route | None]] = ContextVar(
    "gravity_hf_routes",
    default=MappingProxyType({}),  # noqa: B039
)


def current_route(owner: object) -> Route | None:
    """The route that `owner` has in this thread or task."""
    return _ROUTES.get().get(id(owner))


@contextmanager
def routing(owner: object, route: Route | None) -> Iterator[None]:
    """Give `owner` a route in this thread or task; None takes it away. The last one counts."""
    token = _ROUTES.set({**_ROUTES.get(), id(owner): route})
    try:
        yield
    finally:
        _ROUTES.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: computes again under the routes of the first time.

    A backward pass on a GPU runs in a thread of its own, which has no routes.
    """
    return nullcontext(), _restored(_ROUTES.get())


@contextmanager
def _restored(routes: Mapping[int, Route | None]) -> Iterator[None]:
    token = _ROUTES.set(routes)
    try:
        yield
    finally:
        _ROUTES.reset(token)


def canonical_rows(
    rows: Sequence[str] | Sequence[Sequence[str]],
    weights: Sequence[float] | Sequence[Sequence[float]] | None,
) -> list[list[Weighted]]:
    """Rows as lists of `(id, weight)`, sorted by id, so that the order given changes no bit.

    Raises:
        ValidationError: no rows, an id twice in a row, or weights that are not one to an id.
    """
    listed = [[row] if isinstance(row, str) else list(row) for row in rows]
    if not listed:
        raise ValidationError("rows: expected one entry for each row of the batch, got none")
    if weights is None:
        scales = [[1.0] * len(row) for row in listed]
    else:
        scales = [[w] if isinstance(w, int | float) else list(w) for w in weights]
    if [len(row) for row in listed] != [len(row) for row in scales]:
        raise ValidationError(
            f"weights: expected one for each id, in rows of {[len(row) for row in listed]}, got "
            f"{[len(row) for row in scales]}"
        )
    for row in listed:
        if len(set(row)) < len(row):
            raise ValidationError(f"rows: expected every id once in a row, got {row}. Use weights")
    return [
        sorted((name, float(w)) for name, w in zip(row, scale, strict=True))
        for row, scale in zip(listed, scales, strict=True)
    ]


def add_low_rank(x: Tensor, y: Tensor, route: Route, name: str) -> Tensor:
    """`y + B (A x)` where the route has deltas for the module `name`; elsewhere `y`, bit for bit.

    Args:
        x: `[batch, T, in]`, or `[batch * T, in]` with the tokens of a row beside each other.
        y: the module's output on `x`, `[..., out]`.

    Returns:
        Shape and dtype of `y`; the update is computed in float32 (float64 where `x` is), also
        under autocast, and added before the one rounding.

    Raises:
        ValidationError: the batch is no multiple of the route's rows, or `positions` are for
            another number of tokens.
    """
    groups = route.groups.get(name)
    if not groups:
        return y
    if x.shape[0] % route.count:
        raise ValidationError(
            f"routed: expected a batch of {route.count} rows or a multiple of it, got "
            f"{x.shape[0]} rows at {name}. Pass one entry for each row of the batch"
        )
    rows, outputs = _by_row(x, route.count), _by_row(y, route.count)
    where = None if route.positions is None else _positions(route.positions, x, name)
    with _without_autocast(x.device.type):
        for group in groups:
            outputs = _add_group(rows, outputs, group, route.count, where)
    return outputs.reshape(y.shape)


def _by_row(tensor: Tensor, count: int) -> Tensor:
    """`[count, beams * T, features]`: copies of a row are beside each other, so they join it."""
    return tensor.reshape(count, -1, tensor.shape[-1])


def _add_group(x: Tensor, y: Tensor, group: RowGroup, count: int, where: Tensor | None) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    index, A, B = (part.to(x.device) for part in group)
    whole = len(index) == count
    x, old = (x, y) if whole else (x.index_select(0, index), y.index_select(0, index))
    update = torch.bmm(torch.bmm(x.to(kind), A.to(kind).mT), B.to(kind))
    new = (old + update).to(y.dtype)
    if where is not None:
        new = torch.where(where if whole else where.index_select(0, index), new, old)
    return new if whole else y.index_copy(0, index, new)


def _positions(positions: Tensor, x: Tensor, name: str) -> Tensor:
    """The mask for the copies of each row too, `[count, beams * T, 1]`."""
    count, length = positions.shape
    tokens = x.numel() // x.shape[-1] // count
    if tokens % length or (x.ndim > 2 and x.shape[1] != length):
        raise ValidationError(
            f"positions: expected a mask for the tokens of each call, got one for {length} tokens "
            f"where {name} has {x.shape[1] if x.ndim > 2 else tokens}. They are for one forward "
            "call: generate without them"
        )
    return positions.to(x.device).repeat(1, tokens // length).unsqueeze(-1)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def innermost(module: nn.Module) -> nn.Module:
    """The map itself, under what peft wrapped around it: it stays when adapters come and go."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def hooked(owner: object, name: str, module: nn.Module) -> RemovableHandle:
    """Let `module` add what the routes of `owner` say for `name`, until the handle is removed.

    A linear map adds `B A` of its input; a decoder block `B A` of its own output, which is the
    residual stream after it.
    """
    if is_linear(module):
        call = functools.partial(_on_linear, owner, name)
        return innermost(module).register_forward_hook(call)
    return module.register_forward_hook(functools.partial(_on_block, owner, name))


def _on_linear(
    owner: object, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor | None:
    route = current_route(owner)
    return None if route is None else add_low_rank(args[0], output, route, name)


def _on_block(owner: object, name: str, module: nn.Module, args: object, output: Any) -> Any:
    route = current_route(owner)
    if route is None:
        return None
    if isinstance(output, tuple):
        return (add_low_rank(output[0], output[0], route, name), *output[1:])
    return add_low_rank(output, output, route, name)
