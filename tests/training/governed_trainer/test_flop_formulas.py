"""Counted arithmetic: fused attention is in it, with fewer key-value heads too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils import flop_counter as torch_counter
from training.governed_trainer.governed_cases import RandomText, tiny_llama

from gravity_hf.training.governed import ParameterGroups
from gravity_hf.training.governed.flop_formulas import (
    attention_backward_flops,
    attention_flops,
    flop_counter,
)
from gravity_hf.training.governed.probe import ProbeData, backward_flops

SHAPES = (2, 4, 6, 8), (2, 2, 5, 8), (2, 2, 5, 3)
CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def counted(model: torch.nn.Module) -> tuple[int, int]:
    members = {group.name: group.trained_parameters for group in ParameterGroups.of(model)}
    collate = torch.utils.data.default_collate
    data = ProbeData(RandomText(), collate, rows=2, seed=0, device=torch.device("cpu"))
    return backward_flops(model, members, set(members), data)


def test_attention_counts_as_the_matrix_products_that_it_stands_for() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in SHAPES)
    with flop_counter() as forward:
        weights = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)
        out = weights @ v.repeat_interleave(2, 1)
    with flop_counter() as backward:
        out.sum().backward()
    assert attention_flops(*SHAPES) == forward.get_total_flops()
    again = 2 * q.numel() * k.shape[-2]
    total = attention_backward_flops(out.shape, *SHAPES)
    assert total == backward.get_total_flops() + again


def test_the_cpu_s_fused_attention_is_counted() -> None:
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 4, 8, 16)
    with flop_counter() as counter:
        functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert counter.get_total_flops() == 4 * 4 * 8 * 8 * 16


def test_fewer_key_value_heads_are_counted_where_torch_s_own_formula_refuses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11 raised for a Llama with grouped heads."""

    def strict(*shapes: Any, **options: Any) -> int:
        raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")

    kernels = (CPU_KERNEL, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
    for kernel in kernels:
        monkeypatch.setitem(torch_counter.flop_registry, kernel, strict)
    grouped = tiny_llama(attention_dropout=0.0)
    assert grouped.config.num_key_value_heads < grouped.config.num_attention_heads
    fused, eager = counted(grouped), counted(tiny_llama(attn_implementation="eager"))
    # All but the scores, which the fused backward computes once more in each layer.
    again = 2 * 2 * (2 * 2 * 8 * 8 * 8)
    assert fused == (eager[0], eager[1] + again)
