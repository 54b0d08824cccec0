"""Where tokens stand: one table of distances for all layers and heads of a forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.distance import inverse_distance, squared_distances
from ...layers.positions import CurvedPositionEmbedding, FractalPositionEmbedding
from ...ops.curvature import Curvature
from ...ops.distances import inverse_distances
from ...ops.reference import compute_dtype
from ..visibility import Visibility, is_traced
from .law import Law
from .placing import Tokens

# Above this many keys distances are computed block by block from the positions themselves. So they
# are from fewer keys on where the batch is small: a table must not outweigh what the sequences need
# anyway, per sequence about the memory of a table of this many keys.
TABLE_KEYS = 4096
_KEYS_PER_SEQUENCE = 2048
# From about this many keys on a table is made faster in blocks that stay in the caches.
_KEYS_IN_BLOCKS = 256
# On a GPU in half precision the kernels compute distances as fast as they read them.
TABLE_KEYS_CUDA = 1024
_HALF = (torch.bfloat16, torch.float16)
# Of these the points are a function of the parameters and buffers alone.
_KNOWN = (CurvedPositionEmbedding.forward, FractalPositionEmbedding.forward)


class Geometry(NamedTuple):
    """What all layers of one forward share.

    table: `R = 1 / D`, `[Tq, Tk]` or `[B, 1, Tq, Tk]`; or else queries and keys: positions
    `[b, 1, T, P]`, with `curvature` and `eps` of the distance between them. stored: position ids of
    the queries `[b, Tq]`, which a cache keeps.
    """

    table: Tensor | None
    queries: Tensor | None
    keys: Tensor | None
    curvature: Curvature | None
    eps: float | None
    visible: Visibility
    stored: Tensor | None

    def distance_options(self, batch: int, heads: int) -> tuple[Tensor | None, Tensor | None, dict]:
        """`q`, `k` and the keyword arguments of `gravity_attention` that say where tokens are."""
        if self.table is not None:
            return None, None, {"eps": None, "inverse_distance": self.table}
        q, k = (x.expand(batch, heads, -1, -1) for x in (self.queries, self.keys))
        return q, k, {"eps": self.eps, "curvature": self.curvature}

    def inverse_rows(self, rows: Tensor) -> Tensor:
        """`R` of the query rows with these indices: `[b, 1, R, Tk]`."""
        if self.table is not None:
            table = self.table if self.table.dim() == 4 else self.table[None, None]
            return table[:, :, rows]
        distance = squared_distances(self.queries[:, :, rows], self.keys)
        if self.curvature is not None:
            distance = self.curvature.distance(distance)
        return (distance + self.eps).reciprocal()


class TableCache:
    """The table of inverse distances of a model in evaluation, kept from forward to forward.

    It is made anew when anything it depends on has another value: positions, constants of space,
    device or dtype. An embedding that something has been wrapped around, such as an adapter, which
    may be switched off, is asked for its points every time.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._table: Tensor | None = None
        self._made_of: tuple[Tensor, ...] = ()
        self._space: tuple[float, ...] = ()

    def get(self, embedding: nn.Module, law: Law, length: int) -> Tensor:
        """`[n, n]` with `n >= length`."""
        limit = law.max_position_embeddings
        space = (law.curvature, law.event_horizon, law.softening, law.length_unit)
        if not self._fits(embedding, space, limit, length):
            # Room to grow: a generated token must not cost a table.
            room = min(limit, 1 << (length - 1).bit_length())
            with torch.no_grad():
                self._table = table_between(embedding(room), None, law)
            self._made_of = tuple(x.detach().clone() for x in _made_of(embedding, limit, room))
            self._space = space
        return self._table

    def _fits(
        self, embedding: nn.Module, space: tuple[float, ...], limit: int, length: int
    ) -> bool:
        table = self._table
        if table is None or len(table) < length or space != self._space:
            return False
        # What was made in inference mode no gradient may pass by.
        if table.is_inference() and not torch.is_inference_mode_enabled():
            return False
        parts = _made_of(embedding, limit, len(table))
        # Values are compared, not versions: `parameter.data` can be written without leaving one.
        return len(parts) == len(self._made_of) and all(map(_is_same, parts, self._made_of))


def _rows(tensor: Tensor, limit: int, room: int) -> Tensor:
    """What the first `room` of `limit` positions depend on: rows of what has one for each."""
    return tensor[:room] if tensor.dim() == 2 and tensor.shape[0] == limit else tensor


def _is_same(a: Tensor, b: Tensor) -> bool:
    known = a.device == b.device and a.dtype == b.dtype and a.shape == b.shape
    return known and torch.equal(a, b)


def _made_of(embedding: nn.Module, limit: int, room: int) -> tuple[Tensor, ...]:
    """What the first `room` of `limit` positions are a function of."""
    hooks = embedding._forward_hooks or embedding._forward_pre_hooks
    wrapped = hooks or embedding._modules or "forward" in vars(embedding)
    if type(embedding).forward in _KNOWN and not wrapped:
        # Cheaper to compare than the points are to compute.
        tensors = (*embedding.parameters(), *embedding.buffers())
        return tuple(_rows(x, limit, room) for x in tensors)
    with torch.no_grad():
        return (embedding(room),)


