"""A router that is fitted to probes finds where the gradient is; one at random does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gravity_hf.training.governed import GradientRouter, RouterSettings
from gravity_hf.training.governed.gradient_router import (
    captured,
    drop_gradients,
    fit_router,
    gradient_shares,
    routed_backward,
)

GROUPS = tuple("abcdef")
TWO = RouterSettings(min_active_groups=2, max_active_groups=2)


class Branches(nn.Module):
    """Each input passes through the two branches that its first two numbers choose."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(8, 1) for _ in GROUPS)

    def forward(self, hidden: Tensor) -> Tensor:
        gates = torch.stack([hidden[..., i] for i in range(len(GROUPS))], -1).mean(1).relu()
        outputs = torch.cat([branch(hidden.mean(1)) for branch in self.branches], -1)
        return (gates * outputs - 1.0).square().sum(-1).mean()

    def members(self) -> dict[str, list[nn.Parameter]]:
        return {n: list(b.parameters()) for n, b in zip(GROUPS, self.branches, strict=True)}


def inputs(count: int, seed: int) -> Tensor:
    """`[count, 3, 8]`: two of the first six numbers are high, the others low."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 3, 8, generator=draw) * 0.1
    hidden[..., : len(GROUPS)] -= 1.0
    for row in hidden:
        row[:, torch.randperm(len(GROUPS), generator=draw)[:2]] += 2.0
    return hidden


def probes(model: Branches, hidden: Tensor) -> Tensor:
    rows = [gradient_shares(model(row[None]), model.members()) for row in hidden]
    return torch.stack(rows)


def test_a_fitted_router_captures_what_the_oracle_does() -> None:
    model, router = Branches(), GradientRouter(8, GROUPS, TWO)
    seen, unseen = inputs(64, 1), inputs(64, 2)
    before = captured(router(unseen).chosen, probes(model, unseen))
    assert before.random == pytest.approx(2 / 6)
    assert before.oracle > 0.99 and before.router < 0.6
    fit_router(router, [(seen, probes(model, seen))], epochs=60)
    after = captured(router(unseen).chosen, probes(model, unseen))
    assert after.router > 0.95 * after.oracle


def test_shares_are_those_of_the_gradient_norms_and_leave_nothing() -> None:
    model = Branches()
    hidden = inputs(4, 1)
    shares = gradient_shares(model(hidden), model.members())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(hidden).backward()
    norms = [
        torch.cat([p.grad.flatten() for p in parameters]).norm()
        for parameters in model.members().values()
    ]
    torch.testing.assert_close(shares, torch.stack(norms) / sum(norms))


def test_a_group_that_the_loss_does_not_reach_has_no_share() -> None:
    model = Branches()
    model.branches[2].requires_grad_(False)
    shares = gradient_shares(model.branches[0](torch.ones(1, 8)).sum(), model.members())
    assert shares.tolist() == [1.0, 0, 0, 0, 0, 0]


def test_the_mask_is_the_choice_with_the_gradient_of_the_scores() -> None:
    router = GradientRouter(8, GROUPS, TWO)
    routing = router(inputs(5, 1))
    assert torch.equal(routing.chosen.sum(-1), torch.full((5,), 2))
    torch.testing.assert_close(routing.mask, routing.chosen.float())
    # The chosen groups are those with the highest scores.
    lowest = routing.scores.masked_fill(~routing.chosen, 2).min(-1).values
    assert (routing.scores.masked_fill(routing.chosen, -1).max(-1).values <= lowest).all()
    through = torch.autograd.grad(routing.mask.sum(), router.up.weight, retain_graph=True)
    direct = torch.autograd.grad(routing.scores.sum(), router.up.weight)
    torch.testing.assert_close(through, direct)


def test_the_entropy_term_draws_scores_to_the_middle() -> None:
    router = GradientRouter(8, GROUPS, RouterSettings(entropy_coefficient=1.0))
    nn.init.constant_(router.up.bias, 3.0)
    hidden = inputs(16, 1)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    start = (router(hidden).scores - 0.5).abs().mean()
    for _ in range(20):
        optimizer.zero_grad()
        router(hidden).entropy_loss.backward()
        optimizer.step()
    assert (router(hidden).scores - 0.5).abs().mean() < 0.8 * start


def test_padding_says_nothing() -> None:
    router, hidden = GradientRouter(8, GROUPS), inputs(2, 1)
    padded = torch.cat([hidden, torch.full((2, 2, 8), 9.0)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    torch.testing.assert_close(router(padded, mask).scores, router(hidden).scores)


def test_inputs_are_planned_by_what_they_were_routed_to() -> None:
    router = GradientRouter(8, GROUPS, TWO)
    routing = router(inputs(20, 1))
    plan = router.plan(routing)
    assert sorted(row for batch in plan for row in batch.rows) == list(range(20))
    assert len({batch.groups for batch in plan}) == len(plan)
    for batch in plan:
        for row in batch.rows:
            flags = routing.chosen[row].tolist()
            assert batch.groups == tuple(n for n, f in zip(GROUPS, flags, strict=True) if f)


def test_groups_that_are_hardly_used_raise_the_entropy() -> None:
    router = GradientRouter(8, GROUPS, RouterSettings(max_active_groups=2, balance_window=10))
    nn.init.zeros_(router.up.weight)
    router.up.bias.data = torch.arange(6.0)
    router.plan(router(inputs(10, 1)))
    assert router.balance() == {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1, "f": 1}
    assert float(router.entropy_coefficient) == pytest.approx(0.02)
    other = GradientRouter(8, GROUPS)
    other.load_state_dict(router.state_dict())
    assert float(other.entropy_coefficient) == pytest.approx(0.02)


def test_groups_get_the_gradients_of_the_inputs_routed_to_them() -> None:
    model, hidden = Branches(), inputs(12, 1)
    model.branches[5].requires_grad_(False)
    router = GradientRouter(8, GROUPS, TWO)
    routing = router(hidden)
    with FlopCounterMode(display=False) as routed:
        loss = routed_backward(
            lambda rows: model(hidden[[*rows]]), router.plan(routing), model.members()
        )
    torch.testing.assert_close(loss, model(hidden).detach())
    assert [b.weight.requires_grad for b in model.branches] == [True] * 5 + [False]
    routed_gradients = [branch.weight.grad for branch in model.branches]
    for place, branch in enumerate(model.branches):
        found = routed_gradients[place]
        model.zero_grad()
        mine = routing.chosen[:, place].nonzero().flatten()
        if not branch.weight.requires_grad or not len(mine):
            assert found is None
            continue
        (model(hidden[mine]) * len(mine) / len(hidden)).backward()
        torch.testing.assert_close(found, branch.weight.grad)
    with FlopCounterMode(display=False) as whole:
        model(hidden).backward()
    assert routed.get_total_flops() < whole.get_total_flops()


def test_a_skipped_group_is_left_alone_by_the_optimizer() -> None:
    model = Branches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {n: [p.clone() for p in ps] for n, ps in model.members().items()}
    model(inputs(4, 1)).backward()
    drop_gradients(model.members(), ["b", "d"])
    optimizer.step()
    for name, parameters in model.members().items():
        same = all(torch.equal(p, q) for p, q in zip(parameters, before[name], strict=True))
        assert same == (name not in ("b", "d"))


def test_more_active_groups_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="min_active_groups"):
        GradientRouter(8, "a", RouterSettings())
    with pytest.raises(ValueError, match="probes"):
        fit_router(GradientRouter(8, GROUPS), [])
