"""Projections learn from the frozen host, and what their choice keeps is measured with controls."""

from __future__ import annotations

import pytest
import torch
from hosts import logits, tiny_host
from integration.sparse_cases import BUDGET, SINGLE, gravity_host, inputs_of, sparse_host

from gravity_hf import densify_attention, sparsify_attention
from gravity_hf.integration.screening_fit import (
    ScreeningReport,
    fit_principal,
    fit_screening,
    measure_screening,
)
from gravity_hf.integration.sparse_settings import sparse_modules


@pytest.fixture(scope="module")
def fitted() -> tuple[torch.nn.Module, dict[str, torch.Tensor], ScreeningReport]:
    torch.manual_seed(0)
    model = tiny_host("qwen2", initializer_range=0.35)
    model.requires_grad_(False)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    sparsify_attention(model, SINGLE, screening="learned", screen_dim=2)
    batches = [inputs_of(length=60), inputs_of(length=48)]
    held_out = [inputs_of(batch=3, length=64)]
    report = fit_screening(model, batches, steps=60, rows=16, evaluation=held_out, progress=False)
    return model, state, report


def test_what_is_learnt_finds_more_than_a_random_projection(fitted):
    _, _, report = fitted
    assert report.after.screening > report.before.screening + 0.02
    assert sum(report.losses[-10:]) < 0.9 * sum(report.losses[:10])
    assert set(report.layers) == {f"model.layers.{i}.self_attn" for i in range(3)}
    # What does not depend on the projections is what it was.
    assert report.after[1:4] == report.before[1:4]


def test_the_host_is_not_touched(fitted):
    model, state, _ = fitted
    now = model.state_dict()
    assert all(torch.equal(now[name], x) for name, x in state.items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "screening" not in n)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_measured_lies_between_lot_and_everything(fitted):
    model, _, report = fitted
    recall = report.after
    assert recall.random < recall.keys < 1 and recall.window < recall.keys
    assert 0 < recall.pairs < recall.cost
    short = measure_screening(model, [inputs_of(length=8)])
    assert short[:5] == pytest.approx([1.0] * 5)


def test_principal_directions_are_those_of_the_keys():
    """Where they are all there are, the choice is that by queries and keys themselves."""
    model, batch = sparse_host("qwen2", SINGLE, screening="learned", screen_dim=8), inputs_of()
    fit_principal(model, [batch])
    by_projection = logits(model, batch)
    assert torch.equal(by_projection, logits(sparse_host("qwen2", SINGLE), batch))
    for module in sparse_modules(model).values():
        axes = module.screening.key
        eye = torch.eye(8).expand(2, -1, -1)
        torch.testing.assert_close(axes.mT @ axes, eye, rtol=0, atol=1e-5)


def test_principal_screening_needs_no_training():
    batch, options = inputs_of(), {"screen_dim": 2}
    model = sparse_host("qwen2", screening="principal", calibration=[batch], **options)
    by_hand = sparse_host("qwen2", screening="learned", **options)
    random = logits(by_hand, batch)
    fit_principal(by_hand, [batch])
    found = logits(model, batch)
    assert torch.equal(found, logits(by_hand, batch)) and not torch.equal(found, random)


def test_gravity_is_the_teacher_where_gravity_is_the_law():
    model = gravity_host("power")
    before = logits(model, inputs_of())
    sparsify_attention(model, BUDGET, screening="learned", screen_dim=4)
    report = fit_screening(model, [inputs_of()], steps=20, rows=16, progress=False)
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    densify_attention(model)
    assert torch.equal(logits(model, inputs_of()), before)


def test_a_model_without_projections_is_refused():
    for model in (tiny_host("llama"), sparse_host("llama")):
        with pytest.raises(ValueError, match="screening='learned'"):
            fit_screening(model, [inputs_of()])
    with pytest.raises(ValueError, match="made sparse"):
        measure_screening(tiny_host("llama"), [inputs_of()])