def table_between(queries: Tensor, keys: Tensor | None, law: Law) -> Tensor:
    """`R = 1 / D` between positions of the embedding `[..., T, P]`; keys None: the same ones."""
    queries = _scaled(queries, law)
    return _inverse(queries, queries if keys is None else _scaled(keys, law), law)


def geometry_of_places(
    embedding: nn.Module,
    cache: TableCache | None,
    law: Law,
    tokens: Tokens,
    values: Tensor,
    table_needed: bool,
) -> Geometry:
    """The geometry of tokens that stand at positions of the model.

    Args:
        embedding: the model's positions.
        cache: where tables are kept; None where their gradient is needed.
        tokens: where they stand.
        values: `[B, Tq, d]`, of the device and dtype that attention will have.
        table_needed: whoever asks wants weights, which come from a table.
    """
    places, key_places, stored, visible = tokens
    length = values.shape[1]
    keys = length if places is None else (places if key_places is None else key_places).shape[-1]
    if not table_needed and _prefers_positions(values, keys, places):
        near = _scaled(embedding(length if places is None else places), law)
        far = near if key_places is None else _scaled(embedding(key_places), law)
        near, far = (x.expand(1, *x.shape) if x.dim() == 2 else x for x in (near, far))
        near, far = (x.unsqueeze(1) for x in (near, far))
        return _between(near, far, law, values.dtype, visible, stored)
    if cache is None:
        near = embedding(length if places is None else places)
        far = None if key_places is None else embedding(key_places)
        return _with_table(table_between(near, far, law), visible, stored)
    if places is None:
        table = cache.get(embedding, law, length)
        table = table if len(table) == length else table[:length, :length]
        return _with_table(table, visible, stored)
    key_places = places if key_places is None else key_places
    highest = int(torch.maximum(places.max(), key_places.max()))
    table = cache.get(embedding, law, highest + 1)
    return _with_table(table[places[:, :, None], key_places[:, None]], visible, stored)


def geometry_of_positions(
    positions: Tensor,
    law: Law,
    visible: Visibility,
    values: Tensor,
    table_needed: bool,
) -> Geometry:
    """The geometry of tokens at given positions `[T, P]` or `[B, T, P]`, any P."""
    if not table_needed and _prefers_positions(values, positions.shape[-2], None):
        near = (positions if positions.dim() == 3 else positions[None]).unsqueeze(1)
        return _between(near, near, law, values.dtype, visible, None)
    # Unlike the model's own, given points may lie close together in a wide space.
    table = inverse_distance(
        squared_distances(positions, positions, exact=True),
        curvature=law.curvature,
        event_horizon=law.event_horizon,
        softening=law.softening,
    )
    return _with_table(table, visible, None)


def _inverse(queries: Tensor, keys: Tensor, law: Law) -> Tensor:
    """`R` between points `[..., T, P]`, scaled already."""
    curvature, horizon, softening = law.curvature, law.event_horizon, law.softening
    # In a graph lengths may be symbols, which nothing may compare.
    if is_traced() or keys.shape[-2] < _KEYS_IN_BLOCKS or horizon == 0:
        return inverse_distance(
            squared_distances(queries, keys),
            curvature=curvature,
            event_horizon=horizon,
            softening=softening,
        )
    lead = torch.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
    queries, keys = (x.expand(*lead, *x.shape[-2:]) for x in (queries, keys))
    if curvature == 0:
        return inverse_distances(queries, keys, eps=horizon + softening)
    return inverse_distances(queries, keys, eps=softening, curvature=Curvature(curvature, horizon))


def _scaled(positions: Tensor, law: Law) -> Tensor:
    unit = law.length_unit
    return positions if unit == 1.0 else positions * unit


def _with_table(table: Tensor, visible: Visibility, stored: Tensor | None) -> Geometry:
    if table.dim() == 3:
        table = table[0] if table.shape[0] == 1 else table.unsqueeze(1)
    return Geometry(table, None, None, None, None, visible, stored)


def _between(
    near: Tensor,
    far: Tensor,
    law: Law,
    dtype: torch.dtype,
    visible: Visibility,
    stored: Tensor | None,
) -> Geometry:
    """Of points `[b, 1, T, P]`, as `dtype`."""
    exact = compute_dtype(far.dtype)
    # Far from the origin a product of points says little about their difference.
    centre = far.detach().to(exact).mean(-2, keepdim=True)
    near, far = ((x.to(exact) - centre).to(dtype) for x in (near, far))
    horizon, softening = law.event_horizon, law.softening
    if law.curvature == 0:
        return Geometry(None, near, far, None, horizon + softening, visible, stored)
    curvature = Curvature(law.curvature, horizon)
    return Geometry(None, near, far, curvature, softening, visible, stored)


def _prefers_positions(values: Tensor, keys: int, places: Tensor | None) -> bool:
    """Whether distances are better computed as they are needed."""
    if is_traced():
        # A graph must not compare its symbolic lengths, which would split their range.
        return False
    if values.device.type == "cuda" and values.dtype in _HALF:
        batched = places is not None and places.shape[0] > 1 and places.shape[1] > 1
        return batched or keys > TABLE_KEYS_CUDA
    return keys > min(TABLE_KEYS, _KEYS_PER_SEQUENCE * values.shape[0])
