"""Layers below a delta run once; layers above it run again in the backward pass, if wanted."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.layer_reuse import LowerLayers, checkpointed

UPPER = ["model.layers.1.mlp.down_proj"]


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(3, 300, (rows, 6), generator=torch.Generator().manual_seed(0))


def calls(module: nn.Module) -> list[int]:
    """Grows by one for every run of `module`'s own computation."""
    seen: list[int] = []
    module.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("host", ["llama", "gravity_llama", "gpt2"])
def test_skipped_layers_change_no_bit(host: str, request: pytest.FixtureRequest) -> None:
    model = copy.deepcopy(request.getfixturevalue(host))
    gpt2 = host == "gpt2"
    lower = LowerLayers(model, ["transformer.h.1.mlp.c_proj"] if gpt2 else UPPER)
    ids = tokens()
    with lower.capture():
        expected = model(input_ids=ids, use_cache=False).logits
    ran = calls(model.transformer.h[0] if gpt2 else model.model.layers[0])
    assert lower.usable
    with lower.reused(torch.tensor([0, 1, 2])):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    with lower.reused(torch.tensor([2])):
        one = model(input_ids=ids[2:], use_cache=False).logits
    torch.testing.assert_close(one, expected[2:])
    assert not ran, "the lower layer ran"
    model(input_ids=ids)
    assert ran
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_other_threads_run_all_layers(llama: PreTrainedModel) -> None:
    lower, ids = LowerLayers(llama, UPPER), tokens()
    expected = llama(input_ids=ids).logits
    other = ids.flip(0)
    with lower.capture():
        llama(input_ids=other, use_cache=False)
    found: list[Tensor] = []

    def read() -> None:
        with torch.no_grad():
            found.append(llama(input_ids=ids).logits)

    with lower.reused(torch.arange(3)):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_nothing_is_reused_below_the_first_layer_or_with_more_than_hidden_states(
    llama: PreTrainedModel,
) -> None:
    everywhere = LowerLayers(llama, ["model.layers.0.mlp.down_proj", *UPPER])
    with everywhere.capture():
        llama(input_ids=tokens())
    assert not everywhere.usable
    model = copy.deepcopy(llama)
    model.model.layers[0].register_forward_hook(lambda module, args, output: (output, "more"))
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (args[0][0], *args[1:]) if isinstance(args[0], tuple) else None
    )
    lower = LowerLayers(model, UPPER)
    with lower.capture():
        model(input_ids=tokens(), use_cache=False)
    assert not lower.usable


def test_a_backward_pass_in_another_thread_computes_again_under_the_same_routes(
    llama: PreTrainedModel, random_delta: Callable[..., LowRankDelta]
) -> None:
    """As the engine of a GPU does: that thread has no route of its own."""

    def gradients(checkpointing: bool) -> tuple[list[Tensor], int]:
        model = copy.deepcopy(llama).requires_grad_(False)
        ran = calls(model.model.layers[1])
        delta = random_delta(model, 0)
        pairs = {n: tuple(nn.Parameter(x) for x in pair) for n, pair in delta.factors.items()}
        bank: Any = DeltaBank(model, trainable=True)
        bank.add("a", LowRankDelta(pairs))
        with bank:
            with bank.routed(["a", [], "a"]):
                if checkpointing:
                    with checkpointed(model, list(pairs)):
                        loss = model(input_ids=tokens(), use_cache=False).logits.square().sum()
                else:
                    loss = model(input_ids=tokens(), use_cache=False).logits.square().sum()
            errors: list[BaseException] = []

            def backward() -> None:
                try:
                    loss.backward()
                except BaseException as error:
                    errors.append(error)

            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
            assert not errors
        return [x.grad for pair in pairs.values() for x in pair], len(ran)

    stored, once = gradients(False)
    again, twice = gradients(True)
    assert (once, twice) == (1, 2)
    for one, other in zip(stored, again, strict=True):
        torch.testing.assert_close(one, other)
