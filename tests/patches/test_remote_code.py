"""Exports load without gravity_hf, through the file beside their weights, with the same logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from helpers import assert_within_budget
from hosts import FAMILIES, logits, tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules

# Runs where gravity_hf cannot be imported; writes the logits of each folder beside it.
LOADER = """
import sys
sys.modules["gravity_hf"] = None
import safetensors.torch, torch, transformers
for folder in sys.argv[1:]:
    heads = {"bert": "MaskedLM", "t5": "Seq2SeqLM", "labels": "SequenceClassification"}
    name = folder.rpartition("/")[2]
    head = next((heads[key] for key in heads if key in name), "CausalLM")
    auto = getattr(transformers, "AutoModelFor" + head)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    # What Trainer's label smoothing and pipelines look a class up in.
    names = auto._model_mapping._model_mapping
    assert names[model.config.model_type] == type(model).__name__, names
    inputs = safetensors.torch.load_file(folder + "/inputs")
    with torch.no_grad():
        result = {"logits": model(**inputs).logits}
    if hasattr(model, "generate") and head != "MaskedLM":
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        result["generated"] = generated
    model.save_pretrained(folder + "/again")
    again = auto.from_pretrained(folder + "/again", trust_remote_code=True)
    with torch.no_grad():
        result["again"] = again(**inputs).logits
    safetensors.torch.save_file(result, folder + "/remote")
"""

CASES = {
    "qwen2": ("qwen2", {}, 1.0),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}, 1.0),
    "qwen2_power": ("qwen2", {"law": "power"}, 0.0),
    "qwen2_bare": ("qwen2", {"layers": (0, 2), "mass_per": "kv_head"}, None),
    "llama": ("llama", {}, 1.0),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, 1.0),
    "gpt2": ("gpt2", {}, 1.0),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}, 1.0),
    "bert": ("bert", {}, 1.0),
    "bert_untied": ("bert", {"tie_word_embeddings": False}, 1.0),
    "gemma2": ("a cap on the scores", {}, 1.0),
    "gpt_oss": ("attention sinks", {}, 1.0),
    "t5": ("a learned position bias", {}, 1.0),
    "qwen2_labels": ("a head on a base model", {"layers": (0, 2)}, 1.0),
    "exaone": ("another type's classes", {}, 1.0),
    "deepseek_v32": ("keys chosen by an indexer", {"law": "power"}, 1.0),
}

# Hosts of a type whose head is of the general kind, and of a type that has no code of its own.
BUILT_FROM = {
    "a head on a base model": ("qwen2", "Qwen2Config", "Qwen2ForSequenceClassification"),
    "another type's classes": ("llama", "ExaoneConfig", "LlamaForCausalLM"),
}

# What an export may name for the library's use; the file beside it has one way to compute.
NAMED = {"qwen2_triton": "triton", "qwen2_flex": "flex"}


def build(case):
    family, options, softness = CASES[case]
    tying = {k: v for k, v in options.items() if k == "tie_word_embeddings"}
    settings = {k: v for k, v in options.items() if k not in tying}
    if family in BUILT_FROM:
        family, config_class, model_class = BUILT_FROM[family]
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**FAMILIES[family][2])
        host = getattr(transformers, model_class)(config).eval()
    else:
        host = tiny_host(family, **tying)
    model = patch_with_gravity(host, GravityConfig(**settings))
    if softness is not None:
        calibrate(model, [tiny_inputs(family)], softness=softness)
    inputs = {name: tensor.clone() for name, tensor in tiny_inputs(family).items()}
    inputs["attention_mask"][0, :3] = 0
    return model, inputs


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    folders = []
    for case in [*CASES, *NAMED]:
        model, inputs = build("qwen2" if case in NAMED else case)
        if case in NAMED:
            model.config.gravity["implementation"] = NAMED[case]
        model.save_pretrained(root / case)
        safetensors.torch.save_file(inputs, root / case / "inputs")
        folders.append(str(root / case))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOADER, *folders], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return root


@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_same_logits_without_the_library(case, exports):
    """F10, F13: one flat file serves every host."""
    model, inputs = build(case)
    remote = safetensors.torch.load_file(exports / case / "remote")
    ours = logits(model, inputs)
    for module in gravity_modules(model).values():
        object.__setattr__(module.config, "implementation", "reference")
    peer = logits(model, inputs)
    # Fused experts have no float64.
    model.set_experts_implementation("eager")
    exact = logits(model.double(), inputs)
    real = inputs["attention_mask"].bool() if ours.dim() == 3 else slice(None)
    assert_within_budget("remote", remote["logits"][real], exact[real], peer[real], factor=3)
    assert_within_budget("library", ours[real], exact[real], peer[real], factor=3)
    assert torch.equal(remote["again"], remote["logits"])


@pytest.mark.parametrize("case", NAMED)
def test_an_implementation_that_the_export_names_is_no_matter_without_the_library(case, exports):
    named, plain = (safetensors.torch.load_file(exports / c / "remote") for c in (case, "qwen2"))
    assert torch.equal(named["logits"], plain["logits"])
    assert torch.equal(named["generated"], plain["generated"])


def test_generation_without_the_library_gives_the_same_text(exports):
    model, inputs = build("qwen2")
    remote = safetensors.torch.load_file(exports / "qwen2" / "remote")["generated"]
    ours = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, remote)


def test_the_remote_file_knows_exactly_the_library_s_settings():
    from dataclasses import fields

    from gravity_hf._remote_code import modeling_gravity

    from gravity_hf.config import CONFIG_VERSION, EPSILON_FLOOR
    from gravity_hf.integration import guards, sites
    from gravity_hf.integration.support import (
        CAUSAL_IN_NAME_ONLY,
        NO_HEADS,
        REFUSED_ARGUMENTS,
    )

    assert {field.name for field in fields(GravityConfig)} == modeling_gravity.SETTINGS
    assert modeling_gravity.HEAD_COUNT_NAMES == sites._HEAD_COUNT_NAMES
    assert modeling_gravity.NO_HEADS == NO_HEADS
    assert modeling_gravity.CAUSAL_IN_NAME_ONLY == CAUSAL_IN_NAME_ONLY
    assert modeling_gravity.EXPORT_NAME == guards.EXPORT_NAME
    assert modeling_gravity.WEIGHTS_KEY == guards.WEIGHTS_KEY
    assert modeling_gravity.VERSION == CONFIG_VERSION
    assert modeling_gravity.EPSILON_FLOOR == EPSILON_FLOOR
    assert modeling_gravity.REFUSED_ARGUMENTS.keys() == REFUSED_ARGUMENTS.keys()


def test_the_remote_file_imports_only_torch_and_transformers():
    import ast
    from importlib.resources import files

    source = files("gravity_hf._remote_code").joinpath("modeling_gravity.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    standard = {"dis", "functools", "inspect", "sys", "threading", "types"}
    assert imported <= {*standard, "torch", "transformers"}
