"""Settings of an LGT: presets, published names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig, LGTForCausalLM, LGTModel

# The published core of each preset at 512 positions, without vocabulary.
PUBLISHED_CORES = {
    "edge_150k": 58_629,
    "meta_probe": 365_329,
    "victorcos": 979_807,
    "fractal_res": 2_046_001,
}


def on_meta(model_class: type, config: LGTConfig) -> Any:
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize("name", LGT_PRESETS)
def test_preset_has_the_published_size(name: str) -> None:
    """All published parameters but `token_mass`, which no published forward reads."""
    config = LGTConfig.from_preset(name, vocab_size=None)
    layers, width = config.num_hidden_layers, config.hidden_size
    core = on_meta(LGTModel, config).num_parameters()
    assert core == PUBLISHED_CORES[name] - layers * width

    heads = config.num_attention_heads
    per_layer = 5 * width**2 + 8 * width + heads
    positions = config.max_position_embeddings * config.dim_position + 1
    assert core == layers * per_layer + 2 * width + positions

    for tied, head in ((False, 1000 * width + 1000), (True, 0)):
        sized = LGTConfig.from_preset(name, vocab_size=1000, tie_word_embeddings=tied)
        assert on_meta(LGTForCausalLM, sized).num_parameters() == core + 1000 * width + head


def test_preset_takes_overrides_and_refuses_unknown_names() -> None:
    config = LGTConfig.from_preset("victorcos", vocab_size=99, softening=0.0)
    assert (config.vocab_size, config.softening, config.curvature) == (99, 0.0, 0.18)
    with pytest.raises(ValueError, match="edge_150k.*fractal_res.*got 'edge'"):
        LGTConfig.from_preset("edge")


def test_published_names_are_accepted() -> None:
    config = LGTConfig(
        dim_model=64,
        num_layers=3,
        num_heads=2,
        max_seq_len=99,
        tie_weights=True,
        hidden_dropout_prob=0.3,
        use_fractal_positions=True,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 2)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (99, True)
    assert (config.dropout, config.position_type) == (0.3, "fractal")


def test_published_regime_leaves_positions_as_they_are() -> None:
    assert LGTConfig(position_type="fractal", softening=0.0).length_unit == 1.0
    assert LGTConfig(position_type="fractal", dim_position=36).length_unit == pytest.approx(0.1)
    assert LGTConfig(position_type="fractal", position_scale=2.0).length_unit == 2.0
    assert LGTConfig().length_unit == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hidden_size": 65},
            "hidden_size: expected a multiple of num_attention_heads",
        ),
        ({"position_type": "flat"}, r"position_type: expected one of \['curved', 'fractal'\]"),
        ({"force_law": "force"}, r"force_law: expected one of \['exp', 'power'\], got 'force'"),
        ({"force_cap": "soft"}, "force_cap: expected one of"),
        ({"implementation": "fast"}, "implementation: expected one of"),
        ({"softening": -0.1}, "softening: expected a finite number >= 0, got -0.1"),
        ({"event_horizon": 0.0}, "event_horizon: expected > 0"),
        ({"max_force": 0.0}, "max_force: expected a finite number > 0, or None, got 0.0"),
        ({"curvature": float("nan")}, "curvature: expected a finite number, got nan"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"max_seq_len": 0}, "max_position_embeddings: expected an integer >= 1, got 0"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1 or None, got 0"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: expected a finite number > 0, got -1.0"),
        ({"initializer_range": -0.1}, "initializer_range: expected a finite number >= 0"),
        ({"fractal_dim": float("nan")}, "fractal_dim: expected a finite number, got nan"),
        ({"base_freq": float("inf")}, "base_freq: expected a finite number > 0, got inf"),
        ({"scale_factor": -2.0}, "scale_factor: expected a finite number > 0, got -2.0"),
        ({"softning": 0.1}, r"LGTConfig: expected names .*\['softning'\]. Did you mean softening"),
        ({"dim_model": 64, "hidden_size": 32}, "hidden_size: expected one value, got 32"),
        (
            {"use_fractal_positions": False, "position_type": "fractal"},
            "position_type: expected one value, got 'fractal', and by its name use_fractal",
        ),
        ({"hidden_size": "64"}, "hidden_size: expected an integer >= 1, got '64'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        LGTConfig(**settings)


def test_config_survives_a_file(tmp_path: Path) -> None:
    config = LGTConfig(
        vocab_size=None, max_force=None, position_scale=0.5, is_causal=False, softening=0.0
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LGTConfig)
    place = {"_name_or_path": ""}
    assert {**loaded.to_dict(), **place} == config.to_dict()


def test_names_of_transformers_and_of_saved_folders_are_accepted(tmp_path: Path) -> None:
    theirs = {"num_labels": 3, "torch_dtype": "bfloat16", "attn_implementation": "eager"}
    theirs |= {"architectures": ["X"], "output_attentions": False, "max_length": 9, "dtype": None}
    config = LGTConfig(**theirs, problem_type="regression", _name_or_path="here")
    assert (config.num_labels, config.dtype) == (3, torch.bfloat16)
    config.added_by_other_software = 1
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa", num_labels=4)
    assert (again.num_labels, again.added_by_other_software) == (4, 1)
    assert LGTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_language_model_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="LGTForCausalLM: expected config.vocab_size, got None"):
        LGTForCausalLM(LGTConfig(vocab_size=None))
