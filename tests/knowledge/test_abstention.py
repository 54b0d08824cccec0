"""Operating points against brute force, staleness, and rows that stop."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.knowledge.abstention import (
    AbstainBelow,
    changed_share,
    is_stale,
    operating_point,
)
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.statistics import wilson_interval


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("precision", [0.6, 0.9, 1.0])
def test_it_keeps_the_most_cases_that_the_precision_allows(seed, precision):
    generator = torch.Generator().manual_seed(seed)
    # One decimal: many cases share a score.
    scores = torch.randint(0, 30, (40,), generator=generator).div(10).tolist()
    right = [bool(x) for x in torch.rand(40, generator=generator) < torch.tensor(scores) / 3]
    point = operating_point(scores, right, precision)
    sizes = []
    for level in set(scores):
        kept = [ok for score, ok in zip(scores, right, strict=True) if score >= level]
        if sum(kept) / len(kept) >= precision:
            sizes.append(len(kept))
    assert point.reached == bool(sizes)
    assert point.kept == max(sizes, default=0)
    kept = [ok for score, ok in zip(scores, right, strict=True) if score >= point.threshold]
    assert len(kept) == point.kept
    assert point.recall == pytest.approx(sum(kept) / sum(right))
    assert (point.precision_low, point.precision_high) == wilson_interval(sum(kept), len(kept))


def test_the_threshold_is_half_way_to_the_next_case():
    assert operating_point([0.9, 0.7, 0.1], [True, True, False], 1.0).threshold == (0.7 + 0.1) / 2
    assert operating_point([0.9, 0.7], [True, True], 1.0).threshold == 0.7
    above = math.nextafter(0.7, 1)
    assert operating_point([above, 0.7], [True, False], 1.0).kept == 1
    above = math.nextafter(above, 1)
    assert operating_point([above, math.nextafter(0.7, 1)], [True, False], 1.0).kept == 1


def test_a_precision_out_of_reach_keeps_nothing():
    point = operating_point([0.9, 0.9, 0.5], [True, False, False], 0.9)
    assert not point.reached
    assert point.threshold > 0.9
    assert (point.kept, point.recall) == (0, 0.0)
    assert math.isnan(point.precision)
    assert (point.precision_low, point.precision_high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "right", "precision"),
    [([], [], 0.9), ([1.0], [], 0.9), ([math.nan], [True], 0.9), ([1.0], [True], 0.0)],
    ids=["none", "uneven", "nan", "precision"],
)
def test_what_has_no_operating_point_is_refused(scores, right, precision):
    with pytest.raises(ValidationError):
        operating_point(scores, right, precision)


def test_changes_are_what_came_or_went_and_an_update_is_one():
    before = [f"id{i}-v1" for i in range(10)]
    assert changed_share(before, before) == 0
    assert changed_share(before, before[1:]) == 0.1
    assert changed_share(before, [*before[1:], "id0-v2"]) == 0.1
    assert changed_share(before, [*before, "new-v1", "other-v1"]) == 0.2
    assert changed_share([], []) == 0
    assert not is_stale(before, before[1:])
    assert is_stale(before, before[2:])
    assert is_stale([], ["new-v1"])


def test_rows_below_the_threshold_stop_and_no_others():
    stop = AbstainBelow(lambda: [0.2, 0.5, 0.9], 0.5)
    rows = torch.zeros(3, 4, dtype=torch.long)
    assert stop(rows, None).tolist() == [True, False, False]
    assert stop(rows, None).dtype == torch.bool


def test_rows_without_a_confidence_are_an_error():
    with pytest.raises(ValidationError, match="processor"):
        AbstainBelow(list, 0.5)(torch.zeros(3, 4), None)
    with pytest.raises(ValidationError, match="from 0 to 1"):
        AbstainBelow(list, 1.5)
