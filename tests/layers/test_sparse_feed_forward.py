"""The sparse feed-forward layer: one choice per token, three ways to use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gravity_hf.layers.low_rank import LowRankLinear, linear
from gravity_hf.layers.neuron_order import reorder, restore_order
from gravity_hf.layers.neuron_selection import top_blocks
from gravity_hf.layers.sparse_feed_forward import SparseFeedForward
from gravity_hf.layers.sparsity_policy import sparsity

WIDTH, NEURONS, SIZE = 32, 96, 8
MAPS = {"full": None, "low-rank": 12}


def make(maps: str = "full", seed: int = 0, **changes: Any) -> SparseFeedForward:
    torch.manual_seed(seed)
    rank = MAPS[maps]
    settings = {"block_size": SIZE, "sparsity": 0.75, "gate_rank": 6, "policy": "masked", **changes}
    return SparseFeedForward(
        linear(WIDTH, NEURONS, rank),
        linear(WIDTH, NEURONS, rank),
        linear(NEURONS, WIDTH, rank),
        activation=nn.SiLU(),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        **settings,
    ).eval()


def gradients(layer: SparseFeedForward, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    leaves = [x, *(p for n, p in layer.named_parameters() if "predictor" not in n)]
    return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y))]


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("impl", ["rows", "gathered", "grouped", "grouped_mm"])
def test_block_policy_equals_masked_to_rounding(impl: str, maps: str) -> None:
    layer, x = make(maps), torch.randn(3, 7, WIDTH)
    expected = gradients(layer, x)
    layer.policy, layer.impl = "block", impl
    for a, b in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["dense", "masked", "block"])
@pytest.mark.parametrize("maps", MAPS)
def test_no_token_depends_on_a_later_one(maps: str, policy: str) -> None:
    layer = make(maps, policy=policy)
    layer.impl = "grouped"
    x = torch.randn(1, 40, WIDTH)
    before = layer(x)
    for place in (1, 17, 39):
        changed = x.clone()
        changed[:, place:] = torch.randn(1, 40 - place, WIDTH) * 3
        assert torch.equal(layer(changed)[:, :place], before[:, :place])


def test_masked_leaves_exactly_the_kept_blocks() -> None:
    layer, x = make(), torch.randn(5, WIDTH)
    seen = []
    layer.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layer(x)
    active = seen[0].unflatten(-1, (-1, SIZE)).ne(0).any(-1)
    assert active.sum(-1).tolist() == [layer.keep] * 5 == [3] * 5
    rows = torch.arange(5)[:, None]
    assert active[rows, layer.choose(x)].all()


def test_nothing_left_out_is_the_dense_layer() -> None:
    layer, x = make(sparsity=0.0), torch.randn(5, WIDTH)
    dense = layer.down_proj(layer.neurons(x))
    assert torch.equal(layer(x), dense)
    layer.policy = "dense"
    assert torch.equal(layer(x), dense)


def test_gate_loss_trains_the_predictor_and_nothing_else() -> None:
    layer, x = make(policy="dense").train(), torch.randn(5, WIDTH, requires_grad=True)
    _, loss = layer.forward_with_loss(x)
    loss.backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"predictor.down.weight", "predictor.up.weight"}
    assert x.grad is None
    assert all(p.grad.abs().sum() > 0 for p in layer.predictor.parameters())


def test_mask_is_straight_through_in_training() -> None:
    """Forward the mask; backward the sigmoid of the scores, of blocks left out too."""
    layer, x = make().train(), torch.randn(4, WIDTH)
    down = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    scores = layer.scores(x).detach().requires_grad_()
    hidden = layer.neurons(x).detach().unflatten(-1, (-1, SIZE))
    soft = (hidden * scores.sigmoid().unsqueeze(-1)).flatten(-2)
    (expected,) = torch.autograd.grad(layer.down_proj(soft), scores, down)
    found: list[Tensor] = []

    def watch(_: nn.Module, __: Any, scores: Tensor) -> None:
        scores.register_hook(found.append)

    layer.predictor.register_forward_hook(watch)
    y = layer(x)
    y.backward(down)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(y, layer.eval()(x), rtol=0, atol=0)


def test_training_a_predictor_is_never_skipped() -> None:
    layer, x = make().train(), torch.randn(70, WIDTH)
    expected = layer(x)
    layer.policy, layer.impl = "block", "grouped"
    layer(x).sum().backward()
    assert torch.equal(layer(x), expected)
    assert layer.predictor.up.weight.grad.abs().sum() > 0


class _Doubled(nn.Linear):
    """A map whose weight is not what it multiplies with, as of a quantized one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_maps_that_are_not_what_they_seem_are_masked_instead() -> None:
    layer, x = make(), torch.randn(6, WIDTH)
    layer.up_proj = _Doubled(WIDTH, NEURONS)
    expected = layer(x)
    layer.policy, layer.impl = "block", "grouped"
    assert torch.equal(layer(x), expected)
    hooked = make("low-rank", policy="block")
    hooked.impl = "grouped"
    hooked.gate_proj.register_forward_hook(lambda *given: 2 * given[2])
    with sparsity(hooked, feed_forward="masked"):
        expected = hooked(x)
    assert torch.equal(hooked(x), expected)


