"""The switch for everything sparse in a model."""

from __future__ import annotations

import pytest
from torch import nn

from gravity_hf.layers.sparse_feed_forward import SparseFeedForward
from gravity_hf.layers.sparsity_policy import sparsity


class Attention(nn.Module):
    attention_policy = "sparse"


def layer(policy: str) -> SparseFeedForward:
    maps = (nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4))
    sizes = {"hidden_size": 4, "intermediate_size": 8, "block_size": 2, "gate_rank": 1}
    return SparseFeedForward(*maps, activation=nn.SiLU(), sparsity=0.5, policy=policy, **sizes)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(layer("block"), layer("masked"), Attention())


def policies(model: nn.Sequential) -> list[str]:
    return [model[0].policy, model[1].policy, model[2].attention_policy]


def test_policies_hold_inside_and_come_back(model: nn.Sequential) -> None:
    with sparsity(model, feed_forward="dense", attention="dense") as same:
        assert same is model
        assert policies(model) == ["dense", "dense", "dense"]
    assert policies(model) == ["block", "masked", "sparse"]


def test_what_is_not_named_stays(model: nn.Sequential) -> None:
    with sparsity(model, attention="dense"):
        assert policies(model) == ["block", "masked", "dense"]


def test_policies_come_back_after_an_error(model: nn.Sequential) -> None:
    with pytest.raises(KeyError), sparsity(model, feed_forward="dense"):
        raise KeyError
    assert policies(model) == ["block", "masked", "sparse"]


def test_unknown_policies_and_models_without_any_are_refused(model: nn.Sequential) -> None:
    with pytest.raises(ValueError, match="one of dense, sparse or None, got 'none'"):
        sparsity(model, attention="none").__enter__()
    with pytest.raises(ValueError, match="Call sparsify_feed_forward"):
        sparsity(nn.Linear(2, 2), feed_forward="dense").__enter__()
    assert policies(model) == ["block", "masked", "sparse"]
