"""Which groups an input gives gradients to, foreseen before its backward.

A small network reads the mean hidden state of an input and scores the groups. It learns from an
oracle: on probe inputs the true share of each group in the gradient is measured, and its scores are
fitted to them. How good it is says `captured`: the share of the gradient that the chosen groups
have, beside that of the best choice of as many, and of a choice at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .settings import RouterSettings

_LEAST_WIDTH = 16


class Routing(NamedTuple):
    """What the router says of a batch.

    Attributes:
        scores: `[B, groups]`, 0 to 1.
        mask: `[B, groups]`, the choice with the gradient of the scores (straight through).
        chosen: `[B, groups]`, bool.
        entropy_loss: scalar: adding it to a loss keeps scores from settling at 0 and 1.
    """

    scores: Tensor
    mask: Tensor
    chosen: Tensor
    entropy_loss: Tensor


class MicroBatch(NamedTuple):
    """Inputs that were routed to the same groups: `rows` of the batch, names of the `groups`."""

    rows: tuple[int, ...]
    groups: tuple[str, ...]


class Captured(NamedTuple):
    """Shares of the gradient, means over inputs, that three choices of as many groups have."""

    router: float
    oracle: float
    random: float


class GradientRouter(nn.Module):
    """Scores of groups from hidden states.

    Args:
        hidden_size: of the model.
        groups: names, in the order of the scores.
        settings: see there.

    Raises:
        ValueError: fewer groups than an input must be routed to.
    """

    def __init__(
        self, hidden_size: int, groups: Sequence[str], settings: RouterSettings | None = None
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.settings = settings or RouterSettings()
        least, most = self.settings.min_active_groups, self.settings.max_active_groups
        self.active = max(least, most or len(self.groups) // 2)
        if self.active > len(self.groups):
            raise ValueError(
                f"GradientRouter: expected {self.active} groups or more, got {len(self.groups)}. "
                "Lower min_active_groups or max_active_groups"
            )
        width = max(hidden_size // self.settings.hidden_divisor, _LEAST_WIDTH)
        self.down = nn.Linear(hidden_size, width)
        self.up = nn.Linear(width, len(self.groups))
        # Buffers: what a checkpoint has to hold besides the weights.
        self.entropy_coefficient: Tensor
        self.routed: Tensor
        self.inputs: Tensor
        first = torch.tensor(self.settings.entropy_coefficient)
        self.register_buffer("entropy_coefficient", first)
        self.register_buffer("routed", torch.zeros(len(self.groups), dtype=torch.long))
        self.register_buffer("inputs", torch.zeros((), dtype=torch.long))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Routing:
        """Route inputs.

        Args:
            hidden: `[B, T, hidden_size]`, such as the embeddings; no gradient goes into it.
            mask: `[B, T]`, 0 where there is padding.
        """
        scores = self.logits(hidden, mask).sigmoid()
        best = scores.topk(self.active, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        straight = chosen.to(scores.dtype) - scores.detach() + scores
        entropy = (torch.special.entr(scores) + torch.special.entr(1 - scores)).mean()
        return Routing(scores, straight, chosen, -self.entropy_coefficient * entropy)

    def logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, groups]` of the mean hidden state of each input."""
        hidden = hidden.detach().to(self.down.weight.dtype)
        if mask is None:
            mean = hidden.mean(1)
        else:
            weights = mask.to(hidden.dtype)[..., None]
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return self.up(nn.functional.gelu(self.down(mean)))

    def loss(self, hidden: Tensor, shares: Tensor, mask: Tensor | None = None) -> Tensor:
        """How far the scores are from the oracle: cross-entropy with each group's share over the
        largest, so that the order of scores is that of shares.

        Args:
            hidden: `[B, T, hidden_size]`.
            shares: `[B, groups]`, true shares of the gradient; see `gradient_shares`.
            mask: as in `forward`.
        """
        largest = shares.max(-1, keepdim=True).values.clamp(min=torch.finfo(shares.dtype).tiny)
        target = (shares / largest).to(self.down.weight.dtype)
        fit = nn.functional.binary_cross_entropy_with_logits(self.logits(hidden, mask), target)
        return fit + self.forward(hidden, mask).entropy_loss

    def plan(self, routing: Routing) -> list[MicroBatch]:
        """Inputs sorted by what they were routed to: a micro-batch of them needs no gradients of
        all the other groups. Notes the use of groups for `balance`."""
        found: dict[tuple[str, ...], list[int]] = {}
        for row, flags in enumerate(routing.chosen.tolist()):
            names = tuple(name for name, wanted in zip(self.groups, flags, strict=True) if wanted)
            found.setdefault(names, []).append(row)
        self.note(routing.chosen)
        return [MicroBatch(tuple(rows), names) for names, rows in found.items()]

    def note(self, chosen: Tensor) -> None:
        """Count the use of groups for `balance`; `[B, groups]` or `[groups]`, bool."""
        rows = chosen.reshape(-1, len(self.groups))
        self.routed += rows.sum(0)
        self.inputs += len(rows)

    def balance(self) -> dict[str, float]:
        """By group, the share of the inputs noted of late that were routed to it. After
        `balance_window` inputs the weight of the entropy follows, and counting begins anew."""
        inputs = int(self.inputs)
        shares = (self.routed / max(inputs, 1)).tolist()
        use = dict(zip(self.groups, shares, strict=True))
        if inputs >= self.settings.balance_window:
            first = self.settings.entropy_coefficient
            if min(shares) < self.settings.utilization_floor:
                self.entropy_coefficient.fill_(min(first * self.settings.entropy_boost, 1.0))
            else:
                self.entropy_coefficient.mul_(0.9).clamp_(min=first)
            self.routed.zero_()
            self.inputs.zero_()
        return use


