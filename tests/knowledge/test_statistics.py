"""Intervals and tests against published values and against counting everything."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from gravity_hf.knowledge.statistics import (
    bootstrap_median,
    mcnemar,
    paired_difference,
    rate,
    spread,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    "successes, trials, low, high",
    # R. G. Newcombe (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation():
    """Its ends are the shares p whose standard deviation puts the observed share z away."""
    z = 1.959963984540054
    for successes, trials in [(3, 17), (50, 100), (999, 1000)]:
        for p in wilson_interval(successes, trials):
            assert abs(successes / trials - p) == pytest.approx(z * math.sqrt(p * (1 - p) / trials))


def test_wilson_interval_reaches_the_ends_and_knows_nothing_of_nothing():
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert math.isnan(rate([]).rate)


def test_rate_counts():
    found = rate([True, False, True, True])
    assert (found.successes, found.trials, found.rate) == (3, 4, 0.75)
    assert (found.low, found.high) == wilson_interval(3, 4)
    assert json.loads(json.dumps(found._asdict()))["rate"] == 0.75


def test_mcnemar_counts_all_splits():
    first = [True] * 9 + [False] * 2 + [True, False] * 5
    second = [False] * 9 + [True] * 2 + [True, False] * 5
    found = mcnemar(first, second)
    heads = [sum(flips) for flips in itertools.product((0, 1), repeat=11)]
    as_uneven = sum(h <= 2 or h >= 9 for h in heads) / len(heads)
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(as_uneven)
    assert mcnemar(second, first).p_value == found.p_value


def test_mcnemar_of_agreement_and_of_many():
    assert mcnemar([True, False], [True, False]).p_value == 1.0
    assert mcnemar([True] * 3, [False] * 3).p_value == pytest.approx(0.25)
    # 2 * 2^-3000 is below the least float; it must underflow to zero, not raise.
    assert mcnemar([True] * 3000, [False] * 3000).p_value == 0.0


@pytest.mark.parametrize(
    "degrees, t",
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_student_quantile_is_the_tabled_one(degrees, t):
    assert student_quantile(0.95, degrees) == pytest.approx(t, abs=5e-5)


def test_student_quantile_nears_the_normal():
    assert student_quantile(0.95, 20_000) == pytest.approx(1.95996, abs=5e-4)


def test_paired_difference_by_hand():
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 1.0, 1.0])
    # Differences 1, 1, 2: mean 4/3, variance 1/3, error sqrt(1/3/3) = 1/3; t with 2 degrees 4.3027.
    assert found.mean == pytest.approx(4 / 3)
    assert found.standard_error == pytest.approx(1 / 3)
    assert found.low == pytest.approx(4 / 3 - 4.30265 / 3, abs=1e-5)
    assert found.high == pytest.approx(4 / 3 + 4.30265 / 3, abs=1e-5)


def test_one_pair_says_nothing_about_spread():
    assert paired_difference([2.0], [1.0]) == (1, 1.0, math.inf, -math.inf, math.inf)


def test_bootstrap_median_covers_the_order_statistics():
    """Of 0..100 the exact interval by binomial order statistics is 40 to 60."""
    found = bootstrap_median(range(101))
    assert found.value == 50.0
    assert abs(found.low - 40) <= 1 and abs(found.high - 60) <= 1


def test_bootstrap_median_is_repeatable_and_of_even_numbers_the_middle():
    values = [x * x % 37 for x in range(1000)]
    assert bootstrap_median(values, seed=3) == bootstrap_median(values, seed=3)
    assert bootstrap_median([1.0, 2.0]).value == 1.5
    assert bootstrap_median([4.0]) == (4.0, 4.0, 4.0)


def test_bootstrap_median_depends_on_the_seed():
    values = [math.sin(x) for x in range(60)]
    one, other = (bootstrap_median(values, seed=seed, resamples=20) for seed in (1, 2))
    assert one != other


def test_spread():
    assert spread([0.5, 0.25, 0.75]) == (3, 0.5, 0.25, 0.75)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(1, 2, confidence=1.0),
        lambda: mcnemar([True], [True, False]),
        lambda: bootstrap_median([]),
        lambda: bootstrap_median([math.nan]),
        lambda: paired_difference([], []),
        lambda: paired_difference([1.0], []),
        lambda: student_quantile(0.95, 0),
        lambda: spread([]),
    ],
)
def test_what_cannot_be_computed_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()
