"""Groups of parameters that get gradients, and groups that do not for a while."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

Members = Mapping[str, Sequence[nn.Parameter]]


def freeze_all_but(members: Members, trainable: Collection[str], *, drop: bool = True) -> None:
    """Only the groups `trainable` require gradients from now on; the others have none, unless
    `drop` is False: then they keep those of earlier batches.

    A frozen weight's gradient is never computed: autograd asks each linear map only for the
    gradients that something needs. An optimiser passes a parameter without a gradient over, decay
    included, and keeps its moments for later.
    """
    for name, parameters in members.items():
        wanted = name in trainable
        for parameter in parameters:
            parameter.requires_grad_(wanted)
            if not wanted and drop:
                parameter.grad = None


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Whatever requires a gradient inside, afterwards it is as it was; gradients are dropped."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)
            parameter.grad = None
