"""One YAML file, flags, or both: the same settings; what is wrong is refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gravity_hf.cli.convert.checks import check_settings
from gravity_hf.cli.convert.settings import (
    SKIPPABLE,
    ConversionSettings,
    parse_conversion,
    parse_layers,
)
from gravity_hf.cli.lora.settings import LoraSettings, parse_lora

RECIPES = Path(__file__).resolve().parents[2] / "scripts" / "recipes"

YAML = """
model: host          # a comment
out: out
softness: 1          # an integer where a number is meant
max_kl: 1e-3         # YAML reads this as text
lora_learning_rate: 2.0e-4
fit: yes
merge: false
skip: [transfer, card]
text_files:
  - a.txt
  - b.txt
layers: 0,2-4
"""
FLAGS = [
    *("--model", "host", "--out", "out", "--softness", "1", "--max_kl", "0.001", "--fit"),
    *("--lora-learning-rate", "2e-4", "--no_merge", "--skip", "transfer", "card"),
    *("--text_files", "a.txt", "b.txt", "--layers", "0,2-4"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(YAML)
    return file


def test_yaml_and_flags_give_the_same_settings(recipe: Path) -> None:
    from_yaml, from_flags = parse_conversion([str(recipe)]), parse_conversion(FLAGS)
    assert from_yaml == from_flags
    assert from_yaml.gravity.max_kl == 1e-3 and from_yaml.gravity.fit
    assert isinstance(from_yaml.gravity.softness, float)
    assert from_yaml.model.skip == ["transfer", "card"] and not from_yaml.lora.merge


def test_flags_after_the_file_win(recipe: Path) -> None:
    settings = parse_conversion([str(recipe), "--softness", "0.25", "--skip", "lora", "--merge"])
    assert settings.gravity.softness == 0.25
    assert settings.model.skip == ["lora"] and settings.lora.merge
    assert settings.gravity.max_kl == 1e-3


@pytest.mark.parametrize("parse", [parse_conversion, parse_lora])
def test_an_unknown_key_is_an_error(parse: object, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: host\nsoftnes: 2\n")
    with pytest.raises(ValueError, match=r"unknown \['softnes'\]; expected only .*softness"):
        parse([str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2", "expected YAML"), ("just text", "keys and values"), ("law: {a: 1}", "mapping")],
)
def test_what_is_not_a_recipe_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_conversion([str(file)])


def test_a_missing_recipe_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected a YAML file"):
        parse_conversion(["no_such.yaml"])


@pytest.mark.parametrize("flags", [["--softness", "much"], ["--law", "weak"]])
def test_a_value_that_does_not_fit_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_conversion(["--model", "host", "--out", "out", *flags])
    assert stopped.value.code == 2


@pytest.mark.parametrize("flag", ["--soft", "--sofntess"])
def test_an_unknown_flag_is_an_error_and_no_abbreviation(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--help lists, got '{flag} 1'"):
        parse_conversion(["--model", "host", "--out", "out", flag, "1"])


def test_every_setting_is_a_flag_once() -> None:
    """Two parts with a field of one name would silently share a flag."""
    for settings in (ConversionSettings(), LoraSettings()):
        parts = [vars(part) for part in vars(settings).values()]
        assert len(settings.to_dict()) == sum(map(len, parts))


# Recipes of pretraining are another script's: tests/scripts/test_pretrain_settings.py.
_CONVERSIONS = [f for f in sorted(RECIPES.glob("*.yaml")) if "preset:" not in f.read_text("utf-8")]


@pytest.mark.parametrize("file", _CONVERSIONS, ids=lambda file: file.name)
def test_recipes_that_ship_are_sound(file: Path) -> None:
    settings = parse_conversion([str(file)])
    check_settings(settings)
    assert {"transfer", "lora", "control", "merge"} == settings.active(
        {"transfer", "lora", "control", "merge"}
    )


@pytest.mark.parametrize(
    ("text", "layers"), [(None, None), ("3", (3,)), ("0,2-4", (0, 2, 3, 4)), (" 1 , 2 ", (1, 2))]
)
def test_layers_are_read(text: str | None, layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1"])
def test_unreadable_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--layers"):
        parse_layers(text)


def test_the_help_names_every_step_that_can_be_left_out() -> None:
    from typer.main import get_command

    from gravity_hf.cli.main import app

    (skip,) = (p for p in get_command(app).commands["convert"].params if p.name == "skip")
    assert all(name in skip.help for name in SKIPPABLE) and "adapter" in skip.help
