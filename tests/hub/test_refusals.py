"""Without gravity_hf nothing runs an export with dot products: it is refused, or gravity runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hosts import tiny_host, tiny_inputs
from hub import without_library
from hub.older import save_older
from hub.without_library import NAMES

from gravity_hf import GravityConfig, calibrate, gravity_lora, patch_with_gravity

Attempts = dict[str, tuple[str, str]]

# Attempt -> words of the refusal, as a reader of an error sees them.
UNTRUSTED, NAMED = "trust_remote_code=True", 'attn_implementation="gravity-only'
# Where config.json names a file of weights, which no argument overrides.
NO_FILE = "nor a safetensors index file (*.safetensors.index.json): gravity-only: load by an Auto"
OURS = "expected no attn_implementation, got"
REFUSED = {
    "auto config": UNTRUSTED,
    "auto class": UNTRUSTED,
    "auto class, no code": "model type `gravity_qwen2`",
    "host's config": NAMED,
    **{
        f"{what}{how}": NO_FILE
        for what in (
            "host's class",
            "host's base class",
            "tower's class",
            "host's type in config.json",
            "host's class, saved again",
        )
        for how in ("", *(f"{x} {name}" for x in (" under", ", config under") for name in NAMES))
    },
    **{f"Auto class, host's config under {name}": NO_FILE for name in NAMES},
    **{f"remote code under {name}": f"{OURS} '{name}'" for name in NAMES},
    "name in the config": f"{OURS} 'runtime'",
    "name in the text part's config": f"{OURS} 'runtime'",
    "set_attn_implementation": f"{OURS} 'sdpa'",
    **{
        f"{name}{how}": f"{OURS} '{name}'"
        for name in ("sdpa", "eager", "runtime")
        for how in (" written into the config", ", base model", ", compiled", ", generate")
    },
    **dict.fromkeys(
        (
            "PeftConfig",
            "LoraConfig",
            "PeftModel",
            "PeftMixedModel",
            "load_adapter",
            "Auto class on an adapter",
            "AutoPeftModel",
            "pipeline",
        ),
        "GRAVITY_LORA",
    ),
}

GRAVITY_RUNS = {
    "remote code",
    "remote code, towers",
    "remote code, older export",
    "compiled",
}
# What no file beside the weights can refuse: a config from elsewhere, and one without any weights.
DOT_PRODUCTS_RUN = {"host's class, a config of its own", "host's config under sdpa, no weights"}
COUNTS = {
    "modules of the host that were touched",
    "gravity types that transformers knows",
}


def save_towers(folder: Path) -> None:
    """An image and a text tower, each with a config of its own."""
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    small = {**heads, "intermediate_size": 32, "projection_dim": 16}
    text = {**small, "vocab_size": 97, "max_position_embeddings": 32, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    patch_with_gravity(transformers.CLIPModel(config).eval()).save_pretrained(folder)


def save_edited(model: Path, folder: Path, **changes: object) -> None:
    """The export without its code and after somebody wrote over its config."""
    shutil.copytree(model, folder)
    (folder / "modeling_gravity.py").unlink()
    config = json.loads((folder / "config.json").read_text()) | changes
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("refusals")
    names = ("model", "towers", "bare", "retyped", "again", "adapter", "base", "older")
    found = {name: root / name for name in names}
    torch.manual_seed(0)
    tiny_host("qwen2").save_pretrained(found["base"])
    host = transformers.Qwen2ForCausalLM.from_pretrained(found["base"])
    model = patch_with_gravity(host, GravityConfig())
    calibrate(model, [tiny_inputs("qwen2")])
    model.save_pretrained(found["model"])
    gravity_lora(model, r=2).save_pretrained(found["adapter"])
    save_towers(found["towers"])
    save_edited(found["model"], found["bare"])
    host_s = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    save_edited(found["model"], found["retyped"], **host_s)
    save_older(found["model"], found["older"])
    return found


@pytest.fixture(scope="module")
def attempts(folders, tmp_path_factory) -> Attempts:
    """What came of everything that was tried in one process without the library."""
    cache = tmp_path_factory.mktemp("modules")
    result = subprocess.run(
        [
            sys.executable,
            without_library.__file__,
            json.dumps({name: str(path) for name, path in folders.items()}),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("\n")[2])


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_would_run_dot_products_is_refused(attempt, attempts):
    kind, words = attempts[attempt]
    assert kind in ("ValueError", "KeyError"), (kind, words)
    assert REFUSED[attempt] in words


@pytest.mark.parametrize("attempt", sorted(GRAVITY_RUNS))
def test_the_code_beside_the_weights_runs(attempt, attempts):
    assert attempts[attempt][0] == without_library.RAN, attempts[attempt]


def test_every_attempt_has_its_promise(attempts):
    ran = {name for name, (kind, _) in attempts.items() if kind == without_library.RAN}
    assert ran == GRAVITY_RUNS | DOT_PRODUCTS_RUN | COUNTS
    assert set(attempts) == ran | set(REFUSED)


def test_a_refused_adapter_leaves_the_host_as_it_was(attempts):
    assert attempts["modules of the host that were touched"] == [without_library.RAN, "0"]


def test_transformers_itself_knows_no_gravity_type(attempts):
    assert attempts["gravity types that transformers knows"] == [without_library.RAN, "0"]
