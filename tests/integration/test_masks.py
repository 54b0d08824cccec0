"""A mask is what transformers' eager mask is, and remembers what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import eager_mask

from gravity_hf.integration import mask_patterns
from gravity_hf.integration.masks import DeferredMask, gravity_mask, ordinary, visible_keys_of
from gravity_hf.integration.visibility import VisibleKeys
from gravity_hf.ops.reference import visible_keys

PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
}


def shown_by(visible: VisibleKeys, queries: int, keys: int) -> Tensor:
    """Bool `[B|1, 1, Tq, Tk]`, by the operator's own definition."""
    shown = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    positions = visible_keys(
        queries,
        keys,
        causal=visible.causal,
        window=visible.window,
        key_ranges=visible.key_ranges,
    )
    for part in (positions, visible.mask):
        shown = shown if part is None else shown & part
    return shown


def assert_says_what_eager_says(arguments: dict[str, Any]) -> VisibleKeys:
    expected = eager_mask(**arguments)
    mask = gravity_mask(**arguments)
    visible = visible_keys_of(mask)
    shown = shown_by(visible, arguments["q_length"], arguments["kv_length"])
    assert torch.equal(shown.expand_as(expected), expected == 0)
    assert torch.equal(ordinary(mask), expected) and mask.shape == expected.shape
    return visible


def padded(*rows: str) -> Tensor:
    """2-D masks written as `"0111"`."""
    return torch.tensor([[token == "1" for token in row] for row in rows])


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """What models ask for with every kind of cache: whole sequences, parts and steps."""
    queries, behind = draw(st.integers(1, 7)), draw(st.integers(0, 7))
    free, offset = draw(st.integers(0, 4)), draw(st.integers(0, behind))
    keys = behind - offset + queries + free
    mask = None
    if draw(st.booleans()):
        length = draw(st.sampled_from([behind + queries, behind + queries + free]))
        row = st.lists(st.booleans(), min_size=length, max_size=length)
        mask = torch.tensor([draw(row), draw(row)])
    start = torch.tensor(behind) if draw(st.booleans()) else behind
    return {
        "batch_size": 2,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": start,
        "kv_offset": offset,
        "mask_function": PATTERNS[draw(st.sampled_from(sorted(PATTERNS)))],
        "attention_mask": mask,
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
    }


@given(requests())
def test_every_request_is_said_as_eager_attention_says_it(arguments):
    visible = assert_says_what_eager_says(arguments)
    # A dense mask is never needed for these: at most one row of holes per batch entry.
    assert visible.mask is None or visible.mask.shape[2] == 1
    ranges = visible.key_ranges
    if ranges is not None:
        assert ranges.dtype == torch.int32 and (ranges[..., 1] >= ranges[..., 0]).all()
        assert ranges.shape[1] == 1 or (ranges.diff(dim=1) >= 0).all()


WHOLE = {"batch_size": 2, "q_length": 6, "kv_length": 6}
FULL, LEFT, RIGHT = (
    padded("111111", "111111"),
    padded("001111", "111111"),
    padded("111100", "1" * 6),
)
HOLES = padded("010111", "111111")


@pytest.mark.parametrize("pattern, mask, causal, window, ranges, holes", [
    ("causal", None, True, None, None, False),
    ("causal", FULL, True, None, None, False),
    ("causal", LEFT, True, None, [[[2, 6]], [[0, 6]]], False),
    ("causal", RIGHT, True, None, [[[0, 4]], [[0, 6]]], False),
    ("causal", HOLES, True, None, [[[1, 6]], [[0, 6]]], True),
    ("bidirectional", FULL, False, None, None, False),
    ("bidirectional", RIGHT, False, None, [[[0, 4]], [[0, 6]]], False),
    ("sliding", LEFT, True, 3, [[[2, 6]], [[0, 6]]], False),
    ("sliding both ways", None, False, 3, None, False),
])  # fmt: skip
def test_a_whole_sequence_is_said_in_the_fewest_words(pattern, mask, causal, window, ranges, holes):
    arguments = {**WHOLE, "mask_function": PATTERNS[pattern], "attention_mask": mask}
    visible = assert_says_what_eager_says(arguments)
    assert (visible.causal, visible.window) == (causal, window)
    assert (visible.key_ranges is None) == (ranges is None)
    assert ranges is None or visible.key_ranges.tolist() == ranges
    assert (visible.mask is not None) == holes


def test_a_window_or_a_diagonal_that_hides_nothing_is_not_mentioned():
    step = {"batch_size": 2, "q_length": 1, "kv_length": 3, "q_offset": 2}
    wide = masking_utils.sliding_window_causal_mask_function(3)
    for function in (masking_utils.causal_mask_function, wide):
        assert assert_says_what_eager_says({**step, "mask_function": function}).everything
    wide = masking_utils.sliding_window_causal_mask_function(6)
    assert assert_says_what_eager_says({**WHOLE, "mask_function": wide}) == VisibleKeys(causal=True)


def test_a_step_into_a_static_cache_reads_the_filled_slots_only():
    arguments = {"batch_size": 2, "q_length": 1, "kv_length": 64, "q_offset": torch.tensor(5)}
    visible = assert_says_what_eager_says({**arguments, "attention_mask": LEFT})
    assert visible.key_ranges.tolist() == [[[2, 6]], [[0, 6]]] and visible.mask is None


def test_nothing_to_hide_is_no_mask_where_the_caller_allows_it():
    arguments = {**WHOLE, "mask_function": PATTERNS["bidirectional"]}
    for mask in (None, FULL):
        options = {**arguments, "attention_mask": mask, "allow_is_bidirectional_skip": True}
        assert gravity_mask(**options) is None and eager_mask(**options) is None
    assert gravity_mask(**{**options, "attention_mask": LEFT}) is not None


