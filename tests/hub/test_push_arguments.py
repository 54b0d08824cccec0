"""What is given to a push takes the place of what is there, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.folders import byte_decoder, byte_host, word_tokenizer
from hub.card_results import RESULTS
from hub.loopback import LoopbackHub
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from gravity_hf import GravityConfig, load_gravity_model, patch_with_gravity, push_gravity_model
from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.plan import UploadPlan
from gravity_hf.hub.stale import stale_files

HARNESS = {"results": {"wikitext": {"ppl": 9.0}}, "config": {"model": "hf"}, "versions": {}}
TEMPLATE = """---
base_model: /home/me/base
library_name: peft
tags: [lora]
---
# Model Card for Model ID
[More Information Needed]
"""


def planned(model: Any, **options: Any) -> UploadPlan:
    plan = push_gravity_model(model, "me/x", dry_run=True, **{"figures": False, **options})
    assert isinstance(plan, UploadPlan)
    return plan


def copied(export: Path, folder: Path, **files: str) -> Path:
    shutil.copytree(export, folder)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)
    return folder


def card_on(hub: LoopbackHub, name: str = "me/x") -> ModelCard:
    return ModelCard(hub.repo(name).tree("main")["README.md"].content.decode())


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    """Not to be changed."""
    return byte_decoder()


def test_a_tokenizer_takes_the_place_of_the_folder_s(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = copied(export, tmp_path / "model", merges_dot_txt="#version: 0.2")
    assert {"merges.txt", "tokenizer.json"} <= set(planned(folder).paths)
    without = set(planned(folder, tokenizer=None).paths)
    assert "model.safetensors" in without
    assert not {"merges.txt", "tokenizer.json", "tokenizer_config.json"} & without
    push_gravity_model(folder, "me/x", tokenizer=word_tokenizer(), figures=False)
    tree = hub.repo("me/x").tree("main")
    assert b"falls" in tree["tokenizer.json"].content and "merges.txt" not in tree


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tokenizer's name": ({"tokenizer": "gpt2"}, "tokenizer: expected 'host', a tokenizer"),
    "a processor's name": ({"processor": "vit"}, "processor: expected a processor"),
    "no figures": ({"figures": "no/figures"}, "figures: expected True, False or a folder"),
    "no results": ({"results": "no/results.json"}, "no such file"),
    "other results": ({"results": HARNESS}, "without its block 'host'"),
    "two folders": ({"folder": "elsewhere"}, "expected the folder of an export once"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_an_argument_that_does_not_fit_is_named(
    options: dict[str, Any], words: str, export: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        planned(export, **options)


def test_a_folder_must_hold_what_the_model_was_saved_as(
    export: Path, decoder: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(export.parent))
    assert "model.safetensors" in planned(decoder, folder=f"~/{export.name}").paths
    with pytest.raises(ValueError, match="expected a folder"):
        planned(decoder, folder=tmp_path / "none")
    with pytest.raises(ValueError, match="with other settings"):
        planned(patch_with_gravity(byte_host(), GravityConfig()), folder=export)


def test_a_host_from_disk_is_pushed_as_it_was_saved_and_without_a_made_up_tokenizer(
    tmp_path: Path,
) -> None:
    byte_host().save_pretrained(tmp_path / "host")
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(tmp_path / "host"))
    model.save_pretrained(tmp_path / "saved")
    plan = planned(model, folder=tmp_path / "saved")
    assert "model.safetensors" in plan.paths and "tokenizer.json" not in plan.paths
    assert "no tokenizer or processor: none was found" in str(plan)


def test_a_compiled_model_is_told_from_a_host(decoder: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match="got a compiled model; push the model"):
        planned(torch.compile(decoder))


def test_weights_that_cannot_be_saved_again_are_said_to_be_so(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    export_gravity_model(export, tmp_path / "int8", format="int8", samples=1, length=8)
    with pytest.raises(ValueError, match="Push the folder that it was loaded from"):
        planned(load_gravity_model(tmp_path / "int8"))
    assert "model.safetensors" in planned(tmp_path / "int8").paths


def test_a_model_s_own_default_of_shards_may_be_none(hub: LoopbackHub) -> None:
    byte_decoder().push_to_hub("me/x", max_shard_size=None)
    assert "model.safetensors" in hub.repo("me/x").paths()


def test_results_of_other_software_stay_at_home(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = copied(export, tmp_path / "model", results_dot_json=json.dumps(HARNESS))
    plan = planned(folder)
    assert "results.json is not that of a conversion" in str(plan)
    push_gravity_model(folder, "me/x", figures=False)
    assert hub.repo("me/x").paths() == set(plan.paths) and "results.json" not in plan.paths
    assert "not measured" in card_on(hub).text


def test_a_card_of_another_kind_makes_way(hub: LoopbackHub, export: Path, tmp_path: Path) -> None:
    folder = copied(export, tmp_path / "model", README_dot_md=TEMPLATE)
    assert "README.md is not a card of a gravity model" in str(planned(folder))
    push_gravity_model(folder, "me/x", figures=False)
    assert "gravity-attention" in card_on(hub).data.tags
    assert "/home/me" not in str(card_on(hub)) and "Needed" not in str(card_on(hub))


def test_what_a_trainer_leaves_stays_at_home(export: Path, tmp_path: Path) -> None:
    folder = copied(export, tmp_path / "model")
    left = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"]
    left += ["scaler.pt", "trainer_state.json", "checkpoint-20/optimizer.pt"]
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    plan = planned(folder)
    assert not set(left) & set(plan.paths)
    assert "left out: checkpoint-20/, optimizer.pt, rng_state.pth" in str(plan)


def recorded_in(results: dict[str, Any] | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "README.md").write_text("---\nbase_model: maker/carded\n---\n")
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))

    return write


HOSTS = {
    "results": (recorded_in(RESULTS), "maker/host"),
    "card": (recorded_in(None), "maker/carded"),
}


@pytest.mark.parametrize(("write", "host"), HOSTS.values(), ids=HOSTS.keys())
def test_a_gravity_model_pushed_again_names_the_host_and_not_itself(
    write: Callable[[Path], None], host: str, hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = copied(export, tmp_path / "model")
    write(folder)
    model = load_gravity_model(folder)
    push_gravity_model(model, "me/x", figures=False)
    text = str(card_on(hub))
    assert host in text and str(tmp_path) not in text
    assert "tokenizer.json" in hub.repo("me/x").paths()
    # Loaded from the Hub and pushed there again, as it was or as the host of itself.
    push_gravity_model(load_gravity_model("me/x"), "me/again", figures=False)
    assert "base_model: me/" not in str(card_on(hub, "me/again"))
    byte_host().push_to_hub("me/host")
    over = patch_with_gravity(AutoModelForCausalLM.from_pretrained("me/host"))
    push_gravity_model(over, "me/host", figures=False)
    assert "base_model: me/" not in str(card_on(hub, "me/host"))


def test_a_dry_run_without_a_namespace_says_what_it_cannot_know(export: Path) -> None:
    plan = push_gravity_model(export, "x", figures=False, dry_run=True)
    assert "your own namespace before the name" in str(plan)
    assert "your own namespace" not in str(planned(export))


def test_files_that_an_earlier_model_left_and_loaders_would_read_go() -> None:
    pushed = ["config.json", "model.safetensors"]
    weights = ["onnx/model.onnx", "onnx/model.onnx_data", "openvino/openvino_model.xml"]
    weights += ["coreml/x.mlpackage/Manifest.json", "rust_model.ot", "model.onnx.data"]
    settings = ["generation_config.json", "modules.json"]
    inputs = ["added_tokens.json", "merges.txt", "vocab.txt"]
    kept = ["1_Pooling/config.json", "onnx/README.md", "notes.md", "preprocessor_config.json"]
    there = [*weights, *settings, *inputs, *kept]
    assert set(stale_files(there, pushed)) == {*weights, *settings}
    assert set(stale_files(there, [*pushed, "tokenizer.json"])) == {*weights, *settings, *inputs}
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert set(stale_files(there, adapter)) == set(weights)
    plan = planned_words()
    assert all(word in plan for word in ("onnx/", "tokenizer", *settings))


def planned_words() -> str:
    return str(UploadPlan("me/x", None, False, None, (), deletions=None, notices=()))
