"""The machines together: what one decides is what the next one shares."""

from __future__ import annotations

from gravity_hf.training.governed import BudgetSettings, GovernorSettings, GovernorState
from gravity_hf.training.governed.state import Governance


def test_a_group_that_a_probe_awakens_has_its_share_in_the_next_step() -> None:
    machines = Governance(
        dict.fromkeys("abc", 0),
        100,
        governors=GovernorSettings(reactivation_probes=1),
        hierarchy=None,
        budget=BudgetSettings(eval_window=1000),
    )
    sleeper = machines.governors["a"]
    converged = {"state": "CONVERGED", "peak": 1.0}
    sleeper.load_state_dict({**sleeper.state_dict(), **converged})
    machines.advance(1, {})
    budget = machines.budget
    assert budget is not None and budget.multipliers()["a"] == 0.0
    floor = budget.allocations["a"]

    outcome = machines.probe(1, {"a": 0.9})
    assert [change.new_state for change in outcome.changes] == ["AWAKENED"]
    assert machines.states["a"] is GovernorState.AWAKENED
    assert budget.allocations["a"] > floor
    assert machines.multipliers(1) == budget.multipliers()
    assert sum(budget.allocations.values()) <= 1 + 1e-12
