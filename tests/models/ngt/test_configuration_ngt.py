"""Presets, names and refusals of an NGT's settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from gravity_hf.models.ngt import NGT_PRESETS, NGTConfig, NGTForCausalLM, NGTModel
from gravity_hf.models.ngt.statistics import gravity_statistics

from .ngt_cases import IDS, SMALL, tiny

# Published: 25 M shape, the tied weight once.
_W3 = {"reference": 25_591_432, "vanilla": 25_486_336}


def parameters(**settings: Any) -> int:
    with torch.device("meta"):
        model = NGTForCausalLM(NGTConfig.from_preset("reference", **settings))
    return sum(x.numel() for x in model.parameters())


def test_presets_say_what_they_are() -> None:
    v2, reference, fixed = (NGTConfig.from_preset(x) for x in ("v2", "reference", "fixed"))
    assert v2.to_dict() == NGTConfig().to_dict()
    assert (v2.law, v2.exclude_self, v2.cutoff, v2.coordinate_source) == (
        *("power", True, "none", "attention"),
    )
    assert reference.repulsive and reference.law == "force" and reference.cutoff == "hard"
    assert reference.softening == 1e-6 and not reference.learn_softening
    assert math.isclose(reference.initial_strength, math.log(2))
    differing = {
        name
        for name in NGT_PRESETS["reference"]
        if getattr(fixed, name) != getattr(reference, name)
    }
    assert differing == {"evolve_last_layer", "crop_long_inputs", "initializer_range"}
    # Where masses are in the values a bias for each head would cancel.
    assert fixed.head_bias and not NGTConfig.from_preset("fixed", mass_in_value=True).head_bias
    assert NGTConfig.from_preset("reference", mass_in_value=True).head_bias
    with pytest.raises(ValueError, match="expected one of .*'v2'.* got 'v3'"):
        NGTConfig.from_preset("v3")


def test_sizes_are_the_published_ones() -> None:
    assert parameters() == _W3["reference"]
    assert parameters(attention="dot_product", intermediate_size=1536) == _W3["vanilla"]


def test_published_names_are_accepted_and_unknown_ones_refused() -> None:
    config = NGTConfig(num_tokens=9, hidden_dim=8, num_layers=2, num_heads=2, mlp_dim=5)
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert (*sizes, config.num_attention_heads, config.intermediate_size) == (9, 8, 2, 2, 5)
    assert NGTConfig(max_seq_len=7, hidden_dropout_prob=0.3).dropout == 0.3
    with pytest.raises(ValueError, match=r"expected names of its settings, got \['softning'\]"):
        NGTConfig(softning=1.0)
    with pytest.raises(ValueError, match="expected one value"):
        NGTConfig(hidden_dim=8, hidden_size=16)
    with pytest.raises(ValueError, match="use_fractal_positions"):
        NGTConfig(use_fractal_positions=True)


def test_a_saved_config_is_read_as_it_was(tmp_path: Any) -> None:
    config = NGTConfig.from_preset("fixed", **SMALL, cutoff="log", asymmetric=True)
    config.save_pretrained(tmp_path)
    assert NGTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repulsive": True}, "repulsive: expected False beside law='power', got True"),
        ({"head_bias": True}, "head_bias: expected False beside law='power'"),
        ({"cutoff": "soft"}, "cutoff: expected 'none', 'hard' or 'log' beside law='power'"),
        ({"token_masses": False, "mass_in_value": True}, "mass_in_value: expected False beside"),
        ({"positions": "alibi"}, "positions: expected 'learned' beside attention='gravity'"),
        ({"softening": 1e-5}, "softening: expected a squared distance > 0.0001, where it is"),
        ({"softening": 0.0, "learn_softening": False}, "softening: .* >= 1e-06, got 0.0"),
        ({"law": "force"}, "mass_fading: expected 0 beside law='force', got 1.0"),
        ({"mass_fading": 1.5}, r"mass_fading: expected a share in \[0, 1\], got 1.5"),
        ({"symmetric_heads": -1}, "symmetric_heads: expected an integer >= 0, got -1"),
        ({"law": "cubic"}, "law: expected one of"),
        ({"coordinate_source": "mlp"}, "coordinate_source: expected one of"),
        ({"hidden_size": 30}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer >= 1, got 0"),
        ({"coord_dim": 0}, "coord_dim: expected an integer >= 1"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"cutoff_width": 0.0}, "cutoff_width: expected a finite number > 0"),
        ({"initial_radius": math.inf}, "initial_radius: expected a finite number"),
        ({"implementation": "fast"}, "implementation: expected one of"),
        ({"attention": "dot_product", "cutoff": "hard"}, "cutoff: expected 'none', the default"),
        ({"attention": "dot_product", "positions": "rope"}, "positions: expected one of"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        NGTConfig(**settings)


@pytest.mark.parametrize("preset", NGT_PRESETS)
def test_a_new_model_starts_as_its_preset_says(preset: str) -> None:
    settings = {**SMALL, "cutoff": "hard", "hidden_size": 64}
    torch.manual_seed(0)
    model = NGTModel(NGTConfig.from_preset(preset, **settings))
    config, gravity = model.config, model.layers[1].attn.gravity
    strength = torch.full((2,), float(config.initial_strength))
    torch.testing.assert_close(gravity.strength(), strength)
    assert gravity.radius.item() == pytest.approx(config.initial_radius)
    assert config.initial_radius == (1.5 * 16**0.5 if preset == "v2" else 4.0)
    ones = torch.ones(1, 3)
    terms = gravity(ones, ones.log() if config.law == "power" else None)
    softening = torch.as_tensor(terms.eps).expand(2)
    torch.testing.assert_close(softening, torch.full((2,), float(config.softening)))
    assert (terms.log_key_mass is None) == (config.law == "force")
    assert (terms.head_bias is None) == (preset == "v2")
    spread = model.token_emb.weight.std().item()
    assert abs(spread / config.initializer_range - 1) < 0.1
    # The rest as torch makes it: within one over the root of the number of inputs.
    bound = model.layers[0].fc1.weight.abs().max().item()
    assert 0.95 * 64**-0.5 < bound <= 64**-0.5
    assert 0.5 < model.mass_emb.weight.std().item() < 1.5
    if model.coord_emb is not None:
        assert 0.9 < model.coord_emb.weight.std().item() < 1.1


def test_softening_and_radius_go_with_the_distances_of_a_new_model() -> None:
    for width in (8, 32):
        torch.manual_seed(0)
        settings = {**SMALL, "hidden_size": 64, "cutoff": "hard", "head_coord_dim": width}
        model = NGTModel(NGTConfig(**settings))
        found = gravity_statistics(model, IDS)
        assert 0.25 < model.config.softening / found["dist_mean_causal"] < 0.35
        assert found["sparsity_ratio_causal"] < 0.1


def test_other_starts() -> None:
    """A table may start as sinusoids, maps of keys as those of queries; ages as in ALiBi."""
    model = tiny(NGTModel, coordinate_positions="learned_sinusoidal", position_base=50.0)
    expected = torch.tensor([math.sin(3.0), math.cos(3.0), math.sin(3 * 50 ** (-2 / 12))])
    torch.testing.assert_close(model.coord_emb.weight[3, :3], expected)
    for shared in (True, False):
        settings = {"anchor_coordinates": True, "shared_start": shared, "num_attention_heads": 4}
        maps = tiny(NGTModel, **settings).layers[1].attn
        weights = [weight for each in maps.maps() for weight in each.parameters()]
        assert len(weights) == 4
        for weight in weights:
            queries, keys = weight.split((4 * 16, 2 * 16))
            assert torch.equal(queries[: 2 * 16], keys) == shared
    fading = tiny(NGTModel, num_attention_heads=4, mass_fading=0.5).layers[0].attn.gravity.fading
    torch.testing.assert_close(F.softplus(fading), torch.tensor([2.0**-6, 2.0**-8]))
    twin = tiny(NGTModel, "reference", attention="dot_product", initializer_range=0.5)
    assert 0.45 < twin.pos_emb.weight.std().item() < 0.55 and twin.mass_emb is None
