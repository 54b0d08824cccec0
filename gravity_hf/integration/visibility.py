"""Which keys each query sees, in the form that the operator skips hidden keys by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..ops.exporting import is_exporting
from .mask_patterns import MaskFunction, Pattern, find_pattern


class VisibleKeys(NamedTuple):
    """The arguments of `gravity_attention` that together say what a query sees: all must agree.

    `mask` is bool and `[B, 1, 1, Tk]` (padding with holes) or `[B, 1, Tq, Tk]` (no known pattern).
    """

    causal: bool = False
    window: int | None = None
    key_ranges: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device) -> VisibleKeys:
        ranges, mask = (None if x is None else x.to(device) for x in (self.key_ranges, self.mask))
        return VisibleKeys(self.causal, self.window, ranges, mask)

    @property
    def everything(self) -> bool:
        """Whether nothing at all is hidden."""
        rest = (self.window, self.key_ranges, self.mask)
        return not self.causal and all(part is None for part in rest)


class MaskRequest(NamedTuple):
    """What transformers asks a mask function for: see `transformers.masking_utils.sdpa_mask`.

    Query i stands at position `i + q_offset`, key j at `j + kv_offset`; `attention_mask` is bool
    `[B, seen]`, True where a token is real.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor = 0
    kv_offset: int = 0
    mask_function: MaskFunction = causal_mask_function
    attention_mask: Tensor | None = None
    use_vmap: bool = False
    device: torch.device | str = "cpu"

    @property
    def aligned(self) -> bool:
        """Whether the last query stands at the last key: not where a cache has free slots."""
        if isinstance(self.q_offset, Tensor):
            return False
        return self.q_offset + self.q_length == self.kv_offset + self.kv_length

    def dense(self) -> Tensor:
        """Bool `[B, 1, Tq, Tk]`."""
        arguments: dict[str, Any] = self._asdict()
        return sdpa_mask(**arguments, allow_is_causal_skip=False)


def read_visible_keys(request: MaskRequest, check: bool) -> VisibleKeys | None:
    """The visible keys of a request without its dense mask; None if its pattern is not known.

    Args:
        request: what transformers asks for.
        check: look at the padding's values, which waits for the device once; without it padding is
            taken to have holes.
    """
    pattern = None if request.use_vmap else find_pattern(request.mask_function)
    if pattern is None or not _fits(request, pattern):
        return None
    pattern = _without_idle_bounds(request, pattern)
    padding = _padding_mask(request)
    ranges, holes = (None, None) if padding is None else _padding(padding, check)
    flags = _flags(request, pattern)
    if flags is None:
        ranges = _intersection(ranges, _position_ranges(request, pattern))
    if pattern.documents is not None:
        ranges = _intersection(ranges, _document_ranges(pattern.documents))
    causal, window = flags or (False, None)
    return VisibleKeys(causal, window, ranges, holes)


def dense_visible_keys(visible: Tensor) -> VisibleKeys:
    """A dense bool mask `[B, 1, Tq, Tk]`, with ranges that hold all it shows, for skipping."""
    if is_exporting():
        # A program skips nothing, and other runtimes have no running minimum.
        return VisibleKeys(mask=visible)
    return VisibleKeys(key_ranges=_hull(visible[:, 0]), mask=visible)


def _fits(request: MaskRequest, pattern: Pattern) -> bool:
    """Whether the request has the form in which the pattern's reading is known to be right."""
    if isinstance(request.kv_offset, Tensor):
        return False
    mask, documents = request.attention_mask, pattern.documents
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != request.batch_size):
        return False
    if documents is None:
        return True
    # Documents are numbered for whole sequences, never for the rest of a cached one.
    whole = request.aligned and request.q_length == request.kv_length == documents.shape[-1]
    return whole and documents.shape[0] in (1, request.batch_size)


