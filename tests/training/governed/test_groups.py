"""Every parameter of a model is in exactly one group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gravity_hf import (
    GravityConfig,
    LGTConfig,
    LGTForCausalLM,
    NGTConfig,
    NGTForCausalLM,
    patch_with_gravity,
)
from gravity_hf.training.governed import ParameterGroups
from gravity_hf.training.governed.taxonomy import FOLDER, plain_name, read_taxonomy

LLAMA_LIKE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 8,
    "moe_intermediate_size": 4,
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "vocab_size": 16,
    "pad_token_id": 0,
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 16},
    "leanformer": {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "screen_dim": 2,
        "vocab_size": 16,
    },
    "gpt_neox": {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
    },
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "ffn_dim": 8,
        "word_embed_proj_dim": 4,
        "vocab_size": 16,
    },
}
FAMILIES = [kind for file in FOLDER.glob("*.json") for kind in read_taxonomy(file).model_types]


def model_of(kind: str, **more: Any) -> PreTrainedModel:
    sizes = {**SIZES.get(kind, LLAMA_LIKE), **more}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


def owner_of(groups: ParameterGroups, part: str) -> set[str]:
    """Groups with a parameter that has `part` in its name."""
    return {group.name for group in groups for name in group.names if part in name}


def assert_partition(groups: ParameterGroups, model: nn.Module) -> None:
    named = dict(model.named_parameters())
    found = [name for group in groups for name in group.names]
    assert sorted(found) == sorted(named)
    for group in groups:
        assert all(named[n] is p for n, p in zip(group.names, group.parameters, strict=True))
    assert sum(group.size for group in groups) == sum(p.numel() for p in named.values())


@pytest.mark.parametrize("kind", sorted({*FAMILIES, "gpt_neox", "opt"}))
def test_groups_are_a_partition(kind: str) -> None:
    model = model_of(kind)
    groups = ParameterGroups.of(model)
    assert_partition(groups, model)
    assert groups.taxonomy.family == ("kinds" if kind in ("gpt_neox", "opt") else _family(kind))
    assert {"embeddings", "attention_routing", "attention_output", "ff_projections"} <= {
        *groups.names
    }


def _family(kind: str) -> str:
    families = [read_taxonomy(file) for file in FOLDER.glob("*.json")]
    return next(family.family for family in families if kind in family.model_types)


@pytest.mark.parametrize("kind", ["leanformer", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_the_output_head_learns_from_the_start(kind: str) -> None:
    model = model_of(kind, tie_word_embeddings=False)
    groups = ParameterGroups.of(model)
    (owner,) = owner_of(groups, "lm_head")
    assert owner == "output_head" and groups[owner].level == 0


def test_modules_by_kind_are_what_they_do() -> None:
    groups = ParameterGroups.of(model_of("opt"))
    assert owner_of(groups, "q_proj") == {"attention_routing"}
    assert owner_of(groups, "v_proj") == owner_of(groups, "out_proj") == {"attention_output"}
    assert owner_of(groups, "fc1") == {"ff_projections"}
    assert owner_of(groups, "layer_norm") == {"layer_norms"}


@pytest.mark.parametrize(
    ("kind", "config"), [(NGTForCausalLM, NGTConfig), (LGTForCausalLM, LGTConfig)]
)
def test_gravity_decides_who_attends_to_whom(kind: Any, config: Any) -> None:
    with torch.device("meta"):
        model = kind(config())
    groups = ParameterGroups.of(model)
    assert_partition(groups, model)
    assert owner_of(groups, ".gravity.") == {"attention_routing"}


@pytest.mark.parametrize(
    "choice",
    [
        {"attention": "gravity", "learn_softening": True},
        {"compat_reference": True},
        {"position": "learned", "norm": "layer", "qk_norm": True},
        {"head_rank": 2, "tie_word_embeddings": False},
        {"attention_rank": 0, "feed_forward_rank": 0, "attention_bias": True, "mlp_bias": True},
        {"screening": "none", "exit_heads": False},
    ],
    ids=lambda choice: "-".join(choice),
)
def test_every_kind_of_leanformer_is_covered(choice: dict[str, Any]) -> None:
    model = model_of("leanformer", **choice)
    groups = ParameterGroups.of(model)
    assert_partition(groups, model)
    assert owner_of(groups, "screen") <= {"attention_routing"}
    assert owner_of(groups, "predictor") <= {"gates"}
    assert owner_of(groups, "exit_head") <= {"exit_classifier"}


def test_a_patched_host_is_of_the_family_of_its_host() -> None:
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig())
    groups = ParameterGroups.of(model)
    assert groups.taxonomy.family == "llama"
    assert_partition(groups, model)
    assert owner_of(groups, "gravity.mass_log") == {"attention_routing"}


def test_tied_weights_count_once() -> None:
    tied = ParameterGroups.of(model_of("llama", tie_word_embeddings=True))
    untied = ParameterGroups.of(model_of("llama", tie_word_embeddings=False))
    assert "output_head" not in tied
    rest = sum(group.size for group in untied) - untied["output_head"].size
    assert sum(group.size for group in tied) == rest


def test_an_adapter_belongs_to_what_it_adapts() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    sizes = {**LLAMA_LIKE, "tie_word_embeddings": False}
    host = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model = get_peft_model(host, config)
    groups = ParameterGroups.of(model)
    assert_partition(groups, model)
    assert owner_of(groups, "q_proj.lora_A") == {"attention_routing"}
    assert owner_of(groups, "modules_to_save") == {"output_head"}
    # What peft froze is never said to be trained.
    assert not groups["layer_norms"].trained_parameters
    trained = {id(p) for group in groups for p in group.trained_parameters}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(groups.levels) == {0, 1}
    assert "layer_norms" not in groups.levels[0]


@pytest.mark.parametrize(
    "name",
    [
        "module._orig_mod.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "_orig_mod.base_model.model.model.layers.0.mlp.modules_to_save.default.up_proj.weight",
    ],
)
def test_wrappers_leave_names_as_they_were(name: str) -> None:
    assert plain_name(name) == "model.layers.0.mlp.up_proj.weight"


def _registry(*groups: tuple[str, int, list[str]]) -> dict[str, Any]:
    rows = [
        {"group_id": name, "hierarchy_level": level, "tensor_patterns": patterns}
        for name, level, patterns in groups
    ]
    return {"version": "1.0", "groups": rows, "metric_dependency_map": {"perplexity": ["all"]}}


def test_a_taxonomy_of_ones_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    content = _registry(("first", 0, ["0.*"]), ("last", 2, ["1.*"]), ("none", 1, ["9.*"]))
    (tmp_path / "own.json").write_text(json.dumps(content))
    groups = ParameterGroups.of(model, tmp_path / "own.json")
    assert groups.names == ("first", "last")
    assert groups.levels == {0: ("first",), 2: ("last",)}
    assert groups.dependencies == {"perplexity": ("first", "last")}
    assert ParameterGroups.of(model, content).names == groups.names


@pytest.mark.parametrize(
    ("patterns", "named"),
    [((["0.*"], ["1.weight"]), "1 in none: 1.bias"), ((["*"], ["1.bias"]), r"1.bias \(a, b\)")],
    ids=["in none", "in several"],
)
def test_what_is_no_partition_is_named(patterns: tuple[list[str], ...], named: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    registry = _registry(*((name, 0, p) for name, p in zip("ab", patterns, strict=True)))
    with pytest.raises(ValueError, match=named):
        ParameterGroups.of(model, registry)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {**_registry(("a", 0, ["*"])), "version": "9"},
        _registry(("a", 0, ["*"]), ("a", 1, ["x"])),
        _registry(("a+b", 0, ["*"])),
        {**_registry(("a", 0, ["*"])), "metric_dependency_map": {"perplexity": ["b"]}},
    ],
    ids=["empty", "version", "twice", "joined", "stranger"],
)
def test_what_is_no_taxonomy_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ParameterGroups.of(nn.Linear(1, 1), content)
