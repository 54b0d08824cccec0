"""A push brings everything in one commit, and what it brings computes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.commands import run
from ecosystem.folders import byte_decoder, byte_host
from helpers import assert_within_budget
from hosts import logits, tiny_inputs
from hub.conftest import connected_hub
from hub.loopback import WRITER, LoopbackHub
from hub.test_cards import RESULTS
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gravity_hf import GravityConfig, gravity_lora, patch_with_gravity, push_gravity_model
from gravity_hf.hub.cards import write_card
from gravity_hf.hub.plan import UploadPlan
from gravity_hf.hub.staging import Extras, staged
from gravity_hf.training.tokenizers import byte_tokenizer

# One process per way to load; writes the logits of every repository that it is told.
LOADER = """
import sys
way, folder, *repos = sys.argv[1:]
if way == "remote":
    sys.modules["gravity_hf"] = None
import safetensors.torch, torch, transformers
if way == "library":
    from gravity_hf import load_gravity_model
inputs = safetensors.torch.load_file(folder + "/inputs")
found = {}
for repo in repos:
    if way == "remote":
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(repo, trust_remote_code=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
        assert tokenizer("ab")["input_ids"] == [97, 98]
    else:
        model = load_gravity_model(repo)
    with torch.no_grad():
        found[repo] = model(**inputs).logits
safetensors.torch.save_file(found, folder + "/" + way)
"""
EVERYTHING = {
    "README.md",
    "config.json",
    "figures/figures.json",
    "figures/masses.png",
    "generation_config.json",
    "model.safetensors",
    "modeling_gravity.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


def start_loading(way: str, folder: Path, url: str, *repos: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / f"home-{way}"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITER,
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", LOADER, way, str(folder), *repos]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Pushes a model, the same in shards, its host and an adapter; loads all in new processes."""
    folder = tmp_path_factory.mktemp("loaded")
    inputs = tiny_inputs("qwen2")
    save_file(inputs, folder / "inputs")
    model = byte_decoder()
    ours = {"model": logits(model, inputs)}
    adapter = adapter_of("me/host")
    ours["adapter"] = logits(adapter, inputs)
    with adapter.disable_adapter():
        ours["bare"] = logits(adapter, inputs)
    with connected_hub() as hub:
        options = {"tokenizer": byte_tokenizer()}
        push_gravity_model(model, "me/model", **options)
        paths = hub.repo("me/model").paths()
        push_gravity_model(
            model, "me/shards", max_shard_size="100KB", private=True, figures=False, **options
        )
        shards = hub.repo("me/shards").paths()
        byte_host().push_to_hub("me/host")
        push_gravity_model(adapter, "me/adapter", figures=False, **options)
        adapter_paths = hub.repo("me/adapter").paths()
        processes = [
            start_loading("remote", folder, hub.url, "me/model", "me/shards"),
            start_loading("library", folder, hub.url, "me/model", "me/adapter"),
        ]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    parts = {"model": paths, "shards": shards, "adapter": adapter_paths}
    found = {way: load_file(folder / way) for way in ("remote", "library")}
    return {"ours": ours, "paths": parts, **found}


def adapter_of(base: str):
    host = byte_host()
    host.name_or_path = base
    adapter = gravity_lora(patch_with_gravity(host, GravityConfig()), r=2)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.05 * torch.randn_like(parameter), alpha=1.0 if "lora" in name else 3
                )
    return adapter.eval()


def test_a_push_brings_every_part(loaded) -> None:
    assert loaded["paths"]["model"] >= EVERYTHING
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert loaded["paths"]["adapter"] >= adapter
    assert "config.json" not in loaded["paths"]["adapter"]


@pytest.mark.parametrize("repo", ["me/model", "me/shards"])
def test_a_process_without_the_library_computes_the_same_logits(repo, loaded) -> None:
    exact = logits(byte_decoder().double(), tiny_inputs("qwen2"))
    ours = loaded["ours"]["model"]
    # Another order of operations, as without a push: no more error than the library's own.
    assert_within_budget(repo, loaded["remote"][repo], exact, ours, factor=3)
    assert torch.equal(loaded["remote"][repo], loaded["remote"]["me/model"])
    assert sum(path.endswith(".safetensors") for path in loaded["paths"]["shards"]) > 2


def test_a_process_with_the_library_computes_the_same_logits(loaded) -> None:
    assert torch.equal(loaded["library"]["me/model"], loaded["ours"]["model"])


def test_an_adapter_comes_back_with_its_masses(loaded) -> None:
    assert torch.equal(loaded["library"]["me/adapter"], loaded["ours"]["adapter"])
    assert not torch.equal(loaded["ours"]["adapter"], loaded["ours"]["bare"])


