"""Governed training in the chained ledger, and checkpoints tied to it by digests of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...runtime.ledger import Ledger, read_ledger
from ...runtime.ledger_key import key_from_environment
from ...runtime.verification import verify
from .settings import AuditSettings

AGENT = "governed_training"
CHECKPOINT = "governed_checkpoint"
# Lines in memory before they are written together.
_TOGETHER = 50


class Audit:
    """What governed training did, in a ledger: `governed_step` every few steps, each transition and
    activation, each checkpoint with the digest of its weights.

    Args:
        settings: the file and the key of its chain.

    Raises:
        ValueError: `key_env` names a variable that is not set; the file that is there does not
            hold.
    """

    def __init__(self, settings: AuditSettings) -> None:
        self.settings = settings
        key = _key(settings)
        if os.path.exists(settings.path):
            report = verify(settings.path, key=key)
            if not report.ok:
                raise ValueError(
                    f"GovernedTraining.audit: expected a ledger whose chain holds, got {report}. "
                    "Keep the file for whoever looks into it, and name a new one"
                )
        self.ledger = Ledger(
            AGENT, settings.path, max_memory_entries=_TOGETHER, fsync=settings.fsync, key=key
        )

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        """Every `settings.every` steps."""
        if step % self.settings.every == 0:
            self.ledger.log("governed_step", {"step": step, **line})

    def event(self, event: str, line: Mapping[str, Any]) -> None:
        """Written at once, with the steps that waited."""
        self.ledger.log(event, dict(line))
        self.ledger.flush()

    def checkpoint(self, step: int, folder: str, digest: str) -> None:
        """Ties a checkpoint to its weights."""
        self.event(CHECKPOINT, {"step": step, "folder": folder, "weights": digest})

    def check_weights(self, step: int, digest: str) -> None:
        """Raise ValueError unless the last checkpoint noted for `step` had these weights; a step
        that has none was saved before there was this file."""
        self.ledger.flush()
        if not os.path.exists(self.settings.path):
            return
        noted = [
            entry.payload["weights"]
            for entry in read_ledger(self.settings.path)
            if entry.event == CHECKPOINT and entry.payload["step"] == step
        ]
        if noted and noted[-1] != digest:
            raise ValueError(
                f"GovernedTraining: expected the weights that {self.settings.path} notes for step "
                f"{step} ({noted[-1][:16]}...), got others ({digest[:16]}...): the checkpoint was "
                "changed, or is another run's. Resume from another one"
            )

    def close(self) -> None:
        """Write what waits."""
        self.ledger.flush()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters and saved buffers, in the order of their names: names, dtypes,
    shapes and bytes. Tied weights count under each of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        head = f"{name}\0{data.dtype}\0{tuple(data.shape)}\0"
        total.update(head.encode())
        total.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _key(settings: AuditSettings) -> bytes | None:
    return None if settings.key_env is None else key_from_environment(settings.key_env)
