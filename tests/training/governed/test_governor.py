"""A group is in the state that its gradients and updates say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import pytest

from gravity_hf.training.governed import Governor, GovernorSettings, GovernorState, Signal
from gravity_hf.training.governed.governor import Phase

PENDING, ACTIVE, COOLING, CONVERGED, AWAKENED = GovernorState
# Without a memory the average is the last gradient.
FAST = GovernorSettings(
    cooling_window=3,
    resume_window=2,
    confirmation_window=4,
    warm_window=2,
    reactivation_probes=2,
    reactivation_warmup=3,
    ema_decay=1e-9,
    update_threshold=0.01,
)


def governor(**settings: object) -> Governor:
    return Governor("group", GovernorSettings(**{**vars(FAST), **settings}))


def fed(one: Governor, gradients: Iterable[float], update: float | None = 0.0) -> GovernorState:
    for gradient in gradients:
        one.update(Signal(gradient, update))
    return one.state


def cooling() -> Governor:
    one = governor()
    assert fed(one, [1.0] * 3 + [0.3] * 3) is COOLING
    return one


def converged() -> Governor:
    one = cooling()
    assert fed(one, [0.1] * 4) is CONVERGED
    return one


def test_a_group_passes_through_all_states() -> None:
    one = Governor("group", FAST, pending=True)
    assert fed(one, [1.0] * 9) is PENDING and one.step == 0
    assert one.activate() is ACTIVE
    fed(one, [1.0] * 3 + [0.3] * 3 + [0.1] * 4)
    one.probe(0.9), one.probe(0.9)
    fed(one, [0.5] * 3)
    names = [(entry.old_state, entry.new_state) for entry in one.history]
    order = ["PENDING", "ACTIVE", "COOLING", "CONVERGED", "AWAKENED", "ACTIVE"]
    assert names == list(zip(order, order[1:], strict=False))


def test_a_quiet_spell_shorter_than_the_window_cools_nothing() -> None:
    one = governor()
    assert fed(one, [1.0] * 3 + [0.3, 0.3, 0.9] * 5) is ACTIVE
    assert fed(one, [0.3] * 3) is COOLING


def test_the_scale_of_gradients_changes_nothing() -> None:
    course = [1.0] * 3 + [0.3] * 4 + [0.1] * 4
    for scale in (1e-4, 1.0, 1e6):
        one = governor()
        assert fed(one, [scale * g for g in course]) is CONVERGED
        assert [entry.step for entry in one.history] == [6, 11]


@pytest.mark.parametrize("gradients", [[0.0] * 50, [1e-12] * 50, [1e-9] * 5 + [1e-10] * 50])
def test_a_group_that_never_learnt_does_not_cool(gradients: list[float]) -> None:
    one = governor()
    assert fed(one, gradients) is ACTIVE
    assert one.phase is Phase.COLD and not one.is_warm


def test_a_group_that_still_moves_does_not_cool_or_converge() -> None:
    one = governor()
    assert fed(one, [1.0] * 3 + [0.3] * 20, update=0.02) is ACTIVE
    assert fed(one, [0.3] * 3) is COOLING
    assert fed(one, [0.1] * 20, update=0.02) is ACTIVE
    assert governor(update_threshold=None).settings.update_threshold is None
    alone = governor(update_threshold=None)
    assert fed(alone, [1.0] * 3 + [0.3] * 3, update=0.02) is COOLING


def test_noise_between_the_thresholds_moves_no_group_back_and_forth() -> None:
    one = cooling()
    # Over where it cools, under where it resumes; then over that, but not for long.
    assert fed(one, [0.45] * 20 + [0.9, 0.3] * 10) is COOLING
    assert len(one.history) == 1
    assert fed(one, [0.9, 0.9]) is ACTIVE
    # And counts anew.
    assert fed(one, [0.3, 0.3]) is ACTIVE
    assert fed(one, [0.3]) is COOLING


def test_confirmation_counts_in_a_row() -> None:
    one = cooling()
    assert fed(one, [0.1, 0.1, 0.1, 0.25] * 5) is COOLING
    assert fed(one, [0.1] * 4) is CONVERGED


def test_a_converged_group_is_awakened_by_probes_in_a_row() -> None:
    one = converged()
    assert fed(one, [5.0] * 20) is CONVERGED
    assert one.probe(0.9) is CONVERGED
    assert one.probe(0.3) is CONVERGED
    assert one.probe(0.9) is CONVERGED
    assert one.probe(0.9) is AWAKENED
    assert fed(one, [0.1, 0.1]) is AWAKENED
    assert fed(one, [0.1]) is ACTIVE
    # And can settle again.
    assert fed(one, [0.1] * 7) is CONVERGED


def test_probes_of_other_states_change_nothing() -> None:
    one = cooling()
    before = one.state_dict()
    assert one.probe(9.0) is COOLING and one.state_dict() == before


def test_the_average_remembers() -> None:
    one = Governor("group", GovernorSettings(ema_decay=0.5))
    fed(one, [1.0, 0.0])
    assert one.gradient == 0.5 and one.peak == 1.0 and one.ratio == 0.5
    fed(one, [3.0])
    assert one.gradient == one.peak == 1.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_changes_nothing_but_the_count(value: float) -> None:
    one = cooling()
    before = {**one.state_dict(), "step": one.step + 2, "skipped": 2}
    one.update(Signal(value, 0.0))
    one.update(Signal(0.3, value))
    one.probe(value)
    assert one.state_dict() == before


def test_every_transition_is_told() -> None:
    one, told = governor(), []
    one.subscribe(told.append)
    fed(one, [1.0] * 3 + [0.3] * 3)
    assert told == one.history
    assert (told[0].group, told[0].step, told[0].phase) == ("group", 6, "DECLINING")


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_state_in_json_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    course = [1.0] * 3 + [0.3] * 4 + [0.1] * 3 + [0.9, 0.8] + [0.3] * 4
    whole = governor(ema_decay=0.3)
    fed(whole, course, update=0.001)
    first, second = governor(ema_decay=0.3), governor(ema_decay=0.3)
    fed(first, course[:cut], update=0.001)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fed(second, course[cut:], update=0.001)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("state", "observed", "warm"),
    [
        ("PENDING", None, False),
        ("ACTIVE", None, False),
        ("ACTIVE", True, True),
        ("COOLING", None, True),
        ("CONVERGED", None, True),
        ("AWAKENED", None, True),
    ],
)
def test_a_published_state_is_read(state: str, observed: bool | None, warm: bool) -> None:
    content = {"state": state, "step": 7, "gradient_ema": 0.004, "ema_initialized": True}
    if observed is not None:
        content["peak_observed"] = observed
    one = governor()
    one.load_state_dict(content)
    assert (one.state.value, one.step, one.is_warm) == (state, 7, warm)
    assert one.phase is (Phase.DECLINING if warm else Phase.COLD)


def test_a_group_whose_peak_nobody_knows_does_not_stay_frozen() -> None:
    one = governor()
    one.load_state_dict({"state": "CONVERGED", "step": 7})
    one.probe(0.001), one.probe(0.001)
    assert one.state is AWAKENED


@pytest.mark.parametrize("content", [{}, {"state": "ASLEEP", "step": 1}, {"state": "ACTIVE"}])
def test_what_is_no_state_is_refused(content: dict[str, object]) -> None:
    one = cooling()
    before = one.state_dict()
    with pytest.raises(ValueError, match="state_dict"):
        one.load_state_dict(content)
    assert one.state_dict() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"cooling_window": 0},
        {"ema_decay": 1.0},
        {"converged_threshold": 0.6},
        {"resume_threshold": 0.1},
        {"reactivation_delta": 0.1},
        {"update_threshold": -1.0},
        {"probe_interval": 1.5},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="GovernorSettings"):
        GovernorSettings(**wrong)