def test_maps_whose_weights_are_elsewhere_are_called() -> None:
    """accelerate puts a `forward` of its own on maps whose weights are offloaded."""
    accelerate = pytest.importorskip("accelerate")
    layer, x = make(policy="block"), torch.randn(70, WIDTH)
    layer.impl = "grouped"
    before = layer(x)
    accelerate.cpu_offload(layer)
    assert layer.gate_proj.weight.is_meta
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)


def test_activation_that_is_trained_gets_its_gradient() -> None:
    layer, x = make(policy="block"), torch.randn(70, WIDTH)
    layer.impl, layer.activation = "grouped", nn.PReLU()
    layer(x).sum().backward()
    assert layer.activation.weight.grad.abs() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_skipping_trains_under_gradient_checkpointing(reentrant: bool) -> None:
    layer, x = make(policy="block"), torch.randn(70, WIDTH).requires_grad_()
    layer.impl = "grouped"
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("impl", ["auto", "rows", "gathered", "grouped"])
def test_no_tokens_are_no_error(impl: str) -> None:
    layer = make(policy="block")
    layer.impl = impl
    assert layer(torch.zeros(2, 0, WIDTH)).shape == (2, 0, WIDTH)


def test_block_policy_follows_autocast() -> None:
    layer, x = make(policy="block"), torch.randn(70, WIDTH)
    layer.impl = "grouped"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_low_rank_predictor_begins_with_a_choice() -> None:
    assert isinstance(make().predictor, LowRankLinear)
    assert make().scores(torch.randn(3, WIDTH)).abs().min() > 0


@pytest.mark.parametrize("policy", ["dense", "masked", "block"])
def test_every_policy_compiles_into_one_graph(policy: str) -> None:
    layer, x = make(policy=policy), torch.randn(2, 80, WIDTH)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("maps", MAPS)
def test_reordered_neurons_compute_the_same_and_come_back(maps: str) -> None:
    layer, x = make(maps, policy="dense"), torch.randn(4, WIDTH)
    before, weights = layer(x), {n: p.clone() for n, p in layer.named_parameters()}
    for seed in (1, 2):
        reorder(layer, torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed)))
    assert not torch.equal(layer.neurons(x), make(maps).neurons(x))
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
    restore_order(layer)
    assert all(torch.equal(p, weights[n]) for n, p in layer.named_parameters())


def test_half_precision_ties_choose_as_the_rule_says() -> None:
    layer, x = make().bfloat16(), torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16)
    assert layer.choose(x).tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert torch.equal(layer.choose(x), top_blocks(layer.scores(x), 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 7}, "divisor of intermediate_size 96, got 7"),
        ({"sparsity": 1.0}, "0 <= sparsity < 1, got 1.0"),
        ({"gate_rank": 0}, "1 or more, got 0"),
        ({"policy": "fast"}, "one of dense, masked, block, got 'fast'"),
        ({"keep": 13}, "1 to 12 blocks, got 13"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)
