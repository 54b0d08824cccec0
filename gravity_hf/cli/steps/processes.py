"""Who does what when several processes work on one model."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState

from ...training.recipe import WAIT_S


def join_processes(use_cpu: bool) -> PartialState:
    """This process among those that the launcher started."""
    return PartialState(cpu=use_cpu, timeout=timedelta(seconds=WAIT_S))
