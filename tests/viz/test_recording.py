"""Attention maps show the weights that the model attends with, and the host's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.viz.recording import first_example, record_attention, record_host_attention


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_maps_are_the_attention_that_the_model_returns(family: str) -> None:
    model = patch_with_gravity(tiny_host(family), GravityConfig())
    inputs = first_example(tiny_inputs(family), 7)
    calibrate(model, [inputs], progress=False)
    with torch.no_grad():
        returned = model(**inputs, output_attentions=True).attentions
    recorded = list(record_attention(model, inputs).values())
    for seen, weights in zip(recorded, returned, strict=True):
        torch.testing.assert_close(seen.weights, weights[0])
        torch.testing.assert_close(seen.weights.sum(-1), torch.ones(seen.weights.shape[:2]))
        assert not seen.weights[~seen.visible].any()
        torch.testing.assert_close(seen.received, weights[0].sum(-2))


@pytest.mark.parametrize("family", ["qwen2", "bert"])
def test_the_hosts_maps_are_its_own_and_it_stays_as_it_is(family: str) -> None:
    host = tiny_host(family).eval()
    inputs = first_example(tiny_inputs(family), 7)
    before, kind = copy.deepcopy(host.state_dict()), type(host)
    recorded = list(record_host_attention(host, inputs).values())
    assert type(host) is kind
    assert before.keys() == host.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
    host.set_attn_implementation("eager")
    with torch.no_grad():
        returned = host(**inputs, output_attentions=True).attentions
    for seen, weights in zip(recorded, returned, strict=True):
        torch.testing.assert_close(seen.weights, weights[0])
        torch.testing.assert_close(seen.weights, seen.dot_product)


def test_a_causal_models_keys_are_hidden_from_earlier_queries(case) -> None:
    seen = record_attention(case.model, first_example(case.batch, 9))
    expected = torch.ones(9, 9).tril().bool()
    assert all((one.visible == expected).all() for one in seen.values())


def test_only_what_is_asked_for_is_recorded(case) -> None:
    name = "model.layers.1.self_attn"
    inputs = first_example(case.batch, 5)
    alone = record_attention(case.model, inputs, only={name})
    assert list(alone) == [name]
    torch.testing.assert_close(
        alone[name].weights, record_attention(case.model, inputs)[name].weights
    )
    # The layers before it are the host's there, too, not gravity's.
    host = record_host_attention(case.host, inputs, only={name})
    torch.testing.assert_close(
        host[name].weights, record_host_attention(case.host, inputs)[name].weights
    )


def test_an_example_is_the_first_row_without_its_padding() -> None:
    ids = torch.arange(8).reshape(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    example = first_example({"input_ids": ids, "attention_mask": mask, "use_cache": False}, 2)
    assert example["input_ids"].tolist() == [[1, 2]]
    assert example["attention_mask"].tolist() == [[1, 1]]
    assert example["use_cache"] is False


def test_a_gravity_model_is_no_host(case) -> None:
    with pytest.raises(ValueError, match="unpatched"):
        record_host_attention(case.model, case.batch)
