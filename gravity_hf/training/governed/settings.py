"""Settings of governed training: frozen, checked, made of plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Direction = Literal["lower", "higher"]

_DIRECTIONS: dict[str, Direction] = {
    "perplexity": "lower",
    "belief_injection": "higher",
    "semantic_routing": "higher",
    "attention_sparsity": "higher",
    "base_weight_integrity": "higher",
    "adaptive_depth": "lower",
}
_IMPORTANCE = {
    "perplexity": 1.0,
    "belief_injection": 0.8,
    "semantic_routing": 0.6,
    "attention_sparsity": 0.4,
    "base_weight_integrity": 1.0,
    "adaptive_depth": 0.3,
}


@dataclass(frozen=True)
class GovernorSettings:
    """When a group of parameters counts as cooling, converged or awakened.

    Two signals without a scale decide. The *gradient* is the moving average of the group's root
    mean square gradient, before clipping, over the largest that this average has been: 1 at the
    peak. The *update* is the moving average of the length of the optimiser's step over the length
    of the weights. A group is quiet only where both are low: in the first 400 steps of a byte-level
    Llama (0.3 M parameters, AdamW at 1e-3) gradients fell to 0.2 to 0.6 of their peaks while the
    loss still fell and updates were 0.002 to 0.01, so gradients alone say little.

    Attributes:
        cooling_threshold: gradient below which an active group is quiet.
        cooling_window: quiet updates in a row before it cools.
        resume_threshold: gradient above which a cooling group is active again; above
            `cooling_threshold`, so that noise does not move it back and forth.
        resume_window: such updates in a row.
        converged_threshold: gradient below which a cooling group is converged.
        confirmation_window: such updates in a row.
        update_threshold: update above which no group is quiet; None asks for the gradient alone.
        reactivation_delta: gradient above which a probe of a converged group awakens it; above
            `converged_threshold`.
        reactivation_probes: such probes in a row.
        reactivation_warmup: updates for which it is called awakened.
        ema_decay: weight of the past in the moving averages.
        cold_floor: root mean square gradient that a group must have passed, `warm_window` times,
            before it may cool: one that has never learnt anything has not converged.
        warm_window: as said.
        probe_interval: steps between two probes of the converged groups.
    """

    cooling_threshold: float = 0.4
    cooling_window: int = 50
    resume_threshold: float = 0.5
    resume_window: int = 5
    converged_threshold: float = 0.2
    confirmation_window: int = 100
    update_threshold: float | None = 0.002
    reactivation_delta: float = 0.3
    reactivation_probes: int = 2
    reactivation_warmup: int = 20
    ema_decay: float = 0.99
    cold_floor: float = 1e-8
    warm_window: int = 10
    probe_interval: int = 50

    def __post_init__(self) -> None:
        for name in ("cooling", "resume", "confirmation", "warm"):
            _at_least(self, f"{name}_window", 1)
        for name in ("reactivation_probes", "reactivation_warmup", "probe_interval"):
            _at_least(self, name, 1)
        _fraction(self, "ema_decay", below_one=True)
        _positive(self, "cold_floor", "reactivation_delta")
        _positive(self, "converged_threshold", "cooling_threshold", "resume_threshold")
        if self.update_threshold is not None:
            _positive(self, "update_threshold")
        _ordered(self, "converged_threshold", "cooling_threshold", "resume_threshold")
        _ordered(self, "converged_threshold", "reactivation_delta")


@dataclass(frozen=True)
class HierarchySettings:
    """When the groups of a level begin to learn, coarse to fine.

    Attributes:
        lr_multipliers: by level: how much faster than the others a level learns when it is
            activated; falls to 1 in `warmup_steps`.
        warmup_steps: as said.
        patience_fraction: of all steps: how long a level waits at most for the one below it to
            cool; None waits until `emergency_fraction`.
        emergency_fraction: of all steps: then every level that still waits is activated.
    """

    lr_multipliers: Mapping[int, float] = field(
        default_factory=lambda: {0: 1.0, 1: 1.5, 2: 1.0, 3: 2.0}
    )
    warmup_steps: int = 100
    patience_fraction: float | None = 0.05
    emergency_fraction: float = 0.8

    def __post_init__(self) -> None:
        # Keys of JSON are text.
        multipliers = {int(level): float(value) for level, value in self.lr_multipliers.items()}
        object.__setattr__(self, "lr_multipliers", multipliers)
        for level, value in multipliers.items():
            if not 0 < value < math.inf:
                raise _wrong(self, f"lr_multipliers[{level}]", "a finite number above 0", value)
        _at_least(self, "warmup_steps", 0)
        _fraction(self, "emergency_fraction")
        if self.patience_fraction is not None:
            _fraction(self, "patience_fraction")


@dataclass(frozen=True)
class BudgetSettings:
    """How one budget is shared between the groups.

    Attributes:
        master_budget: the sum of all shares.
        floor_fraction: of it: the least that a group gets.
        ceiling_fraction: of it: the most.
        alpha: weight of a group's gradient (over its peak) in its need.
        beta: weight of its share of what the loss lost.
        gamma: weight of how much of its first gradient is left.
        eval_window: steps between two allocations.
        reserve_converged: whether a converged group keeps its floor, or nothing.
        least_multiplier: bounds of what a share does to a learning rate.
        most_multiplier: as `least_multiplier`.
    """

    master_budget: float = 1.0
    floor_fraction: float = 0.02
    ceiling_fraction: float = 0.40
    alpha: float = 0.33
    beta: float = 0.33
    gamma: float = 0.34
    eval_window: int = 50
    reserve_converged: bool = True
    least_multiplier: float = 0.25
    most_multiplier: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "master_budget", "least_multiplier", "most_multiplier")
        _fraction(self, "floor_fraction", zero=True)
        _fraction(self, "ceiling_fraction")
        _ordered(self, "floor_fraction", "ceiling_fraction")
        _ordered(self, "least_multiplier", "most_multiplier")
        _at_least(self, "eval_window", 1)
        for name in ("alpha", "beta", "gamma"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise _wrong(self, name, "a number from 0 to 1", getattr(self, name))


@dataclass(frozen=True)
class AuditSettings:
    """Where the course of a run is written down.

    Attributes:
        path: the `.jsonl` file of a ledger.
        key_env: name of the environment variable that holds the key of its chain; None: no key,
            and whoever can write the file can write it anew.
        every: steps between two `governed_step` lines.
        fsync: wait for the disk at every write.
    """

    path: str | Path
    key_env: str | None = None
    every: int = 10
    fsync: bool = True

    def __post_init__(self) -> None:
        _at_least(self, "every", 1)
        if self.key_env is not None and not self.key_env.isidentifier():
            raise _wrong(self, "key_env", "the name of an environment variable", self.key_env)


@dataclass(frozen=True)
class EvaluationSettings:
    """When a metric is computed again.

    Attributes:
        max_evaluations_per_window: at most so many in `window_steps`.
        window_steps: as said.
        importance: of a metric, times its staleness: which comes first; 0.5 where none is given.
        directions: whether "lower" or "higher" is better; "lower" where none is given.
        regression_threshold: how much worse than the best of late a value may be, as a fraction.
        regression_window: such values in a row are a regression.
        staleness_steps: a metric that was not computed for so long is due without any change of
            state; None: never.
    """

    max_evaluations_per_window: int = 10
    window_steps: int = 100
    importance: Mapping[str, float] = field(default_factory=_IMPORTANCE.copy)
    directions: Mapping[str, Direction] = field(default_factory=_DIRECTIONS.copy)
    regression_threshold: float = 0.05
    regression_window: int = 3
    staleness_steps: int | None = 1000

    def __post_init__(self) -> None:
        for name in ("importance", "directions"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        _at_least(self, "max_evaluations_per_window", 1)
        _at_least(self, "window_steps", 1)
        _at_least(self, "regression_window", 1)
        if self.staleness_steps is not None:
            _at_least(self, "staleness_steps", 1)
        _positive(self, "regression_threshold")
        for metric, value in self.importance.items():
            if not (_is_number(value) and 0 <= value < math.inf):
                raise _wrong(self, f"importance[{metric!r}]", "0 or more", value)
        for metric, direction in self.directions.items():
            if direction not in ("lower", "higher"):
                raise _wrong(self, f"directions[{metric!r}]", "'lower' or 'higher'", direction)


@dataclass(frozen=True)
class RouterSettings:
    """Of the network that predicts which groups an input gives gradients to.

    Attributes:
        hidden_divisor: its hidden size is that of the model over this, 16 at least.
        min_active_groups: an input is routed to so many at least.
        max_active_groups: and so many at most; None: half of all.
        entropy_coefficient: weight of the term that keeps scores from 0 and 1.
        utilization_floor: a group that fewer inputs than this share are routed to raises it.
        entropy_boost: by this factor.
        balance_window: inputs between two looks at that.
    """

    hidden_divisor: int = 4
    min_active_groups: int = 2
    max_active_groups: int | None = None
    entropy_coefficient: float = 0.01
    utilization_floor: float = 0.1
    entropy_boost: float = 2.0
    balance_window: int = 100

    def __post_init__(self) -> None:
        for name in ("hidden_divisor", "min_active_groups", "balance_window"):
            _at_least(self, name, 1)
        if self.max_active_groups is not None:
            _at_least(self, "max_active_groups", 1)
        _positive(self, "entropy_boost")
        _fraction(self, "utilization_floor", zero=True)
        coefficient = self.entropy_coefficient
        if not (_is_number(coefficient) and 0 <= coefficient <= 1):
            raise _wrong(self, "entropy_coefficient", "from 0 to 1", self.entropy_coefficient)


@dataclass(frozen=True)
class ForgeGateSettings:
    """When facts of a domain may be added to a model.

    Attributes:
        stability_window: steps in a row for which all groups of the domain were converged.
        acceptance_threshold: quality from which a fact is accepted; and the share of accepted
            facts below which the groups of a domain ask for more budget.
        feedback_boost: so many times their need.
        feedback_results: of the last so many facts.
    """

    stability_window: int = 100
    acceptance_threshold: float = 0.5
    feedback_boost: float = 1.5
    feedback_results: int = 20

    def __post_init__(self) -> None:
        _at_least(self, "stability_window", 1)
        _at_least(self, "feedback_results", 1)
        _fraction(self, "acceptance_threshold", zero=True)
        _positive(self, "feedback_boost")


def _wrong(settings: object, name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{type(settings).__name__}.{name}: expected {expected}, got {got!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least(settings: object, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(settings, name, f"an integer of {least} or more", value)


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (_is_number(value) and 0 < value < math.inf):
            raise _wrong(settings, name, "a finite number above 0", value)


def _fraction(settings: object, name: str, *, zero: bool = False, below_one: bool = False) -> None:
    value = getattr(settings, name)
    if (
        not (_is_number(value) and 0 <= value <= 1)
        or (value == 0 and not zero)
        or (value == 1 and below_one)
    ):
        start = "0" if zero else "above 0"
        raise _wrong(settings, name, f"{start} to {'below ' if below_one else ''}1", value)


def _ordered(settings: object, *names: str) -> None:
    values = [getattr(settings, name) for name in names]
    if any(low > high for low, high in zip(values, values[1:], strict=False)):
        raise _wrong(settings, " <= ".join(names), "values in this order", tuple(values))
