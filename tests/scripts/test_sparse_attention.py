"""Benchmark and experiment of sparse attention: whole rows, controls of equal size, resumable."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("sparse_attention", "sparse_arms", "sparse_calls", "lean_hosts", "geolip_runs", "pool")
MODULES += ("lean_training", "lgt_calls", "lgt_peer", "results", "timing")
MODULES += ("window_losses", "paired_changes", "pretrained_host")


def _forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of a room of scripts; both rooms have a `sparse_attention`."""
    _forget()

    def load(folder: str, name: str) -> Any:
        monkeypatch.syspath_prepend(str(SCRIPTS / folder))
        return importlib.import_module(name)

    yield load
    _forget()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One host and one LeanFormer arm: the command and what it wrote."""
    folder = tmp_path_factory.mktemp("sparse")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of {i % 7}\n" for i in range(6000)))
    command = ["--quick", "--seeds", "0", "--data", f"lines={text}", "--hosts", str(folder)]
    command += ["--runs", str(folder / "runs"), "--out", str(folder / "out.json")]
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS / "experiments"))
        module = importlib.import_module("sparse_attention")
        arms = importlib.import_module("sparse_arms")
        patch.setattr(arms, "NATIVE", [("gravity", "sparse")])
        module.main(command)
    _forget()
    content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return {"command": command, "folder": folder, "content": content}


def test_every_screening_and_control_is_measured_beside_dense_attention(experiment):
    content = experiment["content"]
    rows = {row["screening"]: row for row in content["rows"]}
    assert list(rows) == ["keys", "principal", "learned", "window", "random"]
    dense = content["dense_loss"]["0"]
    for row in rows.values():
        assert row["change"]["median"] == pytest.approx(row["loss"]["median"] - dense)
        assert row["change"]["median"] != 0 and row["seconds"]["median"] > 0
    assert 0 < rows["learned"]["recall_window"]["median"] < 1
    (native,) = content["native"]
    assert set(native["losses"]) == {"64", "128"}
    assert native["losses"]["64"]["dense"] != native["losses"]["64"]["sparse"]


def test_what_is_recorded_names_no_place(experiment):
    text = json.dumps(experiment["content"])
    assert str(experiment["folder"]) not in text and "/tmp" not in text
    known = experiment["content"]["conditions"]
    assert known["command"].startswith("python scripts/experiments/sparse_attention.py --quick")
    assert known["device"] and known["versions"]["torch"] == torch.__version__


def test_what_is_done_is_not_done_again(experiment, room, monkeypatch):
    module, arms = room("experiments", "sparse_attention"), room("experiments", "sparse_arms")
    monkeypatch.setattr(arms, "NATIVE", [("gravity", "sparse")])
    lines = (experiment["folder"] / "runs" / "runs.jsonl").read_text()
    module.main(experiment["command"])
    assert (experiment["folder"] / "runs" / "runs.jsonl").read_text() == lines


def test_controls_have_as_many_keys(room):
    arms = room("experiments", "sparse_arms")
    own, window = arms.budget_of(512, 32), arms.budget_of(512, 32, "window")
    assert own.top_k == window.top_k == 512 and own.sinks == window.sinks
    assert own.chosen_blocks == 13 and window.chosen_blocks == 0
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    once, again = arms.ByLot()(q, k), arms.ByLot()(2 * q, -k)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    # Another seed draws other lots.
    assert not torch.equal(once[0], arms.ByLot(1)(q, k)[0])


def test_the_kept_budget_is_the_fastest_that_keeps_the_loss_at_every_seed(room):
    module = room("experiments", "sparse_attention")

    def row(top_k: int, worst: float, seconds: float) -> dict[str, Any]:
        change = {"median": 0.0, "lowest": 0.0, "highest": worst}
        times = {"median": seconds, "lowest": seconds, "highest": seconds}
        shared = {"screening": "keys", "block_size": 32, "dense_seconds": {"median": 1.0}}
        return {"top_k": top_k, "change": change, "seconds": times, **shared}

    rows = [row(256, 0.02, 0.1), row(512, 0.009, 0.5), row(1024, 0.001, 0.8)]
    (found,) = module.kept(rows)
    assert found["budget"] == [512, 32] and found["over_dense"] == 2.0
    assert module.kept(rows[:1])[0]["budget"] is None


def test_the_benchmark_times_dense_and_sparse_at_each_shape(room, tmp_path, capsys):
    module, out = room("benchmark", "sparse_attention"), tmp_path / "rows.json"
    command = ["--quick", "--lengths", "192", "--out", str(out)]
    module.main(command)
    content = json.loads(out.read_text(encoding="utf-8"))
    rows = content["rows"]
    assert not [row for row in rows if "note" in row]
    cases = {(row["level"], row["law"], row["work"]) for row in rows}
    levels, laws, works = ("layer", "host"), ("dot", "gravity"), ("prefill", "decode")
    assert cases == set(itertools.product(levels, laws, works))
    for case in cases:
        mine = [row for row in rows if (row["level"], row["law"], row["work"]) == case]
        assert {row["kind"] for row in mine} == {"dense", "sparse"}
        assert mine[0]["over_dense"] == 1.0 and all(row["peak_mib"] >= 0 for row in mine)
    assert content["conditions"]["command"].endswith(f"--out {out.name}")
    # Cases that are there are not measured again.
    module.main(command)
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == rows


def test_a_benchmark_to_try_is_not_kept_among_the_results(room):
    for given in (["--quick"], ["--launches", "graph", "--quick", "--out", "x.json"]):
        with pytest.raises(SystemExit):
            room("benchmark", "sparse_attention").main(given)
