"""The tri-model as a transformers model: settings, masks, losses, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models.trimodel.tri_cases import LENGTHS, ids_of, tiny_config, tiny_model, tokens
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import gravity_hf  # noqa: F401  (registers the model types)
from gravity_hf.layers.fusion import STREAMS
from gravity_hf.models.trimodel import TriModel, TriModelConfig


def test_streams_differ_as_published_and_take_settings_of_their_own() -> None:
    model = tiny_model(streams={"env": {"curvature": 0.3, "max_force": None}})
    assert [model.stream(name).curvature for name in STREAMS] == [0.25, 0.15, 0.3]
    first = [model.stream(name).layers[0].attn.gravity.G[0].item() for name in STREAMS]
    assert first == pytest.approx([1.0, 0.8, 1.2])
    assert model.env_model.config.max_force is None
    assert model.world_model.config.max_force == 50.0


def test_published_names_are_accepted() -> None:
    config = TriModelConfig(dim_model=8, num_layers=1, num_heads=2, use_fractal_positions=True)
    assert (config.hidden_size, config.num_hidden_layers) == (8, 1)
    assert config.stream_config("self").position_type == "fractal"
    streams = {"world": {"num_layers": 3, "use_fractal_positions": False}}
    config = TriModelConfig(streams=streams, use_fractal_positions=True)
    assert [config.stream_config(x).num_hidden_layers for x in STREAMS] == [3, 4, 4]
    assert config.stream_config("world").position_type == "curved"


@pytest.mark.parametrize("mask_padding", [True, False])
def test_auto_class_loads_what_was_saved(mask_padding: bool, tmp_path: Path) -> None:
    streams = {"world": {"curvature": 0.4}}
    model = tiny_model(output_dim=6, mask_padding=mask_padding, streams=streams, use_gate=True)
    inputs = ids_of(tokens())
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, TriModel)
    found, expected = (x(**inputs).last_hidden_state for x in (again, model))
    assert found.shape == (2, LENGTHS["world"], 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_fractal_positions_survive_saving(tmp_path: Path) -> None:
    model = tiny_model(position_type="fractal", num_scales=2)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    inputs = ids_of(tokens())
    # Where weights lie in memory decides about the last bit.
    found, expected = (x(**inputs).last_hidden_state for x in (again, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_half_precision_keeps_gravity_in_float32(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.self_model.layers[0].attn.gravity.G.dtype == torch.float32
    assert model(**ids_of(tokens())).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("padded", STREAMS)
def test_padding_changes_nothing(padded: str) -> None:
    model, inputs = tiny_model(use_gate=True), tokens(env=4)
    length = inputs[padded].shape[1]
    filled = {**inputs, padded: F.pad(inputs[padded], (0, 2), value=3)}
    mask = (torch.arange(length + 2) < length).long().expand(2, -1)
    found = model(**ids_of(filled), **{f"{padded}_attention_mask": mask})
    expected = model(**ids_of(inputs))
    longest = expected.last_hidden_state.shape[1]
    part = found.last_hidden_state[:, :longest]
    torch.testing.assert_close(part, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.stream_masses, expected.stream_masses, rtol=0, atol=1e-5)


def test_published_padding_is_counted_and_ours_is_not() -> None:
    inputs = ids_of(tokens())
    ours = tiny_model()
    published = TriModel(tiny_config(mask_padding=False)).eval()
    published.load_state_dict(ours.state_dict())
    masses, counted = (model(**inputs).stream_masses for model in (ours, published))
    assert torch.equal(masses[:, 0], counted[:, 0])
    assert (masses[:, 2] - counted[:, 2]).abs().min() > 1e-3


def test_token_ids_and_their_embeddings_are_one_input() -> None:
    model, inputs = tiny_model(), tokens()
    embeds = {f"{name}_inputs_embeds": model.embed_tokens(x) for name, x in inputs.items()}
    by_id = model(**ids_of(inputs)).last_hidden_state
    assert torch.equal(model(**embeds).last_hidden_state, by_id)


def test_loss_of_classes_and_of_values_is_over_tokens_that_are_there() -> None:
    model, inputs = tiny_model(output_dim=6), ids_of(tokens())
    masks = {f"{name}_attention_mask": torch.ones(2, n) for name, n in LENGTHS.items()}
    for mask in masks.values():
        mask[0, 2:] = 0
    output = model(**inputs, **masks).last_hidden_state
    labels = torch.randint(6, output.shape[:2])
    labels[1, 3] = -100
    loss = model(**inputs, **masks, labels=labels).loss
    expected = F.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    values = torch.randn(output.shape)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[0, 2:] = False
    loss = model(**inputs, **masks, labels=values).loss
    torch.testing.assert_close(loss, F.mse_loss(output[real], values[real]))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, inputs = tiny_model(output_dim=6).train(), ids_of(tokens())
    labels = torch.randint(6, (2, LENGTHS["world"]))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads.append({n: x.grad.clone() for n, x in model.named_parameters() if x.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    # Positions, masses and G of every stream learn.
    assert all(grad.abs().sum() > 0 for name, grad in grads[0].items() if "gravity" in name)


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_diagnostics_tell_of_the_forces_and_leave_no_observer() -> None:
    model, inputs = tiny_model(max_force=3.0), ids_of(tokens())
    plain = model(**inputs)
    output = model(**inputs, output_diagnostics=True)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state)
    layer = output.diagnostics["world"]["layers"][1]
    assert 0 < layer["force_mean"] <= layer["force_max"]
    assert 0 < layer["attention_entropy"] < torch.tensor(7.0).log()
    assert layer["seq_len"] == 7
    gravities = [x.attn.gravity for name in STREAMS for x in model.stream(name).layers]
    assert all(gravity.observer is None for gravity in gravities)
    assert not model.world_model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"streams": {"moon": {}}}, r"streams: expected only \['world', 'self', 'env'\]"),
        ({"streams": {"env": 3}}, "a dict of settings for each stream"),
        ({"streams": {"env": {"curvatur": 0.1}}}, "settings of LGTConfig, got .*curvatur"),
        ({"streams": {"env": {"hidden_size": 32}}}, "hidden_size 16"),
        ({"streams": {"env": {"max_force": -1.0}}}, "max_force"),
        ({"softening": -0.1}, "softening"),
        ({"fooo": 1}, r"TriModelConfig: expected names of its settings, got \['fooo'\]"),
        ({"num_layers": 3}, "num_hidden_layers: expected one value, got 2"),
        (
            {"streams": {"env": {"num_layers": 3, "num_hidden_layers": 2}}},
            "num_hidden_layers: expected one value, got two",
        ),
        ({"output_dim": 0}, "output_dim: expected an integer >= 1"),
        ({"num_attention_heads": 3}, "hidden_size"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"env_input_ids": None}, "env: expected env_input_ids or env_inputs_embeds, got neither"),
        ({"env_inputs_embeds": torch.zeros(2, 3, 16)}, "got both"),
        ({"self_input_ids": torch.zeros(5, dtype=torch.long)}, r"integers \[B, N\]"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "a class for every token"),
        ({"labels": torch.zeros(2, 3)}, "those of the output"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_model()(**{**ids_of(tokens()), **change})


def test_a_model_without_vocabulary_refuses_ids() -> None:
    with pytest.raises(ValueError, match="has no vocabulary"):
        tiny_model(vocab_size=None)(**ids_of(tokens()))


def test_streams_come_back_as_they_have_grown(tmp_path: Path) -> None:
    model = tiny_model()
    model.world_model.curvature = 0.3
    model.env_model.add_layer()
    inputs = ids_of(tokens())
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.world_model.curvature == 0.3
    with torch.no_grad():
        after = again(**inputs).last_hidden_state
    torch.testing.assert_close(after, before, atol=2e-6, rtol=0)