def gradient_shares(loss: Tensor, members: Mapping[str, Sequence[nn.Parameter]]) -> Tensor:
    """The share of each group in the gradient of `loss`: its norm over the sum of all norms.

    Nothing is added to any `.grad`. A group that the loss does not reach has 0.

    Args:
        loss: scalar, with its graph, which is used up.
        members: parameters by group, in the order of the result; those that require no gradient
            count for nothing.

    Returns:
        `[groups]`, float32.
    """
    wanted = [p for parameters in members.values() for p in parameters if p.requires_grad]
    gradients = dict(
        zip(
            map(id, wanted),
            torch.autograd.grad(loss, wanted, allow_unused=True),
            strict=True,
        )
    )
    norms = []
    for parameters in members.values():
        found = [g for p in parameters if (g := gradients.get(id(p))) is not None]
        squares = [g.detach().float().square().sum() for g in found]
        norms.append(torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(()).float())
    row = torch.stack(norms)
    return row / row.sum().clamp(min=torch.finfo(torch.float32).tiny)


def captured(chosen: Tensor, shares: Tensor) -> Captured:
    """How much of the gradient the chosen groups have.

    Args:
        chosen: `[B, groups]`, bool, as many in each row.
        shares: `[B, groups]`, true shares, of 1 together in each row.
    """
    count = int(chosen[0].sum())
    oracle = shares.topk(count, dim=-1).values.sum(-1)
    return Captured(
        router=float((shares * chosen).sum(-1).mean()),
        oracle=float(oracle.mean()),
        # The expectation over all choices of `count` groups.
        random=float(shares.sum(-1).mean()) * count / chosen.shape[-1],
    )


def fit_router(
    router: GradientRouter,
    probes: Iterable[tuple[Tensor, Tensor]],
    *,
    learning_rate: float = 1e-2,
    epochs: int = 50,
) -> float:
    """Fit the router to probes; its last mean loss.

    Args:
        router: in place.
        probes: hidden states `[B, T, hidden_size]` and true shares `[B, groups]`.
        learning_rate: of Adam.
        epochs: passes over all probes.

    Raises:
        ValueError: no probes.
    """
    rows = list(probes)
    if not rows:
        raise ValueError("fit_router: expected probes (hidden states and shares), got none")
    optimizer = torch.optim.Adam(router.parameters(), lr=learning_rate)
    mean = 0.0
    for _ in range(epochs):
        losses = []
        for hidden, shares in rows:
            optimizer.zero_grad()
            loss = router.loss(hidden, shares)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
    return mean


def routed_backward(
    loss_of: Callable[[tuple[int, ...]], Tensor],
    plan: Sequence[MicroBatch],
    members: Mapping[str, Sequence[nn.Parameter]],
) -> Tensor:
    """Backward of a batch in which each input gives gradients to the groups it was routed to.

    Micro-batch by micro-batch, all other groups require no gradients, so that theirs are never
    computed; what a group gets adds up in `.grad`. Afterwards the flags are as they were.

    Args:
        loss_of: rows of the batch to their mean loss.
        plan: see `GradientRouter.plan`.
        members: parameters by group.

    Returns:
        The mean loss of the batch, detached.
    """
    flags = {p: p.requires_grad for parameters in members.values() for p in parameters}
    count = sum(len(batch.rows) for batch in plan)
    losses = []
    try:
        for batch in plan:
            for name, parameters in members.items():
                for parameter in parameters:
                    parameter.requires_grad_(flags[parameter] and name in batch.groups)
            loss = loss_of(batch.rows) * (len(batch.rows) / count)
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
    finally:
        for parameter, wanted in flags.items():
            parameter.requires_grad_(wanted)
    return torch.stack(losses).sum()


def drop_gradients(members: Mapping[str, Sequence[nn.Parameter]], kept: Iterable[str]) -> None:
    """Gradients of all groups but `kept` become None: an optimiser then passes them over, where a
    gradient of zeros would still decay and move them."""
    wanted = set(kept)
    for name, parameters in members.items():
        if name not in wanted:
            for parameter in parameters:
                parameter.grad = None
