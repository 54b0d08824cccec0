"""What the verbs make of the folder of a saved LGT: they work, or say in one line what to do."""

from __future__ import annotations

import json

import pytest
import torch
from cli.commands import run

from gravity_hf import push_gravity_model
from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM, LGTForTokenClassification
from gravity_hf.models.trimodel import TriModelConfig, TriModelForCausalLM
from gravity_hf.training.tokenizers import byte_tokenizer

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dim_position": 8,
    "max_position_embeddings": 64,
}


def save(folder, model_class=LGTForCausalLM, **settings):
    torch.manual_seed(0)
    model = model_class(LGTConfig(**SIZES, **settings))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lgt(tmp_path_factory):
    return save(tmp_path_factory.mktemp("lgt") / "model")


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert result.output.count("error:") == 1
    return " ".join(result.output.split())


def test_status_says_what_it_is_and_reads_its_constants(lgt):
    said = run("status", lgt).output
    assert "LGTForCausalLM, gravity from the start" in said
    assert "softening 0.2" in said and "causal" in said and "not a gravity model" not in said
    # G0 0.9^(layer + head) over two heads.
    assert "0.9 / 0.95 / 1" in said and "0.81 / 0.855 / 0.9" in said
    assert "gravity-hf convert" not in said and "gravity-hf generate" in said


def test_status_names_the_published_law(tmp_path):
    said = run("status", save(tmp_path / "published", softening=0.0, is_causal=False)).output
    assert "softening 0 (the published law)" in said and "sees both ways" in said
    assert "gravity-hf generate" not in said


def test_it_writes(lgt):
    result = run("generate", lgt, "Gravity", "--max-new-tokens", 4, "--temperature", 0)
    assert result.exit_code == 0 and result.output.startswith("Gravity"), result.output


def test_it_is_measured_without_a_claim_about_a_host(lgt, tmp_path):
    out = tmp_path / "evaluation.json"
    result = run("evaluate", lgt, "--max-tokens", 100, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert 4 < found["loss"]["nats_per_token"] < 7 and found["attention"] is None
    assert "contrast" not in result.output and "host" not in result.output


def test_a_model_that_sees_ahead_is_not_asked_for_what_it_sees(tmp_path):
    folder = save(tmp_path / "model", is_causal=False)
    assert "is_causal=False" in refused("generate", folder, "Hello")
    assert "is_causal=False" in refused("evaluate", folder)


def test_a_model_of_three_inputs_is_not_asked_to_continue_one(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "tri"
    TriModelForCausalLM(TriModelConfig(**SIZES, is_causal=True, use_gate=True)).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    for arguments in (("generate", folder, "Hello"), ("evaluate", folder), ("serve-model", folder)):
        assert "three inputs, a world, a self and an environment" in refused(*arguments)
    said = run("status", folder).output
    assert "stream world" in said and "in each stream" in said
    assert "gravity-hf generate" not in said and "load_gravity_model" in said


def test_settings_that_do_not_fit_are_one_plain_error(tmp_path):
    folder = save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    broken = json.dumps({**config, "softening": -1.0})
    (folder / "config.json").write_text(broken, encoding="utf-8")
    for arguments in (("status", folder), ("generate", folder, "x"), ("evaluate", folder)):
        assert "LGTConfig.softening" in refused(*arguments)


def test_a_dry_run_of_a_push_lists_weights_tokenizer_and_card(lgt):
    result = run("push", lgt, "me/lgt", "--dry-run")
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert name in result.output
    assert "modeling_gravity.py" not in result.output and "host" not in result.output


def test_a_model_in_memory_is_pushed_like_its_folder(lgt, tmp_path):
    model = LGTForCausalLM.from_pretrained(lgt)
    from_memory = push_gravity_model(model, "me/lgt", dry_run=True, tokenizer=byte_tokenizer())
    from_folder = push_gravity_model(lgt, "me/lgt", dry_run=True)
    assert from_memory.paths == from_folder.paths
    other = save(tmp_path / "other", softening=0.5)
    with pytest.raises(ValueError, match="other settings"):
        push_gravity_model(model, "me/lgt", dry_run=True, folder=other)


def test_weights_of_another_config_are_not_pushed(tmp_path):
    folder = save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    deeper = json.dumps({**config, "num_hidden_layers": 3})
    (folder / "config.json").write_text(deeper, encoding="utf-8")
    assert "are missing" in refused("push", folder, "me/lgt", "--dry-run")


def test_what_is_for_hosts_is_refused_with_what_to_do(lgt, tmp_path):
    assert "gravity-hf status" in refused("figures", lgt)
    assert "nothing to convert" in refused("convert", lgt, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_head_that_is_no_language_model_keeps_its_class_in_an_export(tmp_path):
    folder = save(tmp_path / "model", LGTForTokenClassification, is_causal=False)
    out = tmp_path / "out"
    result = run("export", folder, out, "--format", "fp16", "--samples", 2, "--length", 8)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LGTForTokenClassification"]
    assert "expected" in refused("generate", folder, "Hello")
