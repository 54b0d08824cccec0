"""The experiment on maps of low rank: arms that are comparable, resumable, without paths."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = ("compression", "compression_arms", "lean_hosts", "geolip_runs", "pool")
MODULES += ("window_losses", "paired_changes", "pretrained_host")


def _forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole experiment on one tiny host: its command, and what it wrote."""
    folder = tmp_path_factory.mktemp("compression")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of {i % 7}\n" for i in range(6000)))
    command = ["--quick", "--seeds", "0", "--data", f"lines={text}", "--hosts", str(folder)]
    command += ["--energies", "0.9", "--controls", "0.9"]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "out.json")]
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        module = importlib.import_module("compression")
        module.main(command)
        content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        yield {"command": command, "folder": folder, "content": content, "module": module}
    _forget()


def test_both_ways_to_factorise_have_the_same_ranks(experiment: dict[str, Any]) -> None:
    runs = {run["arm"]: run for run in experiment["content"]["runs"]}
    assert list(runs) == ["dense", "weighted", "plain", "control"]
    assert runs["weighted"]["ranks"] == runs["plain"]["ranks"]
    assert runs["weighted"]["summary"]["energy_min"] >= 0.9
    assert runs["weighted"]["loss"] != runs["plain"]["loss"]
    assert runs["dense"]["loss"] == runs["dense"]["host_loss"]


def test_the_control_is_dense_and_as_large(experiment: dict[str, Any]) -> None:
    runs = {run["arm"]: run for run in experiment["content"]["runs"]}
    assert runs["control"]["parameters"] == pytest.approx(runs["weighted"]["parameters"], rel=0.1)
    assert runs["control"]["parameters"] < 0.9 * runs["dense"]["parameters"]
    assert "ranks" not in runs["control"]


def test_rows_say_what_was_lost_and_saved(experiment: dict[str, Any]) -> None:
    rows = {row["arm"]: row for row in experiment["content"]["rows"]}
    runs = {run["arm"]: run for run in experiment["content"]["runs"]}
    plain, dense = runs["plain"], runs["dense"]
    assert rows["plain"]["change"]["median"] == pytest.approx(plain["loss"] - dense["loss"])
    healed = plain["healed_loss"] - dense["healed_loss"]
    assert rows["plain"]["healed_change"]["median"] == pytest.approx(healed)
    differences = [
        a - b for a, b in zip(plain["healed_losses"], dense["healed_losses"], strict=True)
    ]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    assert rows["plain"]["healed_change_error"] == pytest.approx(error)
    assert rows["plain"]["change_error"] > 0 and rows["plain"]["windows"] == 2
    assert rows["plain"]["layers_smaller"]["median"] > rows["plain"]["smaller"]["median"] > 1
    assert all(run["healed_loss"] != run["loss"] and run["seconds"] > 0 for run in runs.values())


def test_what_is_done_is_not_done_again_and_no_path_is_kept(
    experiment: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment["module"].main(experiment["command"])
    assert "0 runs to do, 4 done before" in capsys.readouterr().out
    again = json.loads((experiment["folder"] / "out.json").read_text(encoding="utf-8"))
    assert again == experiment["content"]
    assert str(experiment["folder"]) not in json.dumps(again)


def test_a_quick_run_is_not_kept_as_a_result(experiment: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        experiment["module"].main(["--quick"])


def test_losses_after_training_in_bfloat16_are_of_the_weights_as_they_are(
    experiment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, hosts = (importlib.import_module(name) for name in ("compression_arms", "lean_hosts"))
    folder, usual = experiment["folder"], arms.training_arguments

    def in_bfloat16(*given: Any, **more: Any) -> Any:
        return usual(*given, **{**more, "bf16": True})

    monkeypatch.setattr(arms, "training_arguments", in_bfloat16)
    text = f"lines={folder / 'text.txt'}"
    host = hosts.host_at(folder, seeds=(0,), preset="quick", data=text)[0]
    held_out = host.held_out(2).split(1)
    model, fresh = host.load(), host.load()
    # Left in autocast, window_losses would refuse the model: its head is not in bfloat16 there.
    losses = arms._healed(model, {"device": "cpu", "seed": 0}, host, (2, 2, 64), held_out)
    fresh.load_state_dict(model.state_dict())
    assert losses == arms.window_losses(fresh, held_out)
    # What transformers has around the forward is there still.
    assert isinstance(model(input_ids=held_out[0], return_dict=False), tuple)


def test_without_healing_there_are_no_healed_numbers(
    experiment: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, out = importlib.import_module("compression_arms"), experiment["folder"] / "plain.json"
    monkeypatch.setattr(arms, "_healed", lambda *given: pytest.fail("trained"))
    command = [*experiment["command"], "--heal", "0", "--controls", "--out", str(out)]
    experiment["module"].main(command)
    # Runs that were healed are others.
    shown = capsys.readouterr().out
    assert "3 runs to do, 0 done before" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("weighted", "plain"))]
    assert len(lines) == 2 and all(line.count("–") == 2 for line in lines)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["heal"][0] == 0
    names = {name for part in ("rows", "runs") for row in content[part] for name in row}
    assert "change_error" in names and not any("healed" in name for name in names)
    before = {run["arm"]: run["loss"] for run in experiment["content"]["runs"]}
    assert all(run["loss"] == pytest.approx(before[run["arm"]]) for run in content["runs"])


def test_a_number_of_steps_below_zero_is_refused(experiment: dict[str, Any]) -> None:
    with pytest.raises(SystemExit):
        experiment["module"].main([*experiment["command"], "--heal", "-1"])
