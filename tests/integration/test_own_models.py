"""Models that are gravity by construction are taken for what they are wherever hosts are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gravity_hf import (
    LGTConfig,
    LGTForCausalLM,
    LGTForTokenClassification,
    TriModel,
    TriModelConfig,
    calibrate,
    gravity_serving,
    gravity_status,
    load_gravity_mass_log,
    load_gravity_model,
    measure_attention,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.loading import load_host_or_gravity
from gravity_hf.models.lgt.law import Law

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dim_position": 4,
    "max_position_embeddings": 32,
}
IDS = torch.arange(10)[None]


def lgt(model_class: type[PreTrainedModel] = LGTForCausalLM, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(LGTConfig(**SIZES, **settings)).eval()


def tri() -> PreTrainedModel:
    torch.manual_seed(0)
    return TriModel(TriModelConfig(**SIZES)).eval()


@pytest.mark.parametrize("make", [lgt, lambda: lgt(LGTForTokenClassification), tri])
@pytest.mark.parametrize("load", [load_gravity_model, load_host_or_gravity])
def test_a_folder_comes_back_in_the_class_that_wrote_it(make, load, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


def test_settings_that_do_not_fit_and_unknown_classes_are_plain_errors(tmp_path: Path) -> None:
    lgt().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["LGTForNothing"]}))
    with pytest.raises(ValueError, match=r"LGTForNothing.*class that wrote it"):
        load_gravity_model(tmp_path)
    file.write_text(json.dumps({**config, "softening": -1.0}))
    with pytest.raises(ValueError, match=r"fit together.*LGTConfig.softening"):
        load_gravity_model(tmp_path)


def test_the_status_of_an_lgt_says_law_sizes_and_what_computes_them() -> None:
    model = lgt(force_law="power", softening=0.5, is_causal=False)
    status = gravity_status(model)
    assert status.is_gravity and not status.patched and status.config is None
    assert status.layers == ("model.layers.0.attn", "model.layers.1.attn") and not status.skipped
    # Two layers of G and a row per head, positions, and their curvature.
    assert status.parameters == 2 * (2 + 2 * 8) + 32 * 4 + 1
    said = str(status)
    for fact in ("by construction in 2", "2 layers, 2 heads", "power", "both ways", "0.5"):
        assert fact in said
    assert "curvature 0.15" in said and "not patched" not in said and "capped" not in said
    # What is set later counts.
    model.curvature = 0.3
    assert "curvature 0.3" in str(gravity_status(model))


@pytest.mark.parametrize("named", ["sdpa", "eager", "flex_attention"])
def test_the_status_names_the_implementation_that_the_model_takes(named: str) -> None:
    model = lgt()
    model.set_attn_implementation(named)
    asked = Law.of(model.config).implementation
    found = gravity_status(model).implementation
    assert found == ("chunked" if asked == "auto" else asked)


def test_the_status_of_a_tri_model_names_streams_and_the_attention_between_them() -> None:
    status = gravity_status(tri())
    said = str(status)
    assert len(status.layers) == 6 and len(status.skipped) == 3
    assert "stream world: curvature 0.25" in said and "dot product in 3: fusion.world" in said


def serve(model: PreTrainedModel) -> None:
    with gravity_serving(model):
        pass


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (patch_with_gravity, "nothing to patch"),
        (unpatch_gravity, "no host under it"),
        (lambda model: calibrate(model, [{"input_ids": IDS}]), "train it"),
        (lambda model: measure_attention(model, [{"input_ids": IDS}]), "MirrorLayer"),
        (lambda model: load_gravity_mass_log(model, "nowhere.pt"), "hidden states"),
        (serve, "model.generate"),
    ],
)
@pytest.mark.parametrize("make", [lgt, tri])
def test_what_is_for_hosts_says_that_there_is_none(make, use, instead: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=f"gravity by construction.*{instead}"):
        use(model)
    assert gravity_status(model).is_gravity
