"""The training-step benchmark: the same model under every attention, and failures that show."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
MODULES = ("gate", "presets", "problems", "providers", "results", "targets", "timing")


@pytest.fixture
def script(monkeypatch):
    path = list(sys.path)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import training_step

    yield training_step
    sys.path[:] = path
    for name in (*MODULES, "training_step"):
        sys.modules.pop(name, None)


def run(script, tmp_path, *arguments):
    file = tmp_path / "steps.json"
    script.main(["--shape", "tiny", "--steps", "2", "--output", str(file), *arguments])
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_arm_is_measured_beside_sdpa(script, tmp_path):
    report = run(script, tmp_path, "--length", "32")
    rows = {row["arm"]: row for row in report["rows"]}
    assert list(rows) == [*script.ARMS, script.AGAIN]
    for row in rows.values():
        assert row["note"] == ""
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["p50_ms"] * 1e3)
        # Random weights: close to uniform over the vocabulary; training lowers it.
        assert row["last_loss"] < row["first_loss"] == pytest.approx(math.log(128), abs=0.2)
    assert rows["sdpa"]["first_loss"] == rows["sdpa-again"]["first_loss"]
    assert rows["force"]["first_loss"] != rows["sdpa"]["first_loss"]
    assert {line["subject"] for line in report["targets"]} == {
        "force",
        "power",
        "force, lifted",
        "power, lifted",
    }
    assert report["conditions"]["versions"]["torch"] == torch.__version__
    assert report["conditions"]["settings"]["batch"] == 4


def test_loss_by_chunks_and_checkpointing_change_no_loss(script, tmp_path):
    plain = ["--arms", "sdpa", "force", "--dtype", "float32", "--length", "32"]
    whole = run(script, tmp_path, *plain)
    parts = run(script, tmp_path, *plain, "--loss-chunk", "50", "--checkpointing")
    for one, other in zip(whole["rows"], parts["rows"], strict=True):
        assert one["first_loss"] == pytest.approx(other["first_loss"], rel=1e-5)
        assert one["last_loss"] == pytest.approx(other["last_loss"], rel=1e-4)


def test_an_arm_that_fails_is_a_row_and_the_others_go_on(script, tmp_path):
    # FlexAttention computes no gradient of gravity.
    report = run(script, tmp_path, "--arms", "force", "sdpa", "--implementation", "flex")
    first, second, _ = report["rows"]
    assert first["note"].startswith("failed: ") and "p50_ms" not in first
    assert second["note"] == "" and second["p50_ms"] > 0
    assert [line["verdict"] for line in report["targets"]] == ["not measured"]


def test_lifted_keys_lie_inside_their_radius(script):
    options = script.parse(["--shape", "tiny", "--dtype", "float32"])
    tokens = torch.randint(128, (2, 32))
    model = script.build("force-lifted", options, tokens)
    keys = []
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, o: keys.append(o.detach()))
        for layer in model.model.layers
    ]
    model(input_ids=tokens)
    for layer, key, hook in zip(model.model.layers, keys, hooks, strict=True):
        lengths = key.unflatten(-1, (2, -1)).square().sum(-1).amax((0, 1))
        assert (lengths < layer.self_attn.gravity.key_radius_sq).all()
        hook.remove()
