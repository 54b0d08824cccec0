"""True forces, measured in a forward that runs anyway."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..runtime.mirror import MirrorLayer
from ..runtime.mirror_report import MirrorReport
from ..runtime.watching import observed_modules
from .damping import mean_force


class ForceWatch:
    """Lets a mirror see the next forward of a model, and no other.

    Args:
        mirror: what watches.
    """

    def __init__(self, mirror: MirrorLayer) -> None:
        self.mirror = mirror
        self._watching = ExitStack()
        self._seen = False

    def arm(self, model: nn.Module) -> None:
        """Watch the next forward of `model`; one without gravity has no forces to watch."""
        self.disarm()
        if not observed_modules(model):
            return
        self._watching.enter_context(self.mirror.watch(model))
        hook = model.register_forward_hook(self._leave, always_call=True)
        self._watching.callback(hook.remove)

    def disarm(self) -> None:
        """Watch nothing more."""
        self._watching.close()
        self._seen = False

    def collect(self) -> MirrorReport | None:
        """The mirror's report on the forward that was watched; None where there was none."""
        seen = self._seen
        self.disarm()
        return self.mirror.report() if seen else None

    def _leave(self, model: nn.Module, arguments: Any, output: Any) -> None:
        # At once, so that nothing that fails later leaves an observer behind.
        self._watching.close()
        self._seen = output is not None


def force_over_processes(report: MirrorReport, device: torch.device) -> float:
    """The mean force of a report, averaged over all processes of a distributed run: damping must
    be the same in each, or their models come apart. All of them must call it."""
    force = mean_force(report)
    if not (dist.is_available() and dist.is_initialized()):
        return force
    shared = torch.tensor(force, device=device)
    dist.all_reduce(shared)
    return float(shared) / dist.get_world_size()
