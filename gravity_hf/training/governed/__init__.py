"""Governed training: groups of parameters that learn when, and as fast as, they have reason to.

Groups (`ParameterGroups`), a machine of states for each (`Governor`), levels that begin one after
another (`Hierarchy`), one budget shared between them (`Budget`), metrics computed when something
changed (`EvaluationTrigger`), and `GovernedTraining`, which plugs them into transformers' Trainer.
"""

from __future__ import annotations

import importlib

# Public name -> the module that defines it.
_EXPORTS = {
    "AuditSettings": ".settings",
    "Budget": ".budget",
    "BudgetSettings": ".settings",
    "EvaluationSettings": ".settings",
    "EvaluationTrigger": ".evaluation_trigger",
    "ForgeGate": ".forge_gate",
    "ForgeGateSettings": ".settings",
    "GovernedTraining": ".governed_training",
    "Governor": ".governor",
    "GovernorSettings": ".settings",
    "GovernorState": ".governor",
    "GradientRouter": ".gradient_router",
    "Hierarchy": ".hierarchy",
    "HierarchySettings": ".settings",
    "LossContribution": ".contribution",
    "ParameterGroup": ".groups",
    "ParameterGroups": ".groups",
    "RouterSettings": ".settings",
    "Signal": ".governor",
    "allocate": ".budget",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
