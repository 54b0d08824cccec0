"""Observers of the model as it is: gravity's own outputs flow on, not the host's."""

from __future__ import annotations

from torch import Tensor

from .attention import AttentionCall
from .observers import Agreement, Moments, Observer


class _Following(Observer):
    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        self.look(call)
        return call.gravity()


class FollowingMoments(_Following, Moments):
    """`Moments` of a model that attends by gravity."""


class FollowingAgreement(_Following, Agreement):
    """`Agreement` on a model that attends by gravity."""