def _without_idle_bounds(request: MaskRequest, pattern: Pattern) -> Pattern:
    """The pattern without bounds that hide no key of this request."""
    # Symbolic lengths of a traced graph are not compared: each comparison narrows the graph.
    if torch.compiler.is_compiling() or isinstance(request.q_offset, Tensor):
        return pattern
    first = request.q_offset - request.kv_offset
    behind, ahead = pattern.behind, pattern.ahead
    if behind is not None and behind >= first + request.q_length - 1:
        behind = None
    if behind is None and ahead is not None and first + ahead >= request.kv_length - 1:
        ahead = None
    return pattern._replace(behind=behind, ahead=ahead)


def _flags(request: MaskRequest, pattern: Pattern) -> tuple[bool, int | None] | None:
    """`causal` and `window` of the operator where these two say the pattern's bounds, else None."""
    behind, ahead = pattern.behind, pattern.ahead
    if behind is None and ahead is None:
        return False, None
    if not request.aligned or ahead not in (0, behind):
        return None
    return ahead == 0, None if behind is None else behind + 1


def _position_ranges(request: MaskRequest, pattern: Pattern) -> Tensor:
    """Key ranges `[1, Tq, 2]` of the pattern's bounds, wherever the queries stand."""
    first = request.q_offset - request.kv_offset
    position = torch.arange(request.q_length, device=request.device) + first
    keys = request.kv_length
    start = torch.zeros_like(position) if pattern.behind is None else position - pattern.behind
    stop = (
        torch.full_like(position, keys) if pattern.ahead is None else position + pattern.ahead + 1
    )
    ranges = torch.stack([start, stop], -1).clamp(min=0, max=keys)
    return ranges.to(torch.int32)[None]


def _document_ranges(documents: Tensor) -> Tensor:
    """Key ranges `[B, T, 2]`: the first and one past the last token of each token's document."""
    documents = documents.contiguous()
    start = torch.searchsorted(documents, documents, out_int32=True)
    stop = torch.searchsorted(documents, documents, right=True, out_int32=True)
    return torch.stack([start, stop], -1)


def _intersection(one: Tensor | None, other: Tensor) -> Tensor:
    if one is None:
        return other
    start = torch.maximum(one[..., 0], other[..., 0])
    stop = torch.minimum(one[..., 1], other[..., 1])
    return torch.stack([start, torch.maximum(start, stop)], -1)


def _padding_mask(request: MaskRequest) -> Tensor | None:
    """Bool `[B, Tk]`; slots of a cache that the 2-D mask does not reach are hidden."""
    mask = request.attention_mask
    if mask is None:
        return None
    missing = request.kv_length + request.kv_offset - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    return mask[:, request.kv_offset : request.kv_offset + request.kv_length].bool()


def _padding(real: Tensor, check: bool) -> tuple[Tensor | None, Tensor | None]:
    """Key ranges `[B, 1, 2]` from the first to the last real token, and `[B, 1, 1, Tk]` where there
    are holes between. With `check` both are None where they would hide nothing more."""
    keys = real.shape[1]
    index = torch.arange(keys, dtype=torch.int32, device=real.device)
    stop = torch.where(real, index + 1, 0).amax(-1)
    start = torch.minimum(torch.where(real, index, keys).amin(-1), stop)
    ranges = torch.stack([start, stop], -1)[:, None]
    if not check:
        return ranges, real[:, None, None]
    count = real.sum(-1)
    # 0: every token is real; 1: padding at the ends only; 2: holes.
    kind = ((count < keys).any().int() + (count != stop - start).any().int()).item()
    return ranges if kind else None, real[:, None, None] if kind == 2 else None


def _hull(visible: Tensor) -> Tensor:
    """The narrowest key ranges `[B|1, Tq, 2]` in order that hold what `[B, Tq, Tk]` shows."""
    if visible.stride(0) == 0:
        visible = visible[:1]
    keys = visible.shape[-1]
    seen = visible.to(torch.uint8)
    some = visible.any(-1)
    # Of several largest values argmax gives the first.
    start = torch.where(some, seen.argmax(-1), keys)
    stop = torch.where(some, keys - seen.flip(-1).argmax(-1), 0)
    start = start.flip(-1).cummin(-1).values.flip(-1)
    stop = torch.maximum(start, stop.cummax(-1).values)
    return torch.stack([start, stop], -1).to(torch.int32)
