"""Training curves are what was logged; the control stands beside what it is a control of."""

from __future__ import annotations

from typing import Any

from gravity_hf.viz.histories import (
    TrainingCurve,
    panels_of_results,
    panels_of_trainer_state,
)

LOG: list[dict[str, Any]] = [{"step": 10, "loss": 2.5, "grad_norm": 0.5}, {"step": 20, "loss": 2.0}]


def _results(**training: Any) -> dict[str, Any]:
    return {"training": {"transfer": None, "lora": None, "control": None, **training}}


def test_the_control_stands_beside_lora() -> None:
    (panel,) = panels_of_results(_results(lora={"losses": LOG}, control={"losses": LOG[:1]}))
    assert list(panel.curves) == ["host, same budget", "gravity"]
    assert panel.curves["gravity"].steps == (10, 20)
    assert panel.curves["gravity"].losses == (2.5, 2.0)
    assert "nats per token" in panel.label


def test_an_objective_with_a_teacher_is_not_compared_with_the_control() -> None:
    lora = {"losses": LOG, "objective": {"logits": 1.0}}
    panels = panels_of_results(_results(lora=lora, control={"losses": LOG}))
    assert [list(panel.curves) for panel in panels] == [["gravity"], ["host, same budget"]]
    assert "nats" not in panels[0].label


def test_runs_that_are_not_there_make_no_panel() -> None:
    assert panels_of_results(_results()) == ()
    assert panels_of_results({"training": None}) == ()
    assert panels_of_results(_results(control={"left_out": "an encoder"})) == ()


def test_gradient_norms_are_there_where_every_entry_has_one() -> None:
    assert TrainingCurve.of_log(LOG).gradient_norms is None
    assert TrainingCurve.of_log(LOG[:1]).gradient_norms == (0.5,)


def test_a_trainers_log_has_other_entries_too() -> None:
    log = [*LOG, {"step": 20, "eval_loss": 9.0}, {"step": 20, "train_runtime": 1.0}]
    (panel,) = panels_of_trainer_state({"log_history": log})
    assert panel.curves["gravity"].losses == (2.5, 2.0)
    assert panels_of_trainer_state({"log_history": []}) == ()
