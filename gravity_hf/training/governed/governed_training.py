"""Governed training of a model under transformers' Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .groups import AUTO, ParameterGroups
from .report import report_of
from .settings import (
    AuditSettings,
    BudgetSettings,
    EvaluationSettings,
    ForgeGateSettings,
    GovernorSettings,
    HierarchySettings,
    RouterSettings,
)
from .state import Apply, Governance

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from .callback import GovernedCallback
    from .forge_gate import ForgeGate

APPLIES = ("lr", "duty", "none")
_GOVERNORS = GovernorSettings()
_HIERARCHY = HierarchySettings()
_BUDGET = BudgetSettings()
_EVALUATION = EvaluationSettings()
_SETTINGS: dict[str, type] = {
    "governors": GovernorSettings,
    "hierarchy": HierarchySettings,
    "budget": BudgetSettings,
    "audit": AuditSettings,
    "evaluation": EvaluationSettings,
    "forge": ForgeGateSettings,
    "router": RouterSettings,
}


class GovernedTraining:
    """Groups of parameters that learn when, and as fast as, they have reason to.

    Each group has a state (`Governor`): once converged it gets no gradients, so that the backward
    pass leaves out its part, and is probed now and then. Levels of groups begin one after another
    (`Hierarchy`). One budget is shared between those that learn (`Budget`) and multiplies the
    scheduled rates. Metrics are computed when something has changed, and all of it can be written
    into a chained ledger.

    Works in one process and under DDP, in float32 and with bf16; a run goes on from Trainer's
    checkpoints as if it had not been stopped. Trainer's own clipping is taken over, because
    gradients have to be read before it: the norm is clipped at `max_grad_norm` all the same. Under
    `torch_compile` every new set of groups that learns is compiled anew.

    Args:
        groups: "auto" (by the model's family), or a taxonomy: a JSON file, or its content.
        governors: when a group is converged; None: never.
        hierarchy: when levels begin; None: all at once.
        budget: how rates are shared; None: not at all.
        audit: the ledger; None: none.
        evaluation: what change makes Trainer evaluate, apart from its own `eval_steps`; None: none.
        router: settings of a `GradientRouter` by which each batch gives gradients to some groups
            only; None: to every group that learns.
        apply: what a share of the budget does: "lr" multiplies the rate, "duty" lets the group step
            less often, "none" is only noted. Levels multiply rates in any case.
        freeze: False only notes that groups have converged.
        metrics: further metrics that a change makes due: functions of the model, by their names in
            the taxonomy.
        forge: when facts may be added; None: not followed.
        forge_domains: by domain, the groups that have to be converged first.
        count_flops: count floating-point operations, on one batch for every set of groups.

    Raises:
        ValueError: settings that do not go together.

    Example:
        >>> governed = GovernedTraining()
        >>> trainer = Trainer(
        ...     model, args, train_dataset=data, callbacks=[governed.callback()],
        ...     optimizers=governed.optimizers(model, args),
        ... )
        >>> trainer.train()
        >>> governed.report()["flops"]
    """

    def __init__(
        self,
        groups: str | os.PathLike[str] | Mapping[str, Any] = AUTO,
        governors: GovernorSettings | None = _GOVERNORS,
        hierarchy: HierarchySettings | None = _HIERARCHY,
        budget: BudgetSettings | None = _BUDGET,
        audit: AuditSettings | None = None,
        evaluation: EvaluationSettings | None = _EVALUATION,
        router: RouterSettings | None = None,
        apply: Apply = "lr",
        *,
        freeze: bool = True,
        metrics: Mapping[str, Callable[[nn.Module], float]] | None = None,
        forge: ForgeGateSettings | None = None,
        forge_domains: Mapping[str, Sequence[str]] | None = None,
        count_flops: bool = True,
    ) -> None:
        if apply not in APPLIES:
            raise ValueError(f"GovernedTraining.apply: expected one of {APPLIES}, got {apply!r}")
        if (forge is None) != (not forge_domains):
            raise ValueError(
                "GovernedTraining.forge: expected forge together with forge_domains, got "
                f"{forge!r} and {forge_domains!r}"
            )
        self.groups = groups
        self.governors = governors
        self.hierarchy = hierarchy
        self.budget = budget
        self.audit = audit
        self.evaluation = evaluation
        self.router = router
        self.apply: Apply = apply
        self.freeze = freeze
        self.metrics = dict(metrics or {})
        self.forge = forge
        self.forge_domains = dict(forge_domains or {})
        self.count_flops = count_flops
        self._groups: ParameterGroups | None = None
        self._callback: GovernedCallback | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GovernedTraining:
        """From what JSON holds: names of the constructor, settings as objects or null.

        Raises:
            ValueError: a name that there is not, or a value that does not fit.
        """
        known = ("groups", "apply", "freeze", "forge_domains", "count_flops", *_SETTINGS)
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise ValueError(f"GovernedTraining: expected only {sorted(known)}, got {unknown}")
        values = dict(content)
        for name, kind in _SETTINGS.items():
            if values.get(name) is not None:
                values[name] = _settings(name, kind, values[name])
        return cls(**values)

    def optimizers(
        self, model: nn.Module, args: TrainingArguments, gravity_scale: float | None = None
    ) -> tuple[torch.optim.Optimizer, None]:
        """What Trainer takes as `optimizers`; it makes the schedule itself.

        Args:
            model: that Trainer is given; what requires gradients now is what is trained.
            args: Trainer's.
            gravity_scale: see `gravity_param_groups`.

        Raises:
            ValueError: a parameter that is in no group, or in two; an optimiser without groups.
        """
        # Late: Trainer takes seconds to import.
        from .optimizers import governed_optimizer

        if self._callback is not None:
            # What it had frozen would count as never to be trained.
            self._callback.leave()
        self._groups = ParameterGroups.of(model, self.groups)
        return governed_optimizer(model, args, self.members(), gravity_scale), None

    def callback(self) -> GovernedCallback:
        """The one callback of this governed training, for Trainer's `callbacks`."""
        from .callback import GovernedCallback

        if self._callback is None:
            self._callback = GovernedCallback(self)
        return self._callback

    def report(self) -> dict[str, Any]:
        """What has happened; see `report_of`.

        Raises:
            RuntimeError: nothing has been trained yet.
        """
        callback = self._callback
        if callback is None or callback.run is None:
            raise RuntimeError(
                "GovernedTraining.report: expected a run, got none. Train with "
                "Trainer(callbacks=[governed.callback()], optimizers=governed.optimizers(...))"
            )
        run = callback.run
        return report_of(run.machines, run.history, self.sizes(), callback.samples())

    @property
    def forge_gate(self) -> ForgeGate | None:
        """The gate of the run, where `forge` is followed: asked before facts are added."""
        callback = self._callback
        return None if callback is None or callback.run is None else callback.run.gate

    def parameter_groups(self) -> ParameterGroups:
        """Of the model that `optimizers` was given.

        Raises:
            ValueError: it was given none.
        """
        if self._groups is None:
            raise ValueError(
                "GovernedTraining: expected an optimiser of its own, got another. Pass "
                "optimizers=governed.optimizers(model, args) to Trainer"
            )
        return self._groups

    def members(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The parameters that are trained, by group; groups without any are left out."""
        found = {group.name: group.trained_parameters for group in self.parameter_groups()}
        return {name: parameters for name, parameters in found.items() if parameters}

    def sizes(self) -> dict[str, int]:
        """How many numbers each group trains."""
        return {n: sum(p.numel() for p in parameters) for n, parameters in self.members().items()}

    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """By metric, the groups that it depends on; all of them where the taxonomy knows none."""
        known = self.parameter_groups().dependencies
        every = tuple(self.members())
        return {**dict.fromkeys(("perplexity", *self.metrics), every), **known}

    def machines(self, total_steps: int) -> Governance:
        """New ones, for a run of so many optimiser steps."""
        groups = self.parameter_groups()
        return Governance(
            {name: groups[name].level for name in self.members()},
            total_steps,
            governors=self.governors,
            hierarchy=self.hierarchy,
            budget=self.budget,
            freeze=self.freeze,
            apply=self.apply,
        )


def read_settings(source: str) -> dict[str, Any]:
    """What `GovernedTraining.from_dict` takes, from a JSON object or the file that has it; nothing
    for "".

    Raises:
        ValueError: neither.
    """
    text = source.strip()
    if not text:
        return {}
    try:
        if not text.startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--governed_settings: expected a JSON object or a file with one, got {source!r} "
            f"({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"--governed_settings: expected a JSON object, got {content!r:.80}")
    return content


def _settings(name: str, kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    known = {one.name for one in fields(kind)}
    if not isinstance(value, Mapping) or set(value) - known:
        raise ValueError(
            f"GovernedTraining.{name}: expected an object with some of {sorted(known)}, or null, "
            f"got {value!r}"
        )
    return kind(**value)
