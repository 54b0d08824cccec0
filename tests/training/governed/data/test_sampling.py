"""Samples are drawn by tiers, from all of the dataset, and a resumed run draws the same."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from gravity_hf.training.governed.data import Tier, TieredSampler

FRACTIONS = (0.1, 0.3, 0.4, 0.2)


def tiers(*counts: int) -> np.ndarray:
    """So many samples of each tier from EXCLUDED to FAILING, mixed."""
    row = np.repeat(np.arange(-2, -2 + len(counts)), counts)
    return np.random.default_rng(0).permutation(row)


def drawn(sampler: TieredSampler, count: int | None = None) -> list[int]:
    return list(itertools.islice(iter(sampler), count))


def test_an_epoch_covers_the_whole_dataset_once() -> None:
    sampler = TieredSampler(tiers(0, 7, 40, 30, 9, 14))
    assert sorted(drawn(sampler)) == list(range(100))
    assert len(sampler) == sampler.coverage()["unique"] == sampler.coverage()["size"] == 100
    assert sampler.coverage()["drawn_unknown"] == 7 and sampler.coverage()["drawn_failing"] == 14


def test_scoring_a_part_of_a_dataset_hides_none_of_the_rest() -> None:
    sampler = TieredSampler(size=1000)
    sampler.update(range(50), [Tier.FAILING] * 50)
    assert sorted(drawn(sampler)) == list(range(1000))


@pytest.mark.parametrize("batch_size", [5, 8, 20])
def test_batches_of_any_size_have_the_mixture(batch_size: int) -> None:
    found = tiers(0, 0, 400, 400, 400, 400)
    sampler = TieredSampler(found, fractions=FRACTIONS)
    loader = DataLoader(range(1600), sampler=sampler, batch_size=batch_size)
    for batch in itertools.islice(loader, 600 // batch_size):
        counts = Counter(found[batch.numpy()].tolist())
        for tier, fraction in enumerate(FRACTIONS):
            assert abs(counts[tier] - fraction * batch_size) <= 2


def test_fractions_of_empty_tiers_go_to_the_others() -> None:
    found = tiers(0, 0, 0, 400, 400, 0)
    first = found[drawn(TieredSampler(found, fractions=FRACTIONS), 210)]
    assert (first == Tier.LEARNING).sum() == 90 and (first == Tier.STRUGGLING).sum() == 120


def test_unknown_samples_have_their_share_or_the_one_that_is_asked_for() -> None:
    found = tiers(0, 500, 0, 250, 250, 0)
    natural = found[drawn(TieredSampler(found), 100)]
    assert (natural == Tier.UNKNOWN).sum() == 50
    asked = found[drawn(TieredSampler(found, unknown_fraction=0.2), 100)]
    assert (asked == Tier.UNKNOWN).sum() == 20
    with pytest.raises(ValueError, match="unknown_fraction"):
        TieredSampler(found, unknown_fraction=0.0)


def test_excluded_samples_are_not_drawn_and_are_said() -> None:
    found = tiers(10, 0, 20, 20, 0, 0)
    sampler = TieredSampler(found)
    assert Tier.EXCLUDED not in found[drawn(sampler)]
    assert (len(sampler), sampler.coverage()["excluded"]) == (40, 10)
    with pytest.raises(ValueError, match="excluded"):
        TieredSampler([-2, -2])


def test_an_epoch_of_draws_repeats_small_tiers_and_goes_on_in_large_ones() -> None:
    found = tiers(0, 0, 10, 0, 0, 300)
    sampler = TieredSampler(found, fractions=(0.5, 0, 0, 0.5), epoch="draws", draws=100)
    once, again = drawn(sampler), drawn(sampler)
    assert len(once) == len(again) == len(sampler) == 100
    small = Counter(index for index in once if found[index] == Tier.MASTERED)
    assert set(small.values()) == {5}
    large = [index for index in once + again if found[index] == Tier.FAILING]
    assert len(set(large)) == 100
    assert sampler.coverage()["unique"] == 110


def test_epochs_differ_and_repeat_by_seed() -> None:
    found = tiers(0, 5, 20, 20, 20, 20)
    first, second = TieredSampler(found, seed=3), TieredSampler(found, seed=3)
    one, two = drawn(first), drawn(first)
    assert one != two and (drawn(second), drawn(second)) == (one, two)
    second.set_epoch(0)
    assert drawn(second) == one
    assert drawn(TieredSampler(found, seed=4)) != one


def test_new_tiers_hold_from_the_next_draw_on() -> None:
    sampler = TieredSampler(size=100)
    stream = iter(sampler)
    seen = [next(stream) for _ in range(10)]
    left = sorted(set(range(100)) - set(seen))
    sampler.update(left, [Tier.EXCLUDED] * 89 + [Tier.FAILING])
    assert list(stream) == [left[-1]]


def course(sampler: TieredSampler, stream: object, count: int, start: int) -> list[int]:
    """Draws with an update after every ten, that depends on the place alone."""
    found = []
    for place in range(start, start + count):
        index = next(stream, None)
        if index is None:
            break
        found.append(index)
        if (place + 1) % 10 == 0:
            chosen = np.random.default_rng(place).permutation(60)[:20]
            sampler.update(chosen, np.random.default_rng(place).integers(0, 4, 20))
    return found


@pytest.mark.parametrize("kind", ["cover", "draws"])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("cut", [0, 7, 10, 33, 59, 60])
def test_a_state_in_json_goes_on(kind: str, replay: bool, cut: int) -> None:
    found = tiers(0, 6, 20, 20, 10, 4)
    whole, first, second = (TieredSampler(found, seed=2, epoch=kind) for _ in range(3))
    expected = course(whole, iter(whole), 60, 0)
    began = course(first, iter(first), cut, 0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), replay=replay)
    assert second.coverage() == first.coverage()
    if replay:
        # As Trainer does: the epoch by its number, and what was seen skipped.
        second.set_epoch(0)
    stream = iter(second)
    if replay:
        assert [next(stream) for _ in range(cut)] == began
    if cut < 60:
        assert began + course(second, stream, 60 - cut, cut) == expected
        assert second.state_dict() == whole.state_dict()
    assert drawn(second) == drawn(whole)
    assert second.coverage()["unique"] == 60


def test_a_state_of_another_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="another dataset"):
        TieredSampler(size=5).load_state_dict(TieredSampler(size=6).state_dict())


@pytest.mark.parametrize(("indices", "new"), [([100], [0]), ([-1], [0]), ([1, 2], [0]), ([1], [7])])
def test_an_update_that_does_not_fit_changes_nothing(indices: list[int], new: list[int]) -> None:
    sampler = TieredSampler(size=100)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="TieredSampler"):
        sampler.update(indices, new)
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"tiers": [0], "size": 1},
        {"size": 3, "draws": 3},
        {"size": 3, "epoch": "all"},
        {"tiers": [9]},
        {"size": 0},
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="TieredSampler"):
        TieredSampler(**wrong)
