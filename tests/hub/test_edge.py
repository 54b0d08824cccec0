"""The edge export: what it writes loads back and is the model, its numbers are measured, and what
does not exist is refused by the names of what does."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from cli.commands import run
from transformers import AutoModelForCausalLM

from gravity_hf.cli.edge import slower
from gravity_hf.hub.edge import PUBLISHED_CLAIMS, count_parts, export_edge_model, preset_model
from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.formats.programs import trace
from gravity_hf.hub.formats.source import load_source
from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig, LGTForCausalLM, LGTModel

VOCABULARY = 40
SMALL = {"samples": 4, "length": 12, "seconds": 0.0}
# In the order in which they are exported: a program of the shape that it was traced with fails.
FORMATS = ("torch", "onnx", "fp16", "int8")


@pytest.fixture(scope="module")
def model():
    # A layer less than the preset: exporters take seconds for each.
    sizes = {"vocab_size": VOCABULARY, "max_positions": 48, "num_hidden_layers": 1}
    return preset_model("edge_150k", seed=3, **sizes)


@pytest.fixture(scope="module")
def edge(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("edge") / "out"
    return out, export_edge_model(model, out, formats=FORMATS, preset="edge_150k", **SMALL)


def ids_and_logits(model, batch=2, length=9):
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, model(input_ids=ids).logits


def empty_cache(batch):
    """Of one layer with two heads of 32: masses and positions, and values."""
    return [(torch.zeros(batch, 2, 0, 2), torch.zeros(batch, 2, 0, 32))]


def inputs_of(ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def test_the_torch_program_is_the_model_without_this_library_at_other_sizes(model, edge):
    program = torch.export.load(edge[0] / "torch" / "model.pt2").module()
    for batch, length in ((1, 1), (2, 9), (5, 17)):
        ids, exact = ids_and_logits(model, batch, length)
        logits, cache = program(**inputs_of(ids), past_key_values=empty_cache(batch))
        assert (logits - exact).abs().max() < 1e-4 * exact.abs().max()
        assert len(cache) == 1 and cache[0][1].shape == (batch, 2, length, 32)


def test_the_onnx_file_is_the_model_at_other_sizes(model, edge):
    session = onnxruntime.InferenceSession(edge[0] / "onnx" / "model.onnx")
    ids, exact = ids_and_logits(model, 3, 11)
    feed = {name: x.numpy() for name, x in inputs_of(ids).items()}
    for i, (key, value) in enumerate(empty_cache(3)):
        feed |= {f"past_key_values.{i}.key": key.numpy()}
        feed |= {f"past_key_values.{i}.value": value.numpy()}
    (logits,) = session.run(["logits"], feed)
    assert np.abs(logits - exact.numpy()).max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_weights_load_back_and_masses_are_as_they_were(name, model, edge):
    loaded = AutoModelForCausalLM.from_pretrained(edge[0] / name, dtype="auto").eval()
    ids, exact = ids_and_logits(model)
    _, found = ids_and_logits(loaded)
    error = ((found.float() - exact).abs().max() / exact.abs().max()).item()
    # Equal weights: what differs is in which table of distances a row was computed.
    assert error < 1e-6 if name == "fp32" else 1e-6 < error < 0.05
    before, after = model.state_dict(), loaded.state_dict()
    masses = [key for key in before if ".gravity." in key]
    assert len(masses) == 2 and all(torch.equal(before[key], after[key]) for key in masses)


def test_the_report_is_what_lies_there(model, edge):
    out, report = edge
    content = json.loads((out / "edge.json").read_text(encoding="utf-8"))
    assert [x["format"] for x in content["exports"]] == ["fp32", *FORMATS]
    for found in report.exports:
        files = [*(out / found.format).glob("*.safetensors"), *(out / found.format).glob("*.pt2")]
        files += (out / found.format).glob("*.onnx")
        assert found.bytes == sum(file.stat().st_size for file in files)
        assert found.prefill.least_ms > 0 and found.step.least_ms > 0
        assert found.prefill.calls >= 3
    sizes = {x.format: x.bytes for x in report.exports}
    assert sizes["fp16"] < 0.65 * sizes["fp32"] and sizes["int8"] < sizes["fp32"]
    errors = {x.format: x.measured["relative_error"] for x in report.exports[1:]}
    assert errors["torch"] < 1e-5 and errors["onnx"] < 1e-5 < errors["int8"] < 0.05
    assert report.exports[-1].quantised["layers"] == 3
    assert report.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert not report.trained and report.published == PUBLISHED_CLAIMS["edge_150k"]
    assert str(out.parent) not in (out / "edge.json").read_text(encoding="utf-8")


def test_what_is_slower_is_said(edge):
    _, report = edge
    base = report.exports[0].prefill.least_ms
    slow = {x.format for x in report.exports[1:] if x.prefill.least_ms > 1.05 * base}
    said = " ".join(slower(report))
    assert {name for name in FORMATS if f"{name} (" in said} == slow


def test_every_preset_has_a_claim_and_parts_add_up():
    assert set(PUBLISHED_CLAIMS) == set(LGT_PRESETS)
    config = LGTConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    untied = count_parts(LGTForCausalLM(config))
    assert untied["embedding"] == 80 and untied["head"] == 90
    assert sum(untied[part] for part in ("embedding", "head", "others")) == untied["total"]
    config.tie_word_embeddings = True
    config.lm_head_bias = False
    assert count_parts(LGTForCausalLM(config))["head"] == 0


def test_a_preset_is_its_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, same, other = (
        preset_model("edge_150k", vocab_size=8, max_positions=8, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [m.lm_head.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_unknown_names_are_refused_by_the_known_ones_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    calls = {
        "meta_probe": ("--preset", "tiny", out),
        "int8": ("--preset", "edge_150k", out, "--format", "int4"),
        "dot-product attention": ("--preset", "edge_150k", out, "--format", "gguf"),
        "OUT alone": ("--preset", "edge_150k", out, tmp_path / "other"),
        "has its own": (tmp_path, out, "--format", "fp16", "--vocab-size", 5),
        "expected FOLDER and OUT": (tmp_path,),
        "--format: expected one of": (tmp_path, out),
    }
    for words, arguments in calls.items():
        result = run("export", *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output, result.output
        assert words in " ".join(result.output.split()), result.output
    assert list(tmp_path.iterdir()) == []


def test_only_an_edge_export_is_replaced(model, tmp_path):
    out = tmp_path / "out"
    export_edge_model(model, out, formats=["fp16"], **SMALL)
    with pytest.raises(ValueError, match="not empty"):
        export_edge_model(model, out, formats=["fp16"], **SMALL)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"also holds notes\.txt"):
        export_edge_model(model, out, formats=["fp16"], force=True, **SMALL)
    (out / "notes.txt").unlink()
    export_edge_model(model, out, formats=["bf16"], force=True, **SMALL)
    assert {path.name for path in out.iterdir()} == {"fp32", "bf16", "edge.json"}
    # Its folder of weights is a model like any other.
    again = export_gravity_model(out / "fp32", tmp_path / "fp16", format="fp16", samples=4)
    assert again.model_type == "lgt" and again.gravity["softening"] == 0.2


def test_a_bidirectional_model_is_exported_as_one_pass(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "max_positions": 32, "num_hidden_layers": 1}
    model = preset_model("edge_150k", **sizes, is_causal=False)
    report = export_edge_model(model, tmp_path / "out", formats=["fp16"], **SMALL)
    assert all(export.step is None and export.prefill.calls for export in report.exports)
    source = load_source(tmp_path / "out" / "fp32")
    example = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6).long()}
    program, _ = trace(source, example)
    ids, exact = ids_and_logits(model, 4, 11)
    found = program.module()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_model_without_a_vocabulary_is_refused_by_what_it_takes(tmp_path):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LGTModel(LGTConfig(vocab_size=None, **sizes))
    with pytest.raises(ValueError, match="inputs_embeds"):
        export_edge_model(model, tmp_path / "out", formats=["fp16"], **SMALL)
    assert list(tmp_path.iterdir()) == []
