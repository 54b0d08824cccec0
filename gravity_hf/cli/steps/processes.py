"""Who does what when several processes work on one model."""

from __future__ import annotations

from datetime import timedelta

from accelerate import PartialState

# The others wait so long for a step that only the main process runs, in seconds.
_WAIT_S = 24 * 3600


def join_processes(use_cpu: bool) -> PartialState:
    """This process among those that the launcher started."""
    return PartialState(cpu=use_cpu, timeout=timedelta(seconds=_WAIT_S))
