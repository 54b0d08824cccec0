"""What a companion gives back to its host, and the way into the middle of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class GatedWrite(nn.Module):
    """`h + tanh(gate) W(omega)`: the identity in a new model, where `gate` is 0 and yet learns.

    State: `gate` `[]`, where there is one; `proj.*` `[C, D]`.
    """

    def __init__(self, lens_dim: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(())) if gated else None
        self.proj = nn.Linear(lens_dim, width)

    def tokens(self, omega: Tensor, mask: Tensor) -> Tensor:
        """`W(omega)` `[B, T, C]`, 0 where `mask` `[B, T]` is False; `omega` `[B, T, D]`."""
        made = self.proj(omega.to(self.proj.weight.dtype))
        return torch.where(mask.unsqueeze(-1), made, 0.0)

    def forward(self, hidden: Tensor, omega: Tensor, mask: Tensor) -> Tensor:
        """Hidden states `[B, T, C]`, in their own dtype and on their own device."""
        change = self.gate.tanh() * self.tokens(omega, mask)
        return hidden + change.to(hidden.device, hidden.dtype)


@contextmanager
def changed_input(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it is open, `block` reads `change(hidden)`: in this thread, and in no other that runs
    the same model."""
    thread = threading.get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # Another thread may call it without names at the moment when it is removed.
        if threading.get_ident() != thread or kwargs is None:
            return None
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
