"""What there is of governed training while Trainer trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from ...layers.modes import in_evaluation
from .evaluations import Evaluations
from .forge_gate import ForgeGate
from .history import History
from .opening import Openings
from .optimizers import Rates
from .probe import ProbeData, random_devices
from .routing import BatchRouting
from .state import Governance

if TYPE_CHECKING:
    from .governed_training import GovernedTraining


@dataclass
class GovernedRun:
    """What there is while Trainer trains."""

    machines: Governance
    history: History
    openings: Openings
    rates: Rates
    evaluations: Evaluations | None
    gate: ForgeGate | None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        evaluations, gate, routing = self.evaluations, self.gate, self.openings.routing
        return {
            "machines": self.machines.state_dict(),
            "history": self.history.state_dict(),
            "evaluations": None if evaluations is None else evaluations.trigger.state_dict(),
            "gate": None if gate is None else gate.state_dict(),
            "routing": None if routing is None else routing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: of other groups, or of other machines.
        """
        self.machines.load_state_dict(state["machines"])
        vars(self.history).update(vars(History(**state["history"])))
        if self.evaluations is not None and state["evaluations"] is not None:
            self.evaluations.trigger.load_state_dict(state["evaluations"])
        if self.gate is not None and state["gate"] is not None:
            self.gate.load_state_dict(state["gate"])
        if self.openings.routing is not None and state["routing"] is not None:
            self.openings.routing.load_state_dict(state["routing"])


def new_run(
    governed: GovernedTraining,
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    rates: Rates,
    data: ProbeData,
) -> GovernedRun:
    """What `governed` asks for, at its beginning."""
    history = History()
    machines = governed.machines(state.max_steps)
    members = governed.members()
    routing = (
        None if governed.router is None else BatchRouting(model, members, governed.router, data)
    )
    openings = Openings(
        model,
        members,
        machines,
        history,
        data,
        count_flops=governed.count_flops,
        routing=routing,
    )
    evaluations = gate = None
    if governed.evaluation is not None:
        evaluations = Evaluations(
            governed.dependencies(),
            {n: functools.partial(_aside, one, model) for n, one in governed.metrics.items()},
            governed.evaluation,
            has_data=str(args.eval_strategy.value) != "no",
        )
    if governed.forge is not None:
        gate = ForgeGate(governed.forge_domains, machines.groups, governed.forge)
    return GovernedRun(machines, history, openings, rates, evaluations, gate)


def _aside(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Measured without a trace in the training: no gradients, evaluation mode, its own noise."""
    with in_evaluation(model), torch.no_grad(), torch.random.fork_rng(random_devices(model)):
        return metric(model)