def test_the_dry_run_lists_exactly_what_the_push_uploads(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    plan = push_gravity_model(export, "me/x", dry_run=True, private=True)
    assert isinstance(plan, UploadPlan)
    assert hub.requests == []
    push_gravity_model(export, "me/x", private=True)
    repo = hub.repo("me/x")
    assert {f.path: f.size for f in plan.files} == {
        path: len(repo.tree("main")[path].content) for path in repo.paths()
    }
    assert set(plan.paths) >= EVERYTHING
    assert plan.total_bytes == sum(len(repo.tree("main")[path].content) for path in repo.paths())
    assert repo.private and len(repo.messages) == 2
    shown = str(plan)
    assert all(f"  {path} " in shown for path in plan.paths) and "unknown" in shown


def test_a_folder_goes_up_without_what_is_not_meant_for_others(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "model"))
    for name in (".env", ".cache/x", "work/lora/state.safetensors", "__pycache__/a.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    plan = push_gravity_model(folder, "me/x", figures=False, dry_run=True)
    assert "left out: .cache/, .env, __pycache__/, work/" in str(plan)
    push_gravity_model(folder, "me/x", figures=False)
    assert hub.repo("me/x").paths() == set(plan.paths)
    assert not any("/" in path or path.startswith(".") for path in plan.paths)


def test_the_command_line_pushes_what_it_has_shown(hub: LoopbackHub, export: Path) -> None:
    shown = run("push", export, "me/x", "--dry-run", "--private")
    assert shown.exit_code == 0, shown.output
    assert "model.safetensors" in shown.output and "nothing was sent" in shown.output
    assert hub.requests == []
    pushed = run("push", export, "me/x", "--private", "--message", "first of all")
    assert pushed.exit_code == 0, pushed.output
    assert f"{hub.url}/me/x" in pushed.output
    assert hub.repo("me/x").private and hub.repo("me/x").messages[-1] == "first of all"


def test_push_to_hub_of_a_patched_model_is_one_good_commit(hub: LoopbackHub) -> None:
    model = byte_decoder()
    model.add_model_tags(["mine"])
    done = model.push_to_hub("x", tags=["yours"], commit_message="m", max_shard_size="100KB")
    repo = hub.repo("me/x")
    assert repo.messages == ["initial commit", "m"] and done.oid == repo.oid("main")
    assert {"modeling_gravity.py", "model.safetensors.index.json"} <= repo.paths()
    card = ModelCard(repo.tree("main")["README.md"].content.decode())
    assert {"mine", "yours", "gravity-attention"} <= set(card.data.tags)
    # Without a namespace the repository is the user's, and the card says so.
    assert 'load_gravity_model("me/x")' in card.text


def test_push_to_hub_of_an_adapter_is_one_good_commit(hub: LoopbackHub) -> None:
    byte_host().push_to_hub("me/x")
    adapter_of("me/host").push_to_hub("me/x", commit_message="adapter", tags=["mine"])
    repo = hub.repo("me/x")
    assert len(repo.messages) == 3 and repo.messages[-1] == "adapter"
    assert repo.paths() >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not {"config.json", "model.safetensors"} & repo.paths()
    card = ModelCard(repo.tree("main")["README.md"].content.decode())
    assert {"mine", "gravity-attention"} <= set(card.data.tags)

    plain = get_peft_model(byte_host(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.push_to_hub("me/plain")
    assert "adapter_model.safetensors" in hub.repo("me/plain").paths()


def test_save_pretrained_pushes_what_it_has_written(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "diary.bin").write_bytes(b"dear")
    byte_decoder().save_pretrained(folder, push_to_hub=True, private=True, variant=None)
    repo = hub.repo("me/x")
    assert repo.private and len(repo.messages) == 2
    assert {"README.md", "modeling_gravity.py", "model.safetensors"} <= repo.paths()
    assert "diary.bin" not in repo.paths()
    assert (folder / "model.safetensors").is_file()
    assert not any(file.name.startswith(".") for file in folder.iterdir())


def test_trainer_pushes_a_folder_that_is_no_host(hub: LoopbackHub, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], hub_model_id="me/x"
    )
    Trainer(model=byte_decoder(), args=arguments).push_to_hub()
    repo = hub.repo("me/x")
    assert {"modeling_gravity.py", "model.safetensors", "config.json"} <= repo.paths()
    assert b'"model_type": "gravity_qwen2"' in repo.tree("main")["config.json"].content


def test_what_an_earlier_model_left_goes_in_the_same_commit(hub: LoopbackHub, export: Path) -> None:
    left = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "x.gguf"]
    left += ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"]
    kept = ["notes.md", "training_args.bin", "other/model.safetensors"]
    hub.store.create("me/x", private=False)
    seed(hub, [*left, *kept])
    push_gravity_model(export, "me/x", figures=False)
    repo = hub.repo("me/x")
    assert not set(left) & repo.paths() and set(kept) <= repo.paths()
    assert len(repo.messages) == 3

    push_gravity_model(adapter_of("me/host"), "me/x", figures=False, tokenizer=None)
    assert not {"config.json", "model.safetensors"} & repo.paths()
    assert "adapter_model.safetensors" in repo.paths()


def seed(hub: LoopbackHub, paths: list[str]) -> None:
    files = [{"key": "file", "value": {"path": path, "content": b"old"}} for path in paths]
    header = {"key": "header", "value": {"summary": "old"}}
    hub.repo("me/x").commit("main", [header, *files], create_pr=False)


def test_a_branch_is_made_and_main_stays(hub: LoopbackHub, export: Path) -> None:
    push_gravity_model(export, "me/x", figures=False, revision="soft")
    repo = hub.repo("me/x")
    assert repo.paths() == set() and "model.safetensors" in repo.paths("soft")
    before = repo.oid("soft")
    push_gravity_model(export, "me/x", figures=False, revision="soft", tags=["more"])
    assert repo.oid("soft") != before and repo.paths() == set()


def test_a_pull_request_is_opened_and_added_to(hub: LoopbackHub, export: Path) -> None:
    done = push_gravity_model(export, "me/x", figures=False, create_pr=True)
    repo = hub.repo("me/x")
    assert done.pr_revision == "refs/pr/1" and "model.safetensors" in repo.paths("refs/pr/1")
    assert repo.paths() == set()
    push_gravity_model(
        export, "me/x", figures=False, revision="refs/pr/1", tokenizer=None, tags=["more"]
    )
    assert b"- more" in repo.tree("refs/pr/1")["README.md"].content
    with pytest.raises(ValueError, match="refs/pr/9"):
        push_gravity_model(export, "me/x", figures=False, revision="refs/pr/9")
    with pytest.raises(ValueError, match="create_pr"):
        push_gravity_model(export, "me/x", revision="refs/pr/1", create_pr=True)


def test_nothing_new_makes_no_commit(hub: LoopbackHub, export: Path) -> None:
    first = push_gravity_model(export, "me/x", figures=False)
    again = push_gravity_model(export, "me/x", figures=False)
    assert again.oid == first.oid and len(hub.repo("me/x").messages) == 2


def test_the_repository_s_own_ignore_rules_leave_nothing_out(
    hub: LoopbackHub, export: Path
) -> None:
    hub.store.create("me/x", private=False)
    header = {"key": "header", "value": {"summary": "old"}}
    rule = {"key": "file", "value": {"path": ".gitignore", "content": b"*.safetensors\n"}}
    hub.repo("me/x").commit("main", [header, rule], create_pr=False)
    push_gravity_model(export, "me/x", figures=False)
    assert "model.safetensors" in hub.repo("me/x").paths()


def test_the_host_s_tokenizer_goes_along_without_being_asked_for(tmp_path: Path) -> None:
    byte_host().save_pretrained(tmp_path / "host")
    byte_tokenizer().save_pretrained(tmp_path / "host")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    patch_with_gravity(model)
    options = {"figures": False, "dry_run": True}
    found = push_gravity_model(model, "me/x", **options).paths
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(found)
    without = push_gravity_model(model, "me/x", tokenizer=None, **options)
    assert "tokenizer.json" not in without.paths and "no tokenizer" not in str(without)
    shutil.rmtree(tmp_path / "host")
    missing = push_gravity_model(model, "me/x", **options)
    assert "no tokenizer or processor: none was found on this machine" in str(missing)


def test_figures_and_results_that_are_given_go_up_as_they_are(
    hub: LoopbackHub, export: Path, tmp_path: Path
) -> None:
    (tmp_path / "figures.json").write_text("[]")
    (tmp_path / "mine.png").write_bytes(b"png")
    push_gravity_model(export, "me/x", figures=tmp_path, results=RESULTS)
    tree = hub.repo("me/x").tree("main")
    assert tree["figures/mine.png"].content == b"png" and "figures/masses.png" not in tree
    assert json.loads(tree["results.json"].content) == RESULTS
    assert "2.4125" in tree["README.md"].content.decode()
    push_gravity_model(export, "me/x", results=RESULTS)
    assert "figures/mine.png" not in hub.repo("me/x").paths()
    assert "figures/masses.png" in hub.repo("me/x").paths()


def test_a_card_that_somebody_has_written_stays_theirs(export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "model"))
    write_card(folder, folder / "README.md")
    generated = (folder / "README.md").read_text()
    with staged(folder, "me/x", Extras(figures=False), max_shard_size=1, online=False) as stage:
        renamed = stage.files["README.md"].read_text()
    assert renamed != generated and 'load_gravity_model("me/x")' in renamed
    (folder / "README.md").write_text(generated + "And a word of mine.")
    with staged(folder, "me/x", Extras(figures=False), max_shard_size=1, online=False) as stage:
        assert stage.files["README.md"].read_text() == generated + "And a word of mine."


def test_a_dry_run_of_an_adapter_asks_nobody(hub: LoopbackHub) -> None:
    plan = push_gravity_model(adapter_of("me/host"), "me/x", figures=False, dry_run=True)
    assert "adapter_model.safetensors" in plan.paths and hub.requests == []


def test_a_pull_request_needs_a_branch_to_go_into(hub: LoopbackHub, export: Path) -> None:
    with pytest.raises(ValueError, match="there is none named 'soft'"):
        push_gravity_model(export, "me/x", figures=False, revision="soft", create_pr=True)
