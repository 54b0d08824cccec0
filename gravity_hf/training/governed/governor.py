"""The state of one group of parameters: learning, cooling, converged, or awakened.

    PENDING --activate--> ACTIVE <-> COOLING --> CONVERGED --> AWAKENED --> ACTIVE

Signals have no scale: a gradient is measured against the largest that the same group has had, and
an update against the weights that it moves. So a group of a hundred thousand parameters and one of
a hundred million have the same thresholds, and clipping, which hides how large gradients are, does
not change a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol

from .settings import GovernorSettings


class GovernorState(str, Enum):
    """Of one group."""

    PENDING = "PENDING"
    ACTIVE = "ACTIVE"
    COOLING = "COOLING"
    CONVERGED = "CONVERGED"
    AWAKENED = "AWAKENED"

    @property
    def learns(self) -> bool:
        """Whether the group gets gradients and steps."""
        return self not in (GovernorState.PENDING, GovernorState.CONVERGED)


class Phase(str, Enum):
    """Where a group's gradient stands, whatever its state."""

    COLD = "COLD"
    WARMING = "WARMING"
    ACTIVE_LEARNING = "ACTIVE_LEARNING"
    DECLINING = "DECLINING"


class StepSignal(Protocol):
    """What `Governor.update` reads."""

    @property
    def gradient(self) -> float: ...

    @property
    def update(self) -> float | None: ...


class Signal(NamedTuple):
    """Of one group in one optimiser step.

    Attributes:
        gradient: root mean square of its gradient, before clipping.
        update: the length of its last update over the length of its weights; None: not measured.
    """

    gradient: float
    update: float | None = None


class Transition(NamedTuple):
    """A change of state."""

    group: str
    old_state: str
    new_state: str
    step: int
    gradient: float
    ratio: float
    phase: str


Subscriber = Callable[[Transition], None]