def custom_mask(batch, head, query, key):
    return (key <= query) | (key < 2)


@pytest.mark.parametrize("function, vmap", [
    (custom_mask, True),
    (masking_utils.or_masks(masking_utils.causal_mask_function, custom_mask), True),
    (masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), False),
], ids=["custom", "union", "chunked"])  # fmt: skip
def test_a_mask_function_that_is_not_known_gives_a_dense_bool_mask_and_its_hull(function, vmap):
    arguments = {**WHOLE, "attention_mask": LEFT, "mask_function": function, "use_vmap": vmap}
    visible = assert_says_what_eager_says(arguments)
    assert visible.mask.dtype == torch.bool and visible.mask.shape == (2, 1, 6, 6)
    ranges = visible.key_ranges
    assert (ranges.diff(dim=1) >= 0).all() and (ranges[..., 1] < 6).any()


def test_a_bound_on_one_side_alone_is_said_by_ranges():
    function = masking_utils.sliding_window_overlay(2)
    visible = assert_says_what_eager_says({**WHOLE, "mask_function": function})
    assert visible.mask is None and visible.window is None
    assert visible.key_ranges[0].tolist() == [[0, 6], [0, 6], [1, 6], [2, 6], [3, 6], [4, 6]]


def test_an_argument_of_a_later_transformers_gets_its_plain_mask():
    arguments = {**WHOLE, "attention_mask": LEFT}
    mask = gravity_mask(**arguments, something_new=True)
    assert visible_keys_of(mask) is None and torch.equal(mask, eager_mask(**arguments))


def test_readings_are_compared_with_transformers_own_masks(monkeypatch):
    """A version that means something else by a sliding window gets dense masks, right ones."""
    assert mask_patterns._readings_hold()

    def other_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    caches = (mask_patterns._readings_hold, mask_patterns._readers)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", other_overlay)
    try:
        function = masking_utils.sliding_window_causal_mask_function(3)
        visible = assert_says_what_eager_says({**WHOLE, "mask_function": function})
        assert visible.mask is not None and not mask_patterns._readings_hold()
    finally:
        for cached in caches:
            cached.cache_clear()


def deferred(**options: Any) -> DeferredMask:
    mask = gravity_mask(**{**WHOLE, "attention_mask": LEFT, **options})
    assert isinstance(mask, DeferredMask)
    return mask


def test_a_mask_that_nobody_reads_takes_no_memory():
    mask = deferred()
    assert (mask.shape, mask.dtype, mask.device.type) == ((2, 1, 6, 6), torch.float32, "cpu")
    assert mask.dim() == mask.ndim == 4 and mask.size(-1) == 6 and not mask.requires_grad
    assert mask.untyped_storage().nbytes() == 4 and mask._filled is None
    assert visible_keys_of(mask) is not None and mask._filled is None


@pytest.mark.parametrize("use", [
    lambda mask: mask + 0.0,
    lambda mask: 0.0 + mask,
    lambda mask: mask[:, :, :, :6],
    lambda mask: mask.clone(),
    lambda mask: mask.contiguous(),
    lambda mask: mask.expand(2, 1, 6, 6),
    lambda mask: torch.cat([mask[:1], mask[1:]]),
    lambda mask: torch.where(mask == 0, 0.0, mask),
    lambda mask: torch.from_numpy(mask.numpy()),
    lambda mask: mask.data,
    lambda mask: mask.double().float(),
    lambda mask: mask.to(torch.float32, copy=True),
])  # fmt: skip
def test_whoever_computes_with_a_mask_gets_its_values(use):
    mask = deferred()
    result = use(mask)
    assert type(result) is Tensor
    assert torch.equal(result, eager_mask(**WHOLE, attention_mask=LEFT))


def test_a_mask_computed_from_ours_says_nothing():
    mask = deferred()
    assert visible_keys_of(mask[:, :, :3]) is None and visible_keys_of(mask * 1.0) is None
    assert visible_keys_of(mask) is not None


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("queries", [1, 6])
def test_a_mask_changed_in_place_says_nothing_any_more(queries, inference):
    with torch.inference_mode(inference):
        mask = gravity_mask(batch_size=2, q_length=queries, kv_length=6, attention_mask=LEFT)
        assert visible_keys_of(mask) is not None
        _ = mask + 1
        assert visible_keys_of(mask) is not None
        mask[:, :, 0] = 0.0
        assert visible_keys_of(mask) is None and (ordinary(mask)[:, :, 0] == 0).all()


def test_a_moved_mask_stays_deferred_and_takes_its_memory_of_itself_along():
    mask = deferred()
    assert mask.to("cpu") is mask and mask.to(torch.float32) is mask and mask.detach() is mask
    half = mask.to(torch.bfloat16)
    assert isinstance(half, DeferredMask) and half.dtype == torch.bfloat16
    assert torch.equal(ordinary(half), eager_mask(**WHOLE, attention_mask=LEFT).bfloat16())
    away = deferred().to(device="meta")
    assert isinstance(away, DeferredMask) and away.device.type == "meta"
    assert visible_keys_of(away).key_ranges.device.type == "meta"


def test_a_static_cache_that_counts_on_changes_no_mask_made_before():
    filled = torch.tensor(2)
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 8}
    expected = eager_mask(**arguments, q_offset=filled)
    mask = gravity_mask(**arguments, q_offset=filled)
    filled.add_(3)
    assert torch.equal(ordinary(mask), expected)


def test_fake_and_traced_tensors_get_the_plain_mask():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        real = torch.ones(2, 6, dtype=torch.bool)
        mask = gravity_mask(**{**WHOLE, "attention_mask": real})
        assert mask.shape == (2, 1, 6, 6) and visible_keys_of(mask) is None
