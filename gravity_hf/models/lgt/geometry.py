"""Where tokens stand: one table of distances for all layers and heads of a forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.distance import inverse_distance, squared_distances
from ...ops.curvature import Curvature
from .configuration_lgt import LGTConfig
from .placing import Tokens
from .visibility import Visibility, is_traced

# Above this many keys distances are computed block by block from the positions themselves. So they
# are from fewer keys on where the batch is small: a table must not outweigh what the sequences need
# anyway, per sequence about the memory of a table of this many keys, with its gradient or without.
TABLE_KEYS = 4096
_KEYS_TRAINING, _KEYS_EVALUATION = 512, 2048
# On a GPU in half precision the kernels compute distances as fast as they read them.
TABLE_KEYS_CUDA = 1024
_HALF = (torch.bfloat16, torch.float16)


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
    device or dtype.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._table: Tensor | None = None
        self._made_of: tuple[Tensor, ...] = ()
        self._space: tuple[float, ...] = ()

    def get(self, embedding: nn.Module, config: LGTConfig, length: int) -> Tensor:
        """`[n, n]` with `n >= length`."""
        tensors = (*embedding.parameters(), *embedding.buffers())
        space = (config.curvature, config.event_horizon, config.softening, config.length_unit)
        if self._table is None or len(self._table) < length or not self._fits(tensors, space):
            # Room to grow: a generated token must not cost a table.
            room = min(config.max_position_embeddings, 1 << (length - 1).bit_length())
            with torch.no_grad():
                self._table = table_between(embedding(room), None, config)
            self._made_of = tuple(x.detach().clone() for x in tensors)
            self._space = space
        return self._table

    def _fits(self, tensors: tuple[Tensor, ...], space: tuple[float, ...]) -> bool:
        # Values are compared, not versions: `parameter.data` can be written without leaving one.
        return space == self._space and all(
            a.device == b.device and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(tensors, self._made_of, strict=True)
        )


def table_between(queries: Tensor, keys: Tensor | None, config: LGTConfig) -> Tensor:
    """`R = 1 / D` between positions of the embedding `[..., T, P]`; keys None: the same ones."""
    queries = _scaled(queries, config)
    keys = queries if keys is None else _scaled(keys, config)
    return _inverse(squared_distances(queries, keys), config)


def geometry_of_places(
    embedding: nn.Module,
    cache: TableCache | None,
    config: LGTConfig,
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
    if not table_needed and _prefers_positions(values, keys, places, cache is not None):
        near = _scaled(embedding(length if places is None else places), config)
        far = near if key_places is None else _scaled(embedding(key_places), config)
        near, far = (x.expand(1, *x.shape) if x.dim() == 2 else x for x in (near, far))
        near, far = (x.to(values.dtype).unsqueeze(1) for x in (near, far))
        return _between(near, far, config, visible, stored)
    if cache is None:
        near = embedding(length if places is None else places)
        far = None if key_places is None else embedding(key_places)
        return _with_table(table_between(near, far, config), visible, stored)
    if places is None:
        table = cache.get(embedding, config, length)[:length, :length]
        return _with_table(table, visible, stored)
    key_places = places if key_places is None else key_places
    highest = int(torch.maximum(places.max(), key_places.max()))
    table = cache.get(embedding, config, highest + 1)
    return _with_table(table[places[:, :, None], key_places[:, None]], visible, stored)


def geometry_of_positions(
    positions: Tensor,
    config: LGTConfig,
    visible: Visibility,
    values: Tensor,
    table_needed: bool,
) -> Geometry:
    """The geometry of tokens at given positions `[T, P]` or `[B, T, P]`, any P."""
    if not table_needed and _prefers_positions(values, positions.shape[-2], None, False):
        near = positions.to(values.dtype)
        near = (near if near.dim() == 3 else near[None]).unsqueeze(1)
        return _between(near, near, config, visible, None)
    table = _inverse(squared_distances(positions, positions), config)
    return _with_table(table, visible, None)


def _inverse(squared: Tensor, config: LGTConfig) -> Tensor:
    return inverse_distance(
        squared,
        curvature=float(config.curvature),
        event_horizon=float(config.event_horizon),
        softening=float(config.softening),
    )


def _scaled(positions: Tensor, config: LGTConfig) -> Tensor:
    unit = config.length_unit
    return positions if unit == 1.0 else positions * unit


def _with_table(table: Tensor, visible: Visibility, stored: Tensor | None) -> Geometry:
    if table.dim() == 3:
        table = table[0] if table.shape[0] == 1 else table.unsqueeze(1)
    return Geometry(table, None, None, None, None, visible, stored)


def _between(
    near: Tensor, far: Tensor, config: LGTConfig, visible: Visibility, stored: Tensor | None
) -> Geometry:
    horizon, softening = float(config.event_horizon), float(config.softening)
    if config.curvature == 0:
        return Geometry(None, near, far, None, horizon + softening, visible, stored)
    curvature = Curvature(float(config.curvature), horizon)
    return Geometry(None, near, far, curvature, softening, visible, stored)


def _prefers_positions(values: Tensor, keys: int, places: Tensor | None, fixed: bool) -> bool:
    """Whether distances are better computed as they are needed; `fixed`: a table may be kept."""
    if is_traced():
        # A graph must not compare its symbolic lengths, which would split their range.
        return False
    if values.device.type == "cuda" and values.dtype in _HALF:
        batched = places is not None and places.shape[0] > 1 and places.shape[1] > 1
        return batched or keys > TABLE_KEYS_CUDA
    per_sequence = _KEYS_EVALUATION if fixed else _KEYS_TRAINING
    return keys > min(TABLE_KEYS, per_sequence * values.shape[0])