class Governor:
    """The state machine of one group.

    Args:
        group: its name, for messages and transitions.
        settings: thresholds and windows.
        pending: whether the group waits for `activate`.
    """

    def __init__(
        self, group: str, settings: GovernorSettings | None = None, *, pending: bool = False
    ) -> None:
        self.group = group
        self.settings = settings or GovernorSettings()
        self.state = GovernorState.PENDING if pending else GovernorState.ACTIVE
        self.phase = Phase.COLD
        self.step = 0
        # Moving averages; None before the first update since the group (again) began to learn.
        self.gradient: float | None = None
        self.update_size: float | None = None
        self.first_gradient: float | None = None
        self.peak = 0.0
        # Updates that passed the cold floor, as many as are needed to call the group warm.
        self.warm_updates = 0
        # Signals that were not finite: steps that a loss scaler has skipped, mostly.
        self.skipped = 0
        self.history: list[Transition] = []
        self._counters = dict.fromkeys(("quiet", "loud", "confirmed", "awake", "probes"), 0)
        self._subscribers: list[Subscriber] = []

    @property
    def ratio(self) -> float:
        """The gradient over its peak, 0 to 1; 1 before there is one."""
        if self.gradient is None or self.peak <= 0.0:
            return 1.0
        return min(self.gradient / self.peak, 1.0)

    @property
    def remaining(self) -> float:
        """The gradient over the first one, 0 to 1: how much is left to learn; 1 at first."""
        if self.gradient is None or not self.first_gradient:
            return 1.0
        return min(self.gradient / self.first_gradient, 1.0)

    @property
    def is_warm(self) -> bool:
        """Whether the group has ever had gradients to speak of."""
        return self.warm_updates >= self.settings.warm_window

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every transition from now on."""
        self._subscribers.append(subscriber)

    def activate(self) -> GovernorState:
        """PENDING becomes ACTIVE; any other state stays."""
        if self.state is GovernorState.PENDING:
            self._restart()
            self._enter(GovernorState.ACTIVE)
        return self.state

    def update(self, signal: StepSignal | float) -> GovernorState:
        """Take the signal of one optimiser step; the state after it.

        A group that does not learn (PENDING, CONVERGED) has no signal and stays as it is, and so
        does every group where the signal is not finite.

        Args:
            signal: see `Signal`; a number is a gradient without an update.
        """
        gradient, update = _parts(signal)
        if not self.state.learns:
            return self.state
        self.step += 1
        if not (math.isfinite(gradient) and (update is None or math.isfinite(update))):
            self.skipped += 1
            return self.state
        self._measure(gradient, update)
        if self.state is GovernorState.ACTIVE:
            self._from_active()
        elif self.state is GovernorState.COOLING:
            self._from_cooling()
        else:
            self._from_awakened()
        return self.state

    def probe(self, gradient: float) -> GovernorState:
        """Take the root mean square gradient of a probe of a converged group: it is awakened after
        `reactivation_probes` probes in a row over `reactivation_delta`. Other states stay."""
        if self.state is not GovernorState.CONVERGED or not math.isfinite(gradient):
            return self.state
        # A group whose peak is not known (an old state) has no reason to stay frozen.
        ratio = gradient / self.peak if self.peak > 0.0 else math.inf
        if self._lasts("probes", ratio > self.settings.reactivation_delta) >= (
            self.settings.reactivation_probes
        ):
            self._restart()
            self._enter(GovernorState.AWAKENED)
        return self.state

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "state": self.state.value,
            "gradient_phase": self.phase.value,
            "step": self.step,
            "gradient_ema": self.gradient,
            "update_ema": self.update_size,
            "first_gradient": self.first_gradient,
            "peak": self.peak,
            "warm_updates": self.warm_updates,
            "skipped": self.skipped,
            "counters": dict(self._counters),
            "transition_history": [transition._asdict() for transition in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. One of the published software is read too: its absolute gradient has
        no peak here, so the averages begin anew; a group that was past ACTIVE counts as warm.

        Raises:
            ValueError: no state of a governor; nothing is changed.
        """
        try:
            new_state = GovernorState(state["state"])
            step = int(state["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Governor.load_state_dict: {self.group}: expected what state_dict() gives, got "
                f"{state!r:.100}"
            ) from error
        if "peak" not in state:
            self._load_published(state, new_state, step)
            return
        self.state, self.step = new_state, step
        self.phase = Phase(state["gradient_phase"])
        self.gradient, self.update_size = state["gradient_ema"], state["update_ema"]
        self.first_gradient, self.peak = state["first_gradient"], float(state["peak"])
        self.warm_updates, self.skipped = int(state["warm_updates"]), int(state["skipped"])
        self._counters = {name: int(state["counters"][name]) for name in self._counters}
        self.history = [Transition(**entry) for entry in state["transition_history"]]

    def _load_published(
        self, state: Mapping[str, Any], new_state: GovernorState, step: int
    ) -> None:
        past_active = new_state not in (GovernorState.PENDING, GovernorState.ACTIVE)
        warm = bool(state.get("peak_observed", past_active))
        self._restart()
        self.state, self.step = new_state, step
        self.phase = Phase.DECLINING if warm else Phase.COLD
        self.peak, self.first_gradient, self.skipped = 0.0, None, 0
        self.warm_updates = self.settings.warm_window if warm else 0
        self.history = []

    def _measure(self, gradient: float, update: float | None) -> None:
        decay = self.settings.ema_decay
        self.gradient = _average(self.gradient, gradient, decay)
        if update is not None:
            self.update_size = _average(self.update_size, update, decay)
        self.peak = max(self.peak, self.gradient)
        above = gradient > self.settings.cold_floor
        if above:
            self.warm_updates = min(self.warm_updates + 1, self.settings.warm_window)
            if self.first_gradient is None:
                self.first_gradient = gradient
        if not self.is_warm:
            self.phase = Phase.WARMING if above else Phase.COLD
        else:
            quiet = self.ratio < self.settings.cooling_threshold
            self.phase = Phase.DECLINING if quiet else Phase.ACTIVE_LEARNING

    def _moves(self) -> bool:
        threshold = self.settings.update_threshold
        return threshold is not None and (self.update_size or 0.0) > threshold

    def _from_active(self) -> None:
        quiet = self.is_warm and self.ratio < self.settings.cooling_threshold and not self._moves()
        if self._lasts("quiet", quiet) >= self.settings.cooling_window:
            self._enter(GovernorState.COOLING)

    def _from_cooling(self) -> None:
        loud = self.ratio > self.settings.resume_threshold or self._moves()
        if self._lasts("loud", loud) >= self.settings.resume_window:
            self._enter(GovernorState.ACTIVE)
            return
        low = self.ratio < self.settings.converged_threshold and not self._moves()
        if self._lasts("confirmed", low) >= self.settings.confirmation_window:
            self._enter(GovernorState.CONVERGED)

    def _from_awakened(self) -> None:
        if self._lasts("awake", True) >= self.settings.reactivation_warmup:
            self._enter(GovernorState.ACTIVE)

    def _lasts(self, counter: str, holds: bool) -> int:
        """How many times in a row `holds`, this one included."""
        self._counters[counter] = self._counters[counter] + 1 if holds else 0
        return self._counters[counter]

    def _restart(self) -> None:
        """The averages; what a group once was says little of what it learns now."""
        self.gradient = self.update_size = None
        self._counters = dict.fromkeys(self._counters, 0)

    def _enter(self, state: GovernorState) -> None:
        transition = Transition(
            group=self.group,
            old_state=self.state.value,
            new_state=state.value,
            step=self.step,
            gradient=0.0 if self.gradient is None else self.gradient,
            ratio=self.ratio,
            phase=self.phase.value,
        )
        self.state = state
        self._counters = dict.fromkeys(self._counters, 0)
        self.history.append(transition)
        for subscriber in self._subscribers:
            subscriber(transition)


def _average(past: float | None, value: float, decay: float) -> float:
    return value if past is None else decay * past + (1 - decay) * value


def _parts(signal: StepSignal | float) -> tuple[float, float | None]:
    if isinstance(signal, int | float):
        return float(signal), None
    update = signal.update
    return float(signal.gradient), None if update is None else float(update)
