"""Key ranges from packed documents, and their inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operator_cases import packed_ranges, padding_ranges

from gravity_hf.ops.ranges import ranges_from_cu_seqlens
from gravity_hf.ops.reference import visible_keys
from gravity_hf.ops.triton.ranges import query_ranges

lengths = st.lists(st.integers(0, 5), min_size=1, max_size=6)
few = settings(max_examples=50)


@few
@given(lengths=lengths)
def test_a_packed_token_sees_its_document(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths)
    ranges = ranges_from_cu_seqlens(cu_seqlens, total)
    assert ranges.dtype == torch.int32
    assert ranges.shape == (1, total, 2)
    if total:
        assert torch.equal(ranges, packed_ranges(*lengths))


def test_repeated_ends_and_tokens_of_no_document():
    """Padding of the list by its last entry; tokens after it see nothing."""
    ranges = ranges_from_cu_seqlens(torch.tensor([0, 3, 5, 5, 5]).int(), 7)
    assert torch.equal(ranges[:, :5], packed_ranges(3, 2))
    start, stop = ranges[0, 5:].unbind(-1)
    assert torch.equal(start, stop)
    assert (ranges.diff(dim=1) >= 0).all()


def expected_queries(key_ranges, queries, keys):
    seen = visible_keys(queries, keys, key_ranges=key_ranges).expand(-1, 1, queries, keys)[:, 0]
    return [[set(row.nonzero().flatten().tolist()) for row in item.mT] for item in seen]


def check_inverse(key_ranges, queries, keys):
    inverse = query_ranges(key_ranges, queries, keys)
    assert inverse.dtype == torch.int32
    assert inverse.shape == (key_ranges.shape[0], keys, 2)
    assert (inverse[..., 0] <= inverse[..., 1]).all()
    actual = [[set(range(*pair)) for pair in item] for item in inverse.tolist()]
    assert actual == expected_queries(key_ranges, queries, keys)


@few
@given(
    batch=st.integers(1, 3),
    rows=st.sampled_from([1, 6]),
    keys=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_query_ranges_are_the_inverse_of_key_ranges(batch, rows, keys, seed):
    """Any starts and stops that do not decrease, also beyond the keys and empty."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(-1, keys + 2, (2, batch, rows), generator=g, dtype=torch.int32)
    check_inverse(torch.stack(list(ends.sort(-1).values), -1), 6, keys)


@pytest.mark.parametrize("side", ["left", "right"])
def test_query_ranges_of_padding(side):
    check_inverse(padding_ranges(3, 8, side), 5, 8)


def test_ranges_are_computed_without_reading_values():
    """On a device nothing may wait: a tensor without data shows it."""
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    ranges = ranges_from_cu_seqlens(cu_seqlens, 9)
    assert ranges.shape == (1, 9, 2)
    assert query_ranges(ranges, 9, 9).shape == (1, 9, 2)
