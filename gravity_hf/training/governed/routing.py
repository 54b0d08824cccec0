"""Gradients of a batch for the groups alone that a router expects them in."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from .freezing import Members, freeze_all_but
from .gradient_router import GradientRouter, captured, drop_gradients, fit_router, gradient_shares
from .probe import ProbeData, loss_of, mean_over_processes, nothing_left
from .settings import RouterSettings

# Rows of a probe, each with a backward of its own, and passes over them.
_ROWS = 8
_EPOCHS = 20


class BatchRouting:
    """Routes each batch by its embeddings, before the rest of the forward: groups that it is not
    routed to get no gradients, and their part of the backward is not done.

    The router is fitted when training begins and at each probe, to the true shares of every group
    in the gradients of a few rows. What it captured of them before it was fitted is noted.

    Args:
        model: with input embeddings.
        members: its groups.
        settings: of the router.
        data: what it is fitted to.

    Raises:
        ValueError: a model without input embeddings; fewer groups than a batch must be routed to.
    """

    def __init__(
        self, model: nn.Module, members: Members, settings: RouterSettings, data: ProbeData
    ) -> None:
        self.model, self.members, self.data = model, members, data
        self.embeddings = _embeddings_of(model)
        with torch.random.fork_rng([]):
            torch.manual_seed(data.seed)
            width = self.embeddings.weight.shape[1]
            self.router = GradientRouter(width, tuple(members), settings)
        self.router.to(data.device)
        # Groups that learn now, and those of them that a batch of this step was routed to.
        self.open: set[str] = set(members)
        self.routed: set[str] = set()
        self._is_probing = False
        # Before: the embeddings themselves are one of the groups.
        self._hook = self.embeddings.register_forward_pre_hook(self._route, with_kwargs=True)

    def begin(self, opened: set[str]) -> None:
        """A step in which at most these groups learn."""
        self.open, self.routed = set(opened), set()

    def end(self) -> None:
        """After the last backward of a step: what no batch was routed to has no gradient."""
        drop_gradients(self.members, self.routed)

    def fit(self, step: int) -> dict[str, float]:
        """Fit the router to a probe; which share of the gradients it had captured before, beside
        the best choice and one at random."""
        self.router.balance()
        hidden, shares = self._probe(step)
        with torch.no_grad():
            before = captured(self.router(hidden).chosen, shares)
        with torch.enable_grad():
            fit_router(self.router, [(hidden, shares)], epochs=_EPOCHS)
        return {"step": step, **before._asdict()}

    def close(self) -> None:
        """The model without the hook."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the router's tensors as a safetensors file in base64."""
        tensors = {name: t.detach().cpu() for name, t in self.router.state_dict().items()}
        return {"router": base64.b64encode(save(tensors)).decode()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.router.load_state_dict(load(base64.b64decode(state["router"])))

    def _route(self, module: nn.Module, given: Any, named: Any) -> None:
        if not (self.model.training and torch.is_grad_enabled()) or self._is_probing:
            return
        with torch.no_grad():
            # Not called as a module: that would route again.
            scores = self.router(module.forward(*given, **named)).scores
            scores = mean_over_processes(scores.mean(0))
            best = scores.topk(self.router.active).indices
            self.router.note(torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, True))
        chosen = {self.router.groups[i] for i in best.tolist()} & self.open or self.open
        self.routed |= chosen
        freeze_all_but(self.members, chosen, drop=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No batch is routed inside."""
        self._is_probing = True
        try:
            yield
        finally:
            self._is_probing = False

    def _probe(self, step: int) -> tuple[Tensor, Tensor]:
        """Embeddings `[rows, T, width]` and shares `[rows, groups]` of single rows."""
        batch = self.data.batch(step)
        found, shares = [], []

        def keep(module: nn.Module, given: Any, hidden: Tensor) -> None:
            found.append(hidden.detach().float())

        handle = self.embeddings.register_forward_hook(keep)
        try:
            with self.paused(), nothing_left(self.model, self.data.seed + step):
                freeze_all_but(self.members, set(self.members))
                for row in range(min(_ROWS, self.data.rows)):
                    one = {n: x[row : row + 1] for n, x in batch.items() if _is_rows(x)}
                    shares.append(gradient_shares(loss_of(self.model, one), self.members))
        finally:
            handle.remove()
        return torch.cat(found), mean_over_processes(torch.stack(shares))


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _embeddings_of(model: nn.Module) -> Any:
    find = getattr(model, "get_input_embeddings", None)
    found = None if find is None else find()
    if not isinstance(found, nn.Embedding):
        raise ValueError(
            f"GovernedTraining.router: expected a model with input embeddings, got "
            f"{type(model).__name__}. Leave router out"
        )
    return found
