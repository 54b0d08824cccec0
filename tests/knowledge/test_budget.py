"""What a fact may cost is counted before anything is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from gravity_hf.knowledge.budget import base_parameters, check_budget, delta_parameters
from gravity_hf.knowledge.errors import BudgetError
from gravity_hf.knowledge.targets import target_modules


def test_counts_what_a_delta_holds(llama: PreTrainedModel, gpt2: PreTrainedModel) -> None:
    assert delta_parameters(llama, target_modules(llama), 3) == 3 * 2 * (64 + 32)
    assert delta_parameters(gpt2, target_modules(gpt2), 1) == 2 * (128 + 32)


def test_counts_the_base_once_and_without_adapters(
    llama: PreTrainedModel, gpt2: PreTrainedModel
) -> None:
    peft = pytest.importorskip("peft")
    assert base_parameters(llama) == llama.num_parameters()
    assert base_parameters(gpt2) == gpt2.num_parameters()  # its embeddings are tied
    wrapped = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"]))
    assert base_parameters(wrapped) == llama.num_parameters()


def test_counts_packed_weights_as_what_they_stand_for() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    packed = torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8)  # 4 bit, as bitsandbytes packs
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    assert base_parameters(model) == 64 * 32


def test_says_what_would_fit(llama: PreTrainedModel) -> None:
    names = target_modules(llama)
    base = base_parameters(llama)
    exact = 2 * 2 * 96 / base
    assert check_budget(llama, names, 2, exact * 1.0001) == 384
    assert check_budget(llama, names, 2, exact / 5 * 1.0001, facts=5) == 384
    with pytest.raises(BudgetError) as caught:
        check_budget(llama, names, 2, exact * 0.6)
    message = str(caught.value)
    assert "got 384: rank 2 on 2 maps" in message
    assert "rank 1 on all of them" in message
    assert f"rank 2 on 1 of them ({names[0]})" in message
    needed = float(message.rsplit("budget_fraction=")[1])
    assert check_budget(llama, names, 2, needed) == 384
    with pytest.raises(BudgetError, match="What fits: budget_fraction="):
        check_budget(llama, names, 2, 1e-9)
