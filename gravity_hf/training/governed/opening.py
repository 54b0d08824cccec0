"""Which groups of a model learn at a step: opened for it, probed while they are frozen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from .freezing import Members, freeze_all_but
from .history import History, key_of
from .probe import ProbeData, backward_flops, probe_gradients
from .routing import BatchRouting
from .state import Governance, StepOutcome

# Sets of groups whose arithmetic is counted at most; with `apply="duty"` there may be many.
_COUNTED = 64


class Openings:
    """Opens the groups that take the next step, and probes those that take none.

    Args:
        model: what is trained.
        members: its groups.
        machines: who decides.
        history: where arithmetic and probes are noted.
        data: what is probed with.
        count_flops: whether arithmetic is counted.
        routing: chooses among the groups that are open, batch by batch; None: they all learn.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Members,
        machines: Governance,
        history: History,
        data: ProbeData,
        *,
        count_flops: bool,
        routing: BatchRouting | None = None,
    ) -> None:
        self.model = model
        self.members = members
        self.machines = machines
        self.history = history
        self.data = data
        self.count_flops = count_flops
        self.routing = routing

    def check_paths(self) -> None:
        """Every group that learns at the start must get a gradient, with the others frozen.

        Raises:
            ValueError: one gets none; it is named.
        """
        wanted = self.machines.learning()
        gradients = self._gradients(wanted, 0)
        cut = sorted(name for name, value in gradients.items() if not value > 0)
        if cut:
            raise ValueError(
                f"GovernedTraining: expected a gradient in every group that learns from the "
                f"start, got none in {cut} on a training batch: what is between them and the loss "
                "gives zeros (an output head of zeros, say) or is not part of the loss. Give the "
                "head other initial weights, put it into level 0, or pass hierarchy=None"
            )

    def open(self, step: int) -> None:
        """Let the groups learn that take the optimiser step number `step`, 0-based."""
        wanted = self.machines.on_duty(step) or self.machines.learning()
        self.count(set(self.machines.groups))
        self.count(wanted)
        freeze_all_but(self.members, wanted)
        if self.routing is not None:
            fitted = self.history.captured
            # A resumed run has the fit of the step it begins with.
            known = bool(fitted) and fitted[-1]["step"] == step
            if step % self.machines.probe_interval == 0 and not known:
                fitted.append(self.routing.fit(step))
            self.routing.begin(wanted)

    def close(self) -> None:
        """Every group may learn again, and nothing is routed."""
        freeze_all_but(self.members, set(self.members))
        if self.routing is not None:
            self.routing.close()

    def probe(self, step: int) -> StepOutcome:
        """Probe the converged groups where it is time to."""
        frozen = self.machines.converged()
        if not frozen or step % self.machines.probe_interval:
            return StepOutcome((), ())
        gradients = self._gradients(frozen, step)
        self.count(frozen)
        self.history.probes.append({"step": step, "gradients": gradients})
        return self.machines.probe(step, gradients)

    def count(self, groups: set[str]) -> None:
        """Count the arithmetic of a batch in which these groups learn, once for each set."""
        flops, key = self.history.flops, key_of(groups)
        if self.count_flops and key not in flops and len(flops) < _COUNTED:
            with self._unrouted():
                counted = backward_flops(self.model, self.members, groups, self.data)
            flops[key] = list(counted)

    def _gradients(self, wanted: set[str], step: int) -> dict[str, float]:
        with self._unrouted():
            return probe_gradients(self.model, self.members, wanted, self.data, step)

    def _unrouted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.routing is None else self.routing.paused()
