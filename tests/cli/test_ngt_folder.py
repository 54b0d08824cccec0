"""What the verbs make of the folder of a saved NGT, and of its twin's."""

from __future__ import annotations

import pytest
from cli.commands import run
from hub.ngt_results import saved_ngt

from gravity_hf.training.tokenizers import byte_tokenizer


def save(folder, **settings):
    saved_ngt(folder, vocab_size=256, **settings)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ngt(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ngt") / "model")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return save(tmp_path_factory.mktemp("twin") / "model", attention="dot_product")


def test_status_says_what_it_is_and_reads_its_constants(ngt):
    said = run("status", ngt).output
    assert "NGTForCausalLM, gravity from the start" in said and "law power" in said
    assert "strength g" in said and "fading l" in said and "radius" not in said
    assert "gravity-hf generate" in said


def test_status_of_a_twin_says_that_it_has_no_gravity(twin):
    said = run("status", twin).output
    assert "NGTForCausalLM, without gravity" in said and "dot-product twin" in said
    assert "strength" not in said and "24 positions" in said


def test_both_write(ngt, twin):
    for folder in (ngt, twin):
        result = run("generate", folder, "Gravity", "--max-new-tokens", 4, "--temperature", 0)
        assert result.exit_code == 0 and result.output.startswith("Gravity"), result.output


def test_no_control_character_reaches_the_terminal(ngt):
    result = run("generate", ngt, "fall\x1b[31m", "--max-new-tokens", 1)
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert result.output.startswith("fall\u241b[31m")


def test_a_table_that_ends_is_one_plain_error(twin):
    result = run("generate", twin, "Gravity", "--max-new-tokens", 40)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "expected at most 24 tokens" in " ".join(result.output.split())


def test_a_dry_run_of_a_push_lists_weights_tokenizer_and_card(ngt):
    result = run("push", ngt, "me/ngt", "--dry-run")
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert name in result.output


def test_coordinates_are_not_rounded_in_an_export_to_int8(ngt, tmp_path):
    from gravity_hf import load_gravity_model

    pytest.importorskip("torchao")
    out = tmp_path / "out"
    result = run("export", ngt, out, "--format", "int8", "--samples", 2, "--length", 8)
    assert result.exit_code == 0, result.output
    loaded, plain = load_gravity_model(out), load_gravity_model(ngt)
    for part in ("content", "layers.0.attn.coord_proj", "layers.0.coord_proj_next"):
        kept = loaded.model.get_submodule(part).weight
        assert type(kept) is type(plain.lm_head.weight)
        assert (kept == plain.model.get_submodule(part).weight).all()
