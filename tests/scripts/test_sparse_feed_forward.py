"""The experiment on sparse feed-forward layers: every arm, beside its controls, and continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hosts import tiny_host

from gravity_hf import sparsify_feed_forward

ARMS = ["predictor", "oracle", "static", "random"]
SHARED = ("window_losses", "paired_changes", "pretrained_host")
EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def script():
    path = list(sys.path)
    sys.path.insert(0, str(EXPERIMENTS))
    import sparse_feed_forward

    yield sparse_feed_forward
    sys.path[:] = path
    for name in ("sparse_feed_forward", "feed_forward_hosts", "lean_hosts", "pool", *SHARED):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trial(script, tmp_path_factory):
    """A run of one seed on a host that is trained in seconds."""
    folder = tmp_path_factory.mktemp("trial")
    text = folder / "text.txt"
    text.write_text("".join(f"the {n}th line of a text\n" for n in range(3000)), encoding="utf-8")
    where = ["--hosts", str(folder), "--data", f"lines={text}", "--out", str(folder / "out.json")]
    arguments = ["--quick", "--seeds", "0", "--commit", "abc", *where]
    script.main(arguments)
    return arguments, json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_every_arm_stands_beside_the_dense_model(trial):
    rows = trial[1]["rows"]["hosts"]
    arms = [(row["arm"], row["reordered"]) for row in rows]
    assert arms == [(a, False) for a in ARMS] + [(a, True) for a in ARMS[:-1]]
    assert len({row["dense_loss"] for row in rows}) == 1
    for row in rows:
        assert row["excess"] == pytest.approx(row["loss"] - row["dense_loss"])
    recall = {row["arm"]: row["energy_recall"] for row in rows[:4]}
    assert recall["oracle"] == max(recall.values())
    assert rows[0]["forward_ms"].keys() == {"dense", "masked", "block"}


def test_native_arms_are_measured_dense_and_masked(script, trial):
    rows = trial[1]["rows"]["native"]
    assert [row["arm"] for row in rows] == list(script.PHASES)
    assert all(0 < row["dense_loss"] != row["loss"] > 0 for row in rows)
    assert all(row["reordered"]["loss"] > 0 for row in rows)
    assert {line["seeds"] for part in trial[1]["summary"].values() for line in part} == {1}


def test_a_second_run_measures_nothing_again(script, trial, monkeypatch):
    monkeypatch.setattr(script, "host_rows", None)
    monkeypatch.setattr(script, "native_row", None)
    script.main(trial[0])


def test_no_place_of_this_machine_is_written_down(trial):
    assert "/tmp" not in json.dumps(trial[1])


def test_oracle_is_the_energy_and_static_one_choice_for_all(script):
    import feed_forward_hosts as rules

    model = sparsify_feed_forward(tiny_host("llama"), block_size=8, sparsity=0.5)
    layer, x = model.model.layers[0].mlp, torch.randn(2, 5, 48)
    means = torch.rand(8)
    layer.predictor = rules.ranking("oracle", layer, means)
    assert layer.quality(x).gate_recall == 1
    layer.predictor = rules.ranking("static", layer, means)
    assert torch.equal(layer.choose(x), means.topk(4).indices.sort().values.expand(2, 5, 4))
