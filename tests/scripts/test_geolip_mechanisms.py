"""The experiment on mechanisms: what is compared is comparable, criteria are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
MODULES = ("pool", "geolip_runs", "geolip_report", "geolip_mechanisms")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Some tasks, with tiny models: their command and their result."""
    out = tmp_path_factory.mktemp("mechanisms")
    command = ["--quick", "--workers", "0", "--out", str(out), "--seeds", "0", "--only", "constr"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import geolip_mechanisms

        geolip_mechanisms.main(command)
    content = json.loads((out / "geolip_mechanisms.json").read_text())
    return {"out": out, "command": command, "content": content}


def test_every_task_is_learned_with_both_kinds_of_attention(quick: dict[str, Any]) -> None:
    import geolip_mechanisms as experiment

    rows = quick["content"]["rows"]
    tasks = [name for name in experiment.TASKS if "constr" in name]
    found = {(row["task"], row["attention"]) for row in rows}
    assert found == {(task, kind) for task in tasks for kind in experiment.ATTENTIONS}
    for row in rows:
        assert row["expected"] == "B" and row["verdict"]["n_params"] > 0
        # Two steps in, nothing can have happened.
        assert row["found"] == "B" and abs(row["without"]["context"]) < 0.01


def test_what_is_done_is_not_done_again(quick: dict[str, Any]) -> None:
    import geolip_mechanisms

    lines = (quick["out"] / "runs.jsonl").read_text()
    geolip_mechanisms.main(quick["command"])
    assert (quick["out"] / "runs.jsonl").read_text() == lines
    with pytest.raises(SystemExit, match="no task's name contains 'nothing'"):
        geolip_mechanisms.main([*quick["command"][:-1], "nothing"])


def test_ablations_take_out_other_tokens_or_all_attention() -> None:
    import geolip_mechanisms as experiment

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction

    sizes = {"patch_dim": 6, "hidden_size": 8, "num_rows": 4}
    model = GeolipForReconstruction(GeolipConfig(**sizes, alpha_init=2.0)).eval()
    for parameter in model.spectral.parameters():
        parameter.data.normal_(std=2.0)
    patches = torch.randn(3, 5, 6)
    batch = {"patches": patches, "labels": patches, "attention_mask": torch.ones(3, 5).long()}
    found = experiment.ablated_gains(model, [batch])
    bare = GeolipForReconstruction(GeolipConfig(**sizes, use_spectral=False)).eval()
    bare.load_state_dict(
        {name: x for name, x in model.state_dict().items() if not name.startswith("spectral.")}
    )
    with torch.no_grad():
        whole, none = (float(x(patches=patches).loss) for x in (model, bare))
        alone = float(model(patches=patches.reshape(15, 1, 6)).loss)
    assert found["attention"] == pytest.approx(none / whole - 1, rel=1e-4)
    assert found["context"] == pytest.approx(alone / whole - 1, rel=1e-4)
    assert min(map(abs, found.values())) > 1e-3


def test_held_out_data_are_others_and_seeds_change_them() -> None:
    import geolip_mechanisms as experiment

    sizes = experiment.SIZES["quick"]
    for data in {task.data for task in experiment.TASKS.values()}:
        one, again, other = (experiment.patches_of(data, sizes, 4, seed) for seed in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert one.shape == other.shape and one.abs().max() <= 1


def row(task: str, expected: str, found: str, seed: int = 0, **gains: float) -> dict[str, Any]:
    verdict = {"mechanism": found[0] if found in "AB" else "B", "alpha_drift": found == "drift"}
    verdict |= {"mean_alpha": 0.03, "coordination_gain": gains.get("swap", 0.0)}
    without = {"context": gains.get("context", 0.0), "attention": gains.get("attention", 0.0)}
    known = {"task": task, "expected": expected, "found": found, "attention": "dot_product"}
    return {**known, "seed": seed, "verdict": verdict, "without": without}


def results() -> dict[str, Any]:
    rows = [row("shared", "A", "A", s, swap=0.03 + s / 100, attention=0.05) for s in (0, 2)]
    rows += [row("noise", "B", "drift", 0, attention=3.0), row("noise", "B", "B", 1)]
    return {"rows": [*rows, row("waves", "open", "A", swap=0.5)]}


def test_what_was_found_is_counted_over_seeds() -> None:
    from geolip_report import mechanisms_table

    headers, lines = mechanisms_table(results())
    assert headers == ["task", "expected", "dot product: found", "alpha", "gain"]
    assert lines[0] == ["shared", "A", "A", "0.0300 ± 0.0000", "+0.0400 ± 0.0141"]
    assert lines[1] == ["noise", "B", "1 drift, 1 B", "0.0300 ± 0.0000", "0.0000 ± 0.0000"]
    assert lines[2] == ["waves", "open", "A", "0.0300", "+0.5000"]


def test_criteria_are_counted_where_the_answer_is_known() -> None:
    from geolip_report import criteria_table

    found = {line[0]: line[1:] for line in criteria_table(results())[1]}
    assert found["context swap and alphas: the verdict"] == ["2 of 2", "0 of 2", "–"]
    assert found["alphas alone"] == ["2 of 2", "1 of 2", "noise"]
    assert found["attention taken out, and alphas"] == ["2 of 2", "1 of 2", "noise"]
    assert found["each attends to itself, and alphas"] == ["0 of 2", "0 of 2", "–"]


def committed() -> dict[str, Any]:
    file = EXPERIMENTS / "results" / "geolip_mechanisms.json"
    if not file.is_file():
        pytest.skip(f"{file.name} has not been measured yet")
    return json.loads(file.read_text(encoding="utf-8"))


def test_committed_runs_are_comparable() -> None:
    import geolip_mechanisms as experiment
    from geolip_report import grouped

    rows = committed()["rows"]
    assert len({row["commit"] for row in rows}) == 1
    by = grouped(rows, "task", "attention")
    assert set(by) == {(task, kind) for task in experiment.TASKS for kind in experiment.ATTENTIONS}
    assert all(len({row["seed"] for row in found}) >= 3 for found in by.values())
    for found in grouped(rows, "task").values():
        assert len({(row["steps"], row["verdict"]["tokens"]) for row in found}) == 1


def test_attention_engages_where_patches_share_what_noise_hides_and_nowhere_else() -> None:
    """With dot products, by the context swap; and alphas that rise for nothing are called drift."""
    rows = [row for row in committed()["rows"] if row["attention"] == "dot_product"]
    known = [row for row in rows if row["expected"] != "open"]
    assert all((row["found"] == "A") == (row["expected"] == "A") for row in known)
    assert {row["found"] for row in rows if row["task"] == "noise, alphas x10"} == {"drift"}
