"""Converters and servers look models up by name: none of ours is in their published tables.

`tables/architectures.json` holds names alone, each list with the repository, file and commit that
it was read from.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from hosts import FAMILIES, tiny_host
from transformers.models.auto import modeling_auto

from gravity_hf import patch_with_gravity
from gravity_hf.hub.card_software import SOFTWARE
from gravity_hf.integration.support_table import support_table

TABLES = {
    table["software"]: table
    for table in json.loads(
        Path(__file__).with_name("tables").joinpath("architectures.json").read_text("utf-8")
    )
}
# Hosts that each of the tables serves: it is the table of models, and it is read right.
SERVED = {
    "llama.cpp": ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "gpt_neox", "olmo"],
    "vLLM": ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "gpt_neox", "olmo"],
    "TGI": ["llama", "gpt_neox"],
}


def patched_types() -> list[str]:
    """Model types of which the sweep says that gravity runs in them."""
    records = support_table().records.values()
    return sorted(r.model_type for r in records if r.status in ("passes", "partly"))


def classes_of(model_type: str) -> set[str]:
    """Every class that transformers' Auto classes have for the type."""
    tables = [value for name, value in vars(modeling_auto).items() if name.endswith("_NAMES")]
    found = [table[model_type] for table in tables if model_type in table]
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}


@pytest.mark.parametrize("software", TABLES)
def test_no_gravity_model_is_in_the_table(software):
    types = patched_types()
    assert {"qwen2", "bert", "vit"} <= set(types)
    ours = {f"gravity_{name}" for name in types}
    ours |= {f"Gravity{cls}" for name in types for cls in classes_of(name)}
    assert len(ours) > 1000
    names = set(TABLES[software]["names"])
    assert not ours & names
    # Some also try a name with another ending: GravityQwen2ForCausalLM for a classifier.
    assert not [name for name in names if name.lower().startswith("gravity")]


@pytest.mark.parametrize("software", TABLES)
def test_the_hosts_are_in_the_table(software):
    names = set(TABLES[software]["names"])
    for family in SERVED[software]:
        assert {FAMILIES[family][1], family} & names, family


def test_cards_speak_only_of_tables_that_were_read():
    told = [software.name for software in SOFTWARE if "table of models" in (software.model or "")]
    assert told
    for name in told:
        assert name.split()[0] in TABLES, name


def test_an_export_names_no_architecture_of_the_tables(tmp_path):
    patch_with_gravity(tiny_host("qwen2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    asked = {config["model_type"], *config["architectures"]}
    assert asked == {"gravity_qwen2", "GravityQwen2ForCausalLM"}
    assert not asked & {name for table in TABLES.values() for name in table["names"]}


def test_gguf_has_no_gravity_architecture():
    assert "qwen2" in gguf.MODEL_ARCH_NAMES.values()
    assert not [name for name in gguf.MODEL_ARCH_NAMES.values() if "gravity" in name]


def place(arch: int, name: str) -> str | None:
    return gguf.get_tensor_name_map(arch, 1).get_name(name, try_suffixes=(".weight", ".bias"))


def test_gguf_has_no_place_for_masses_in_any_architecture():
    """llama.cpp's converter stops at a tensor without a place, also of an export whose names
    somebody changed to the host's."""
    for name in tiny_host("qwen2", num_hidden_layers=1).state_dict():
        assert place(gguf.MODEL_ARCH.QWEN2, name) is not None, name
    for family in ("qwen2", "gpt2", "bert"):
        masses = [n for n in patch_with_gravity(tiny_host(family)).state_dict() if ".gravity." in n]
        assert masses
        for arch in gguf.MODEL_ARCH_NAMES:
            assert place(arch, masses[0]) is None, arch
