"""The budget is shared exactly, within all bounds."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gravity_hf.training.governed import Budget, BudgetSettings, GovernorState, allocate
from gravity_hf.training.governed.budget import Need

PENDING, ACTIVE, COOLING, CONVERGED, AWAKENED = GovernorState
NEEDS = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e300), st.just(5e-324))
ROW = st.tuples(NEEDS, st.floats(0, 1), st.floats(0, 1))


def assert_shared(rows: list[tuple[float, float, float]], master: float) -> None:
    """Every bound holds, and the budget is spent as far as those with need can spend it."""
    needs = [need for need, _, _ in rows]
    floors = [min(low, high) for _, low, high in rows]
    caps = [max(low, high) for _, low, high in rows]
    shares = allocate(needs, floors, caps, master)
    total = math.fsum(floors)
    shrunk = [f * min(1.0, master / total) if total else f for f in floors]
    assert all(f - 1e-12 <= a <= c + 1e-12 for f, a, c in zip(shrunk, shares, caps, strict=True))
    assert math.fsum(shares) <= master + 1e-12
    reach = math.fsum(c if n > 0 else f for n, f, c in zip(needs, shrunk, caps, strict=True))
    assert abs(math.fsum(shares) - min(master, reach)) <= 1e-11


@settings(max_examples=200)
@given(rows=st.lists(ROW, max_size=12), master=st.floats(0, 8))
def test_no_needs_and_bounds_break_a_promise(
    rows: list[tuple[float, float, float]], master: float
) -> None:
    assert_shared(rows, master)


def test_ten_thousand_random_states_are_shared_within_all_bounds() -> None:
    draw = random.Random(0)
    for _ in range(10_000):
        # Needs over thirty orders of magnitude, some of them none.
        rows = [
            (draw.choice([0.0, 10 ** draw.uniform(-30, 0)]), draw.random() ** 4, draw.random())
            for _ in range(draw.randint(1, 10))
        ]
        assert_shared(rows, draw.choice([0.0, 1.0, draw.uniform(0, 6)]))


@settings(max_examples=100)
@given(needs=st.lists(st.floats(1e-3, 1), min_size=2, max_size=8), master=st.floats(0.1, 4))
def test_between_the_bounds_shares_are_in_proportion_to_needs(
    needs: list[float], master: float
) -> None:
    shares = allocate(needs, [0.02] * len(needs), [0.9] * len(needs), master)
    free = [a / n for a, n in zip(shares, needs, strict=True) if 0.02 + 1e-9 < a < 0.9 - 1e-9]
    assert all(math.isclose(level, free[0], rel_tol=1e-9) for level in free)
    # Who is held at a bound would otherwise be beyond it.
    for share, need in zip(shares, needs, strict=True):
        if free and share <= 0.02 + 1e-9:
            assert free[0] * need <= 0.02 + 1e-9
        if free and share >= 0.9 - 1e-9:
            assert free[0] * need >= 0.9 - 1e-9


@pytest.mark.parametrize(
    ("needs", "floors", "caps", "master", "expected"),
    [
        ([1, 3], [0, 0], [1, 1], 1.0, [0.25, 0.75]),
        ([1, 3], [0, 0], [1, 0.5], 1.0, [0.5, 0.5]),
        ([1, 99], [0.1, 0], [1, 1], 1.0, [0.1, 0.9]),
        ([1, 1], [0, 0], [0.4, 0.4], 1.0, [0.4, 0.4]),
        ([0, 1], [0.2, 0], [1, 1], 1.0, [0.2, 0.8]),
        ([0, 0], [0.1, 0.2], [1, 1], 1.0, [0.1, 0.2]),
        ([1, 1], [0.8, 0.8], [1, 1], 1.0, [0.5, 0.5]),
        ([], [], [], 1.0, []),
    ],
)
def test_shares_by_hand(
    needs: list[float],
    floors: list[float],
    caps: list[float],
    master: float,
    expected: list[float],
) -> None:
    assert allocate(needs, floors, caps, master) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("needs", "floors", "caps"),
    [([1], [0], [1, 1]), ([-1], [0], [1]), ([1], [0.5], [0.1]), ([math.nan], [0], [1])],
)
def test_what_cannot_be_shared_is_refused(
    needs: list[float], floors: list[float], caps: list[float]
) -> None:
    with pytest.raises(ValueError, match="allocate"):
        allocate(needs, floors, caps, 1.0)


def budget(**changes: float) -> Budget:
    return Budget("abcd", BudgetSettings(**{"eval_window": 10, **changes}))


def all_active(**given_states: GovernorState) -> dict[str, GovernorState]:
    return {**dict.fromkeys("abcd", ACTIVE), **given_states}


EQUAL = {name: Need(0.5, 0.25, 0.5) for name in "abcd"}


def test_equal_needs_change_no_rate() -> None:
    one = budget()
    one.step(0, all_active(), EQUAL)
    assert one.multipliers() == pytest.approx(dict.fromkeys("abcd", 1.0))


def test_a_group_far_from_converged_gets_more() -> None:
    one = budget()
    needs = {**EQUAL, "a": Need(0.5, 0.25, 0.1), "b": Need(0.5, 0.25, 1.0)}
    one.step(0, all_active(), needs)
    assert one.allocations["a"] < one.allocations["c"] < one.allocations["b"]


def test_shares_follow_the_states() -> None:
    one = budget()
    states = all_active(a=PENDING, b=CONVERGED, c=COOLING)
    one.step(0, states, EQUAL)
    assert one.allocations["a"] == 0.0 and one.allocations["b"] == 0.02
    assert one.allocations["c"] == pytest.approx(0.4) == one.allocations["d"]
    assert one.multipliers()["a"] == one.multipliers()["b"] == 0.0
    free = budget(reserve_converged=False)
    free.step(0, states, EQUAL)
    assert free.allocations["b"] == 0.0


def test_rates_are_shares_over_the_mean_of_those_that_learn() -> None:
    one = budget(ceiling_fraction=1.0)
    needs = {**EQUAL, "a": Need(1.0, 1.0, 1.0)}
    one.step(0, all_active(d=PENDING), needs)
    factors = one.multipliers()
    for name in "abc":
        assert factors[name] == pytest.approx(one.allocations[name] * 3 / 1.0)
    assert sum(factors.values()) == pytest.approx(3.0)


def test_rates_stay_within_their_bounds_and_periods_follow() -> None:
    one = budget(floor_fraction=0.0, ceiling_fraction=1.0)
    needs = dict.fromkeys("bcd", Need(0.0, 0.0, 0.001)) | {"a": Need(1.0, 1.0, 1.0)}
    one.step(0, all_active(), needs)
    assert one.multipliers() == {
        "a": pytest.approx(3.996, abs=0.01),
        "b": 0.25,
        "c": 0.25,
        "d": 0.25,
    }
    assert one.periods() == {"a": 1, "b": 4, "c": 4, "d": 4}


def test_the_budget_is_shared_by_the_clock_and_by_changes_of_state() -> None:
    one = budget()
    assert one.step(0, all_active(), EQUAL)
    assert not one.step(9, all_active(), EQUAL)
    assert one.step(10, all_active(), EQUAL)
    assert one.step(11, all_active(a=CONVERGED), EQUAL)
    assert not one.step(12, all_active(a=CONVERGED), EQUAL)


def test_floors_that_do_not_fit_are_said() -> None:
    one = budget(floor_fraction=0.3, ceiling_fraction=0.5)
    one.step(0, all_active(), EQUAL)
    assert one.floor_infeasible and sum(one.allocations.values()) == pytest.approx(1.0)


def test_a_boost_moves_the_budget() -> None:
    one = budget()
    one.boost({"a": 1.5})
    one.step(0, all_active(), EQUAL)
    assert one.allocations["a"] == pytest.approx(1.5 * one.allocations["b"])


STATE = st.sampled_from(list(GovernorState))
UNIT = st.floats(0, 1)


@settings(max_examples=100)
@given(st.lists(st.tuples(STATE, UNIT, UNIT, UNIT), min_size=4, max_size=4), st.booleans())
def test_no_states_and_needs_break_a_bound(
    rows: list[tuple[GovernorState, float, float, float]], reserve: bool
) -> None:
    one = budget(reserve_converged=reserve)
    states = {name: row[0] for name, row in zip("abcd", rows, strict=True)}
    one.step(0, states, {n: Need(*row[1:]) for n, row in zip("abcd", rows, strict=True)})
    assert sum(one.allocations.values()) <= 1.0 + 1e-12
    for name, share in one.allocations.items():
        low, high = (0.02, 0.4) if states[name].learns else (0.0, 0.02)
        assert low - 1e-12 <= share <= high + 1e-12
        assert (one.multipliers()[name] > 0) == states[name].learns


def test_a_state_in_json_goes_on() -> None:
    one, other = budget(), budget()
    one.boost({"a": 1.5})
    one.step(7, all_active(b=COOLING), EQUAL)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.multipliers() == one.multipliers()
    assert not other.step(16, all_active(b=COOLING), EQUAL)
    assert other.step(17, all_active(b=COOLING), EQUAL)
    assert other.allocations == one.allocations
    with pytest.raises(ValueError, match="groups"):
        Budget("xy").load_state_dict(one.state_dict())
