"""Facts are let in only while all they touch has been converged for long enough."""

from __future__ import annotations

import json

import pytest

from gravity_hf.training.governed import ForgeGate, ForgeGateSettings, GovernorState

PENDING, ACTIVE, COOLING, CONVERGED, AWAKENED = GovernorState
DOMAINS = {"chemistry": ("a", "b"), "music": ("c",)}


def gate() -> ForgeGate:
    return ForgeGate(DOMAINS, "abcd", ForgeGateSettings(stability_window=3, feedback_results=4))


def opened() -> ForgeGate:
    one = gate()
    for _ in range(3):
        one.step({"a": CONVERGED, "b": CONVERGED, "c": ACTIVE, "d": ACTIVE})
    return one


def test_a_domain_opens_when_all_its_groups_have_been_converged_for_long() -> None:
    one = gate()
    states = {"a": CONVERGED, "b": ACTIVE, "c": CONVERGED}
    assert [one.step(states) for _ in range(2)] == [(), ()]
    assert one.step(states) == (("forge_activated", "music", ("c",)),)
    for _ in range(9):
        one.step(states)
    assert one.is_ready("music") and not one.is_ready("chemistry")
    states["b"] = CONVERGED
    assert [len(one.step(states)) for _ in range(3)] == [0, 0, 1]
    assert one.is_ready("chemistry")


@pytest.mark.parametrize("state", [PENDING, ACTIVE, COOLING, AWAKENED])
def test_a_domain_closes_on_any_other_state(state: GovernorState) -> None:
    one = opened()
    (event,) = one.step({"a": CONVERGED, "b": state, "c": ACTIVE})
    assert event == ("forge_suspended", "chemistry", ("a", "b"))
    # And opens only after the whole time again.
    settled = {"a": CONVERGED, "b": CONVERGED, "c": ACTIVE}
    assert [len(one.step(settled)) for _ in range(3)] == [0, 0, 1]


def test_a_closed_domain_refuses_unless_forced_and_says_so() -> None:
    one = opened()
    assert one.require("chemistry")["gate"] == "ready"
    with pytest.raises(RuntimeError, match="force=True"):
        one.require("music")
    assert one.require("music", force=True) == {
        "domain": "music",
        "gate": "forced",
        "settled": {"c": 0},
    }


def test_domains_that_accept_too_little_ask_for_budget() -> None:
    one = gate()
    assert one.record("chemistry", 0.5) and not one.record("chemistry", 0.49)
    assert one.feedback() == {}
    assert not one.record("chemistry", 0.1)
    assert one.feedback() == {"a": 1.5, "b": 1.5}
    for _ in range(4):
        one.record("chemistry", 0.9)
    assert one.feedback() == {}


@pytest.mark.parametrize("groups", [("a", "x"), ()])
def test_a_domain_that_could_never_open_is_refused(groups: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="never open"):
        ForgeGate({"chemistry": groups}, "ab")
    with pytest.raises(ValueError, match="domain"):
        gate().is_ready("physics")


def test_a_state_in_json_goes_on() -> None:
    one, other = opened(), gate()
    one.record("music", 0.1)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.is_ready("chemistry") and other.feedback() == one.feedback()
    assert other.state_dict() == one.state_dict()
    with pytest.raises(ValueError, match="domains"):
        ForgeGate({"x": ("a",)}, "a").load_state_dict(one.state_dict())
