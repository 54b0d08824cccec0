"""transformers' mask functions read as patterns: how far a query sees, and in which document.

A mask function is a closure that answers for one pair of positions. The ones that transformers
composes itself are known by their code object and taken apart by their closure variables; on first
use the readings are compared with transformers' own dense masks. Everything else is no pattern.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils import logging

logger = logging.get_logger(__name__)

MaskFunction = Callable[..., Any]


class Pattern(NamedTuple):
    """Query at position p sees keys `p - behind <= j <= p + ahead`; None: no bound on that side.

    `documents` `[B, T]`: numbers that do not decrease along a row; a token sees its own number.
    """

    behind: int | None = None
    ahead: int | None = None
    documents: Tensor | None = None


def find_pattern(function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function; None if it is not one that can be read with certainty."""
    # Closures made inside a traced graph cannot be opened there.
    if torch.compiler.is_compiling() or not _readings_hold():
        return _named(function)
    return _read(function)


def _named(function: MaskFunction) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return Pattern(ahead=0)
    return Pattern() if function is masking_utils.bidirectional_mask_function else None


def _read(function: MaskFunction) -> Pattern | None:
    code = getattr(function, "__code__", None)
    reader = _readers().get(code) if isinstance(code, CodeType) else None
    if reader is None:
        return _named(function)
    return reader(**inspect.getclosurevars(function).nonlocals)


def _both(mask_functions: tuple[MaskFunction, ...]) -> Pattern | None:
    result = Pattern()
    for function in mask_functions:
        part = _read(function)
        if part is None or (part.documents is not None and result.documents is not None):
            return None
        result = Pattern(
            _nearest(result.behind, part.behind),
            _nearest(result.ahead, part.ahead),
            result.documents if part.documents is None else part.documents,
        )
    return result


def _within_documents(mask_function: MaskFunction, position_ids: Tensor) -> Pattern | None:
    # Positions count up by one inside a document, so that differences of positions are differences
    # of indices there; transformers always adds the documents of the same positions.
    return _read(mask_function)


def _nearest(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@functools.cache
def _readers() -> dict[CodeType, Callable[..., Pattern | None]]:
    """Readers by the code of the closures they read; they take the closure's variables by name."""
    token = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    utils = masking_utils
    readers: dict[CodeType, Callable[..., Pattern | None]] = {
        utils.and_masks().__code__: _both,
        utils.sliding_window_overlay(1).__code__: lambda sliding_window: Pattern(
            behind=sliding_window - 1
        ),
        utils.sliding_window_bidirectional_overlay(1).__code__: lambda sliding_window: Pattern(
            behind=sliding_window, ahead=sliding_window
        ),
        utils.packed_sequence_mask_function(token).__code__: lambda packed_sequence_mask: Pattern(
            documents=packed_sequence_mask
        ),
    }
    if hasattr(utils, "remap_positions_for_packed_sequence"):  # transformers 5.18 and later
        remapped = utils.remap_positions_for_packed_sequence(utils.causal_mask_function, token)
        readers[remapped.__code__] = _within_documents
    return readers


@functools.cache
def _readings_hold() -> bool:
    """Whether this version of transformers means by its mask functions what is read from them."""
    try:
        holds = all(_reading_equals(function) for function in _samples())
    except Exception:  # another version's functions may take other arguments
        holds = False
    if not holds:
        logger.warning(
            "gravity_hf: this version of transformers builds its masks in a way that is not known; "
            "sliding windows and packed sequences are right, but slower than they could be"
        )
    return holds


def _samples() -> Iterator[MaskFunction]:
    utils = masking_utils
    yield utils.causal_mask_function
    yield utils.bidirectional_mask_function
    yield utils.sliding_window_causal_mask_function(3)
    yield utils.sliding_window_bidirectional_mask_function(2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]], device="cpu")
    documents = utils.packed_sequence_mask_function(
        torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]], device="cpu")
    )
    remap = getattr(utils, "remap_positions_for_packed_sequence", lambda function, _: function)
    for inner in (utils.causal_mask_function, utils.sliding_window_causal_mask_function(2)):
        yield utils.and_masks(remap(inner, positions), documents)


def _reading_equals(function: MaskFunction) -> bool:
    pattern = _read(function)
    if pattern is None:
        return False
    with torch.no_grad():
        ahead = torch.arange(8, device="cpu") - torch.arange(8, device="cpu")[:, None]
        visible = torch.ones(8, 8, dtype=torch.bool, device="cpu")
        if pattern.behind is not None:
            visible = visible & (ahead >= -pattern.behind)
        if pattern.ahead is not None:
            visible = visible & (ahead <= pattern.ahead)
        if pattern.documents is not None:
            visible = visible & (pattern.documents[0] == pattern.documents[0][:, None])
        expected = masking_utils.sdpa_mask(
            batch_size=1,
            q_length=8,
            kv_length=8,
            mask_function=function,
            allow_is_causal_skip=False,
            device="cpu",
        )
        return torch.equal(visible, expected[0, 0])
