"""Which maps a bank takes: tokens must belong to rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import ValidationError


def test_refuses_experts_whose_tokens_come_from_many_rows() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    delta = LowRankDelta({"experts.0": (torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(ValidationError, match="an expert sees tokens of many rows"):
        DeltaBank(Mixture()).add("a", delta)


def test_flattened_tokens_belong_to_their_rows() -> None:
    """Some models give their maps `[batch * T, in]`."""
    model = nn.Sequential(nn.Linear(4, 3))
    delta = LowRankDelta({"0": (torch.randn(2, 4), torch.randn(3, 2))})
    bank = DeltaBank(model)
    bank.add("a", delta)
    x = torch.randn(3, 5, 4)
    with bank.routed([["a"], [], ["a"]]):
        torch.testing.assert_close(model(x.reshape(15, 4)).reshape(3, 5, 3), model(x))
        assert torch.equal(model(x)[1], model[0].forward(x)[1])
