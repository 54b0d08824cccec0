"""What is not a whole and safe export is refused before the Hub is asked anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ecosystem.folders import byte_decoder, byte_host
from hub.loopback import LoopbackHub
from safetensors.torch import load_file, save_file

from gravity_hf import GravityConfig, gravity_lora, patch_with_gravity, push_gravity_model
from gravity_hf.hub.checks import check_export

WEIGHTS = "model.safetensors"
# None of the Hub's.
TOKEN = "hf_" + "aB3dE6gH9jK2mN5" * 2 + "pQ8s"


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def without_tensors(file: Path, part: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def config(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "config.json", change)


def written(name: str, text: str = "x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a host's type": (config(lambda c: c.update(model_type="qwen2")), "got 'qwen2'"),
    "no settings": (config(lambda c: c.pop("gravity")), "expected a gravity block"),
    "unknown settings": (config(lambda c: c["gravity"].update(charge=1)), "charge"),
    "no way to its code": (config(lambda c: c.pop("auto_map")), "auto_map"),
    "code from elsewhere": (
        config(lambda c: c["auto_map"].update(AutoModel="other--x.Y")),
        "leads to it",
    ),
    "more layers than masses": (
        lambda f: without_tensors(f / WEIGHTS, "layers.2.self_attn.gravity.mass_log"),
        "such as model.layers.2",
    ),
    "masses of another shape": (
        config(lambda c: c["gravity"].update(mass_per="layer")),
        r"expected shape \[1\], got \[6\]",
    ),
    "no masses": (lambda f: without_tensors(f / WEIGHTS, ".gravity."), "are missing"),
    "weights cut short": (lambda f: cut(f / WEIGHTS), "whole safetensors"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "found neither"),
    "a shard of another save": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-00001-of-00002.safetensors"),
        "one save",
    ),
    "no code": (lambda f: (f / "modeling_gravity.py").unlink(), "no modeling_gravity.py"),
    "an adapter on top": (written("adapter_config.json", "{}"), "got both"),
    "a pickle": (written("weights.bin"), "can run code"),
    "a pickle below": (
        lambda f: ((f / "sub").mkdir(), written("sub/optimizer.PT")(f)),
        "can run code",
    ),
    "a token's file": (written("hf_token.txt"), "hf_token.txt, which by its name"),
    "a token in a text": (written("log.md", f"--token {TOKEN}"), r"Hub token in it \(hf_aB3"),
    "a token in a log": (written("train.log", f"HF_TOKEN={TOKEN}\n"), "Hub token in it"),
    "a token far down": (
        written("long.txt", "-" * (2**20 - 9) + f" {TOKEN} " + "-" * 2**20),
        "Hub token in it",
    ),
    "a key": (written("server.key"), "by its name"),
    "a name's secret": (written("openai-api-key"), "by its name"),
    "a link that leads out": (lambda f: (f / "passwd").symlink_to("/etc/passwd"), "got a link"),
    "no JSON": (written("config.json", "{"), "expected JSON"),
    "nothing": (lambda f: [file.unlink() for file in f.iterdir()], "found neither"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_export_is_refused_before_any_request(
    spoil: Callable[[Path], object], words: str, hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        push_gravity_model(folder, "me/x", figures=False)
    assert hub.requests == []


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    byte_decoder().save_pretrained(tmp_path, max_shard_size="60KB")
    check_export(tmp_path)
    shard = tmp_path / "model-00002-of-00006.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"missing, such as \['model-00002"):
        check_export(tmp_path)
    shard.write_bytes(kept)
    without_tensors(shard, next(iter(load_file(shard))))
    with pytest.raises(ValueError, match="in no shard"):
        check_export(tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with lifted keys and softenings; its base is beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    byte_host().save_pretrained(folder / "base")
    host = byte_host()
    host.name_or_path = str(folder / "base")
    model = gravity_lora(patch_with_gravity(host, GravityConfig(learn_softening=True)), r=2)
    model.save_pretrained(folder / "adapter")
    return folder


ADAPTER_WEIGHTS = "adapter_model.safetensors"
SPOILED_ADAPTERS = {
    "no settings": (
        lambda f: change_json(f / "adapter_config.json", lambda c: c.pop("gravity")),
        "gravity block",
    ),
    "no masses": (lambda f: without_tensors(f / ADAPTER_WEIGHTS, ".gravity."), "0 layers"),
    "no softenings": (
        lambda f: without_tensors(f / ADAPTER_WEIGHTS, "softening_log"),
        "without base_model.*softening_log",
    ),
    "a layer without masses": (
        lambda f: without_tensors(f / ADAPTER_WEIGHTS, "layers.1.self_attn.gravity"),
        "such as base_model.model.model.layers.1",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED_ADAPTERS.values(), ids=SPOILED_ADAPTERS.keys())
def test_a_spoiled_adapter_is_refused(
    spoil: Callable[[Path], object], words: str, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "adapter"))
    check_export(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        check_export(folder)


def test_a_base_on_this_machine_is_pointed_out(adapter: Path) -> None:
    plan = push_gravity_model(adapter / "adapter", "me/x", figures=False, dry_run=True)
    assert "of this machine, so that others cannot load it" in str(plan)


def test_a_host_is_no_gravity_model(hub: LoopbackHub) -> None:
    with pytest.raises(TypeError, match="with its own attention"):
        push_gravity_model(byte_host(), "me/x")
    with pytest.raises(ValueError, match="expected a folder"):
        push_gravity_model("no/such/folder", "me/x")
    with pytest.raises(ValueError, match="repo id|Repo id"):
        push_gravity_model(torch.nn.Linear(1, 1), "me/x/y")
    assert hub.requests == []


def test_vocabularies_are_no_secrets(export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "model"))
    names = ["special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"]
    names += ["token_classification_results.json", "loss_per_token.csv", "special_token.json"]
    names += ["token_counts.json", "per-token-loss.png", "key.json"]
    for name in names:
        (folder / name).write_text("{}")
    (folder / "README.md").write_text(f"export HF_TOKEN=hf_{'x' * 34}")
    check_export(folder)
