"""Levels begin in order, and none is starved."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gravity_hf.training.governed import (
    Governor,
    GovernorSettings,
    GovernorState,
    Hierarchy,
    HierarchySettings,
)

PENDING, ACTIVE, COOLING, CONVERGED, AWAKENED = GovernorState
LEVELS = {0: ("a", "b"), 1: ("c",), 2: (), 3: ("d",)}
NEVER = HierarchySettings(patience_fraction=None, warmup_steps=10)


def hierarchy(settings: HierarchySettings = NEVER, total: int = 1000) -> Hierarchy:
    return Hierarchy(LEVELS, settings, total_steps=total)


def states(**given_states: GovernorState) -> dict[str, GovernorState]:
    return {"a": ACTIVE, "b": ACTIVE, "c": PENDING, "d": PENDING, **given_states}


def test_only_the_first_level_begins() -> None:
    one = hierarchy()
    assert one.active_groups == {"a", "b"}
    assert one.step(1, states()).multipliers == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}


@pytest.mark.parametrize("state", [ACTIVE, AWAKENED])
def test_a_level_waits_for_every_group_of_the_one_before(state: GovernorState) -> None:
    one = hierarchy()
    assert not one.step(5, states(a=CONVERGED, b=state)).activated
    (event,) = one.step(6, states(a=CONVERGED, b=COOLING)).activated
    assert event == (1, 6, "convergence", ("c",))
    assert one.active_groups == {"a", "b", "c"}


def test_a_level_that_has_begun_does_not_carry_the_next_along() -> None:
    one = hierarchy()
    settled = states(a=COOLING, b=COOLING)
    assert [event.level for event in one.step(5, settled).activated] == [1]
    assert not one.step(6, {**settled, "c": ACTIVE}).activated
    # Level 2 has no groups: level 3 follows level 1.
    assert [e.level for e in one.step(7, {**settled, "c": COOLING}).activated] == [3]


def test_an_emergency_activates_all_that_are_left() -> None:
    one = hierarchy()
    assert not one.step(799, states()).activated
    assert [e[:3] for e in one.step(800, states()).activated] == [
        (1, 800, "emergency"),
        (3, 800, "emergency"),
    ]


def test_patience_is_counted_from_the_level_before() -> None:
    one = hierarchy(HierarchySettings(patience_fraction=0.05))
    found = [event[:3] for step in range(200) for event in one.step(step, states()).activated]
    assert found == [(1, 50, "patience"), (3, 100, "patience")]


def test_a_level_starts_faster_and_slows_to_the_rate_of_all() -> None:
    one = hierarchy(HierarchySettings(lr_multipliers={1: 2.0}, warmup_steps=10))
    one.step(100, states(a=COOLING, b=COOLING))
    factors = [one.multipliers(step)["c"] for step in (100, 105, 110, 500)]
    assert factors == [2.0, 1.5, 1.0, 1.0]


def test_a_level_stays_active() -> None:
    one = hierarchy()
    one.step(5, states(a=COOLING, b=COOLING))
    one.step(6, states(c=ACTIVE))
    assert one.is_active(1) and one.multipliers(6)["c"] > 0


def test_a_state_in_json_goes_on() -> None:
    one, other = hierarchy(), hierarchy()
    one.step(5, states(a=COOLING, b=COOLING))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.activations == one.activations
    assert other.multipliers(7) == one.multipliers(7)
    with pytest.raises(ValueError, match="levels"):
        Hierarchy({0: ("a",), 5: ("b",)}, NEVER, total_steps=9).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr_multipliers": {1: 0.0}},
        {"warmup_steps": -1},
        {"emergency_fraction": 1.5},
        {"patience_fraction": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="HierarchySettings"):
        HierarchySettings(**wrong)


TRICKY = st.one_of(
    st.floats(0, 1e30),
    st.sampled_from([0.0, 1e-320, 1e-9, float("nan"), float("inf"), 1.0]),
)


@hypothesis_settings(max_examples=40)
@given(
    gradients=st.lists(TRICKY, min_size=1, max_size=20),
    probes=st.lists(TRICKY, min_size=1, max_size=5),
    patience=st.one_of(st.none(), st.floats(0.01, 1.0)),
    emergency=st.floats(0.1, 1.0),
    seed=st.integers(0, 999),
)
def test_no_signals_keep_a_level_or_a_group_from_learning(
    gradients: list[float],
    probes: list[float],
    patience: float | None,
    emergency: float,
    seed: int,
) -> None:
    """Whatever is measured: levels begin in order, all of them in time, and a group that is
    converged wakes when its gradient is back."""
    total, draw = 120, random.Random(seed)
    settings = HierarchySettings(patience_fraction=patience, emergency_fraction=emergency)
    one = hierarchy(settings, total)
    small = GovernorSettings(cooling_window=2, confirmation_window=2, warm_window=1)
    governors = {n: Governor(n, small, pending=n not in one.active_groups) for n in "abcd"}
    for step in range(total + 1):
        for governor in governors.values():
            governor.update(draw.choice(gradients))
            governor.probe(draw.choice(probes))
        moment = {name: governor.state for name, governor in governors.items()}
        for event in one.step(step, moment).activated:
            for name in event.groups:
                assert governors[name].activate() is ACTIVE
        begun = sorted(one.activations)
        assert begun == [0, 1, 3][: len(begun)]
        assert all(
            (factor > 0) == (n in one.active_groups) for n, factor in one.multipliers(step).items()
        )
    assert sorted(one.activations) == [0, 1, 3]
    for governor in governors.values():
        assert governor.state is not PENDING
        governor.probe(1e38), governor.probe(1e38)
        assert governor.state is not CONVERGED
