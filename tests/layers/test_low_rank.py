"""Linear maps in two factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gravity_hf.layers.low_rank import LowRankLinear, factor_stds, linear


def test_it_is_the_map_of_the_product_of_its_factors() -> None:
    layer, x = LowRankLinear(6, 10, 3).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.shape == (10, 6)


def test_a_rank_above_both_widths_is_the_smaller_of_them() -> None:
    assert LowRankLinear(6, 10, 50).rank == 6
    assert LowRankLinear(10, 6, 50).rank == 6


@pytest.mark.parametrize("rank", [4, 64])
def test_outputs_vary_at_the_start_as_those_of_a_dense_map(rank: int) -> None:
    x = torch.randn(512, 128)
    dense = torch.stack([nn.Linear(128, 96, bias=False)(x).var() for _ in range(20)]).mean()
    layers = [LowRankLinear(128, 96, rank, bias=False) for _ in range(20)]
    low = torch.stack([layer(x).var() for layer in layers]).mean()
    assert 0.85 < low / dense < 1.15


def test_normal_factors_vary_as_a_normal_dense_weight() -> None:
    layer, x = LowRankLinear(128, 256, 16, bias=False), torch.randn(512, 128)
    for weight, std in zip(
        (layer.down.weight, layer.up.weight), factor_stds(128, 16, 0.02), strict=True
    ):
        nn.init.normal_(weight, std=std)
    assert 0.8 < layer(x).std() / (0.02 * 128**0.5) < 1.2


def test_every_tensor_gets_a_gradient_at_the_start() -> None:
    layer = LowRankLinear(8, 8, 2)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("rank", [None, 0])
def test_no_rank_is_a_dense_map(rank: int | None) -> None:
    assert type(linear(4, 6, rank, bias=False)) is nn.Linear


def test_a_rank_is_two_factors_with_the_bias_behind_both() -> None:
    layer = linear(4, 6, 2)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "down.weight": (2, 4),
        "up.weight": (6, 2),
        "up.bias": (6,),
    }


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank: expected 1 or more, got 0.*linear\("):
        LowRankLinear(4, 6, 0)


def test_lora_adapts_the_factors() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(LowRankLinear(8, 8, 2), LowRankLinear(8, 8, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["down", "0.up"]))
    trained = {n.split(".lora_")[0] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{x}" for x in ("0.down", "0.up", "1.down")}
    x = torch.randn(3, 8)
    torch.testing.assert_close(adapted(x), adapted.merge_and_unload()(x))
