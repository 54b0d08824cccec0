"""What a user sees before anything runs, and when something is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from cli.commands import run

from gravity_hf import __version__
from gravity_hf.cli.demo import results
from gravity_hf.cli.demo import run as demo_run_module
from gravity_hf.cli.demo.command import EXIT_NOT_ACCEPTED

VERBS = ("demo", "convert", "status", "generate", "chat", "export", "figures", "push")


def test_help_names_every_verb_and_shows_commands() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for verb in VERBS:
        assert f"gravity-hf {verb}" in shown.output


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb: str) -> None:
    shown = run(verb, "--help")
    assert shown.exit_code == 0
    assert f"gravity-hf {verb}" in shown.output


def test_version() -> None:
    assert __version__ in run("--version").output


WRONG = {
    "no-such-model": ("convert", "no/such-model-here", "out"),
    "no-such-folder": ("status", "no_such_folder"),
    "generate-without-model": ("generate", "no_such_folder", "text"),
    "unknown-law": ("convert", "model", "out", "--law", "gravity"),
    "unknown-layers": ("convert", "model", "out", "--layers", "x"),
    "missing-text": ("convert", "model", "out", "--text", "no_such_file.txt"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_an_error_is_one_line_and_says_what_to_do(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in result.output
    assert "expected" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["first", "last"])
def test_debug_shows_the_error_itself(place: str) -> None:
    arguments = ["status", "no_such_folder"]
    result = run("--debug", *arguments) if place == "first" else run(*arguments, "--debug")
    assert isinstance(result.exception, ValueError)


def test_a_folder_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    result = run("status", tmp_path)
    assert result.exit_code == 2
    assert "JSON" in result.stderr


def test_unknown_gravity_settings_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"gravity": {"charge": 1}}')
    result = run("status", tmp_path)
    assert result.exit_code == 2
    assert "charge" in result.stderr


@pytest.mark.parametrize("package", ["peft", "matplotlib"])
def test_demo_asks_for_what_it_needs_before_it_works(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hide = lambda name, *rest: None if name == package else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"needs {package}" in result.stderr
    assert "pip install" in result.stderr
    assert not (tmp_path / "out").exists()


def test_demo_that_is_not_accepted_exits_with_one(
    demo_run: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ACCEPTED_GAP", -1.0)
    monkeypatch.setattr(demo_run_module, "run_demo", lambda *_, **__: demo_run.results)
    result = run("demo", "--out", tmp_path / "out")
    assert result.exit_code == EXIT_NOT_ACCEPTED
    assert "Not accepted" in result.output


def test_without_a_verb_the_help_is_shown() -> None:
    assert "gravity-hf demo" in run().output


def test_a_folder_name_is_never_read_as_markup(tmp_path: Path) -> None:
    folder = tmp_path / "[red]model[blue]"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    shown = run("status", folder)
    assert shown.exit_code == 0
    assert str(folder) in shown.output
