"""NGT's experiment: what is compared is comparable, what was measured is kept and shown."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
FOLDERS = (str(ROOT / "scripts"), str(EXPERIMENTS))
MODULES = ("pool", "table_text", "ngt_arms", "ngt_report", "ngt_recall", "ngt_language_model")
COMPARED = ("NGT v2", "vanilla")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    for name in (*MODULES, "ngt_tables"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole experiment with tiny models, on a text of its own: its command and its summary."""
    out = tmp_path_factory.mktemp("ngt")
    (out / "text.txt").write_text("What is near attracts, what is far does not. " * 60)
    command = ["--quick", "--workers", "0", "--out", str(out), "--arms", *COMPARED]
    command += ["--data", f"some={out / 'text.txt'}", "--rates", "1e-3", "4e-3"]
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        import ngt_language_model

        ngt_language_model.main([*command, "--seeds", "0", "1"])
    summary = json.loads((out / "ngt_language_model.json").read_text())
    return {"out": out, "command": command, "summary": summary}


def test_every_arm_has_as_many_parameters_tokens_and_rates(quick: dict[str, Any]) -> None:
    rows, tuning = quick["summary"]["rows"], quick["summary"]["tuning"]
    assert {(row["arm"], row["seed"]) for row in rows} == {(a, s) for a in COMPARED for s in (0, 1)}
    assert len({(row["tokens"], row["validation_tokens"], row["section"]) for row in rows}) == 1
    own = next(row["parameters"] for row in rows if row["arm"] == "NGT v2")
    assert all(abs(row["parameters"] - own) <= 0.01 * own for row in rows)
    for arm in COMPARED:
        assert {row["learning_rate"] for row in tuning if row["arm"] == arm} == {1e-3, 4e-3}
    assert {row["seed"] for row in tuning} == {100}


def test_a_run_is_shown_by_its_lowest_loss_and_its_last_one(quick: dict[str, Any]) -> None:
    for row in quick["summary"]["rows"]:
        losses = row["evaluations"]
        assert row["best"] == min(losses.values()) == losses[str(row["best_step"])]
        assert row["final"] == pytest.approx(losses[str(row["steps"])])
        # Untrained models know nothing of bytes: eight bits.
        assert 6 < row["best_bits_per_byte"] <= row["final_bits_per_byte"] < 9
    assert str(quick["out"]) not in json.dumps(quick["summary"])


def test_what_is_done_is_not_done_again(quick: dict[str, Any]) -> None:
    import ngt_language_model

    files = sorted((quick["out"] / "runs").glob("*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    ngt_language_model.main([*quick["command"], "--seeds", "0", "1"])
    assert [file.stat().st_mtime_ns for file in files] == before and len(files) == 2 * 4


def test_what_there_was_no_time_for_is_left_and_said(quick: dict[str, Any]) -> None:
    import ngt_language_model

    with pytest.raises(SystemExit, match="2 runs or more failed or were left for later"):
        ngt_language_model.main([*quick["command"], "--seeds", "2", "--minutes", "0"])
    options = ngt_language_model.parse([*quick["command"], "--seeds", "2", "--minutes", "0"])
    job = ngt_language_model.job_of("NGT v2", "some", options)
    # The tuning is there; the run of the new seed is not.
    assert ngt_language_model.work({**job, "until": 0.0}) == {"left": 1}


def test_runs_of_a_model_with_other_settings_do_not_count(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ngt_arms
    import ngt_language_model as experiment

    runs = experiment.all_runs(quick["out"], "quick")
    assert {run["run"]["arm"] for run in runs} == set(COMPARED)
    other = replace(ngt_arms.ARMS["NGT v2"], changes={"position_base": 200.0})
    monkeypatch.setitem(ngt_arms.ARMS, "NGT v2", other)
    ngt_arms.fingerprint.cache_clear()
    assert {x["run"]["arm"] for x in experiment.all_runs(quick["out"], "quick")} == {"vanilla"}


def test_every_arm_can_have_the_parameters_of_v2() -> None:
    from ngt_arms import ARMS, SHAPES, count, matched_settings

    own = count(matched_settings("NGT v2", "quick", 256))
    for name in ARMS:
        settings = matched_settings(name, "quick", 256)
        assert abs(count(settings) - own) <= 0.01 * own, name
    unchanged = matched_settings("sees itself", "quick", 256)["intermediate_size"]
    assert unchanged == SHAPES["quick"]["intermediate_size"]


def test_an_ablation_differs_from_v2_in_what_it_is_named_for() -> None:
    from ngt_arms import ARMS, V2, chosen

    from gravity_hf.models.ngt import NGTConfig

    ablations = chosen(["ablations"])
    assert ablations[0].name == V2 and len(ablations) > 15
    own, seen = NGTConfig().to_dict(), []
    for arm in ablations[1:]:
        settings = NGTConfig.from_preset(arm.preset, **arm.changes).to_dict()
        changed = {name for name, value in settings.items() if value != own[name]}
        # What is v2's own already, or another's, would be a row that says nothing.
        other = changed or arm.repulsion or arm.scale != ARMS[V2].scale
        assert changed >= set(arm.changes) and other, arm.name
        assert (settings, arm.repulsion) not in seen, arm.name
        seen.append((settings, arm.repulsion))
    assert chosen(["main", "ablations"]) == list(ARMS.values())
    with pytest.raises(ValueError, match="expected of .*got \\['all'\\]"):
        chosen(["all"])


def test_steps_and_batches_fit_the_text() -> None:
    import ngt_language_model as experiment

    assert experiment.step_count({"passes": 10.0}, 100_000, 16_384) == 60
    assert experiment.step_count({"steps": 7}, 100_000, 16_384) == 7
    size = {"rows": 32, "validation_windows": 512}
    assert experiment.evaluation_size(100, size) == (32, 96)
    assert experiment.evaluation_size(5, size) == (5, 5)
    assert experiment.evaluation_size(9999, size) == (32, 512)


def result(arm: str, rate: float, seed: int, best: float | None, digest: str = "d") -> dict:
    run = {"data": "some", "arm": arm, "tokenizer": "byte", "schedule": {"passes": 10.0}}
    row = {"id": f"{arm} {rate} {seed}", "run": {**run, "rate": rate, "seed": seed}, "best": best}
    row |= {"best_step": 5, "final": best, "evaluations": {"5": best}, "parameters": 1000}
    row |= {"intermediate_size": 8, "tokens": 9, "validation_tokens": 9, "steps": 100}
    row |= {"seconds": 2.0, "peak_gib": None, "graphs_compiled": 0}
    versions = {"torch": "2.11", "transformers": "5.17"}
    conditions = {"device": "a GPU", "versions": versions, "date": "2026-11-26T00:00"}
    text = {"digest": digest, "bytes_per_token": 1.0}
    return {**row, "text": text, "conditions": conditions}


def small_summary() -> dict[str, Any]:
    from ngt_report import summary

    losses = {
        "NGT v2": (1.0, 1.2),
        "vanilla": (1.5, 1.5),
        "ALiBi": (1.4, 1.5),
        "no content": (2, 2),
    }
    tuned = [result(arm, rate, 100, 3 - rate) for arm in losses for rate in (0.1, 0.2, 0.3)]
    tuned += [result("vanilla", 0.4, 100, None)]
    rate = {"vanilla": 0.3, "ALiBi": 0.3, "no content": 0.3, "NGT v2": 0.3}
    runs = [result(a, rate[a], s, x) for a, pair in losses.items() for s, x in enumerate(pair)]
    runs += [result("NGT v2", 0.2, seed, 0.5) for seed in (0, 1, 2)]
    settings = {"rows": 32, "max_position_embeddings": 512}
    return summary(runs, tuned, settings, "python it.py")


def test_the_tuning_alone_chooses_which_runs_count() -> None:
    import ngt_language_model as experiment

    content = small_summary()
    # Runs at another rate did better and are more, and are not what is shown; nor are they lost.
    assert {row["learning_rate"] for row in content["rows"]} == {0.3}
    assert [row["best"] for row in content["replaced"]] == [0.5] * 3
    tuned = [result("x", 0.1, 100, 2.0), result("x", 0.2, 100, None)]
    assert experiment.best_rate(tuned) == 0.1 and experiment.best_rate(tuned[1:]) is None


def test_differences_are_paired_by_seed_and_against_the_better_twin() -> None:
    from ngt_report import tables

    lines = tables(small_summary(), "some, byte, 10 passes")
    assert "minus ALiBi" in lines[0]
    assert "| NGT v2 | 1,000 | 1.1000 ± 0.1414 | -0.3500 ± 0.0707 |" in lines[2]
    assert "| vanilla | 1,000 | 1.5000 ± 0.0000 | +0.0500 ± 0.0707 |" in lines[3]
    # The best rate was the last that was tried: it may be too low.
    assert "| ALiBi | 1,000 | 1.4500 ± 0.0707 | – |" in lines[4] and "| 0.3* |" in lines[4]
    assert "minus NGT v2" in lines[6]
    assert "| no content | 1,000 | 2.0000 ± 0.0000 | +0.9000 ± 0.1414 |" in lines[9]


def test_runs_on_another_text_are_refused() -> None:
    from ngt_report import summary

    runs = [result("vanilla", 0.1, 0, 1.0), result("NGT v2", 0.1, 0, 1.0, digest="other")]
    with pytest.raises(ValueError, match="others of its section saw"):
        summary(runs, [], {}, "python it.py")


def test_readme_shows_every_text_and_every_ablation(tmp_path: Path) -> None:
    import ngt_tables

    file = tmp_path / "ngt_language_model.json"
    file.write_text(json.dumps(small_summary()), encoding="utf-8")
    lines = ngt_tables.language_model_text(tmp_path).splitlines()
    assert lines[0] == "| nats per token | parameters | some | minus ALiBi |"
    assert lines[2] == "| NGT v2 | 1,000 | 1.1000 ± 0.1414* | -0.3500 ± 0.0707 |"
    assert "100 steps" in lines[6] and "2 seeds" in lines[6] and "0.1, 0.2, 0.3" in lines[6]
    assert lines[-1] == "a GPU, torch 2.11, transformers 5.17, 2026-11-26."
    text = ngt_tables.ablations_text(tmp_path)
    assert text.startswith("some, byte, 10 passes:\n\n| model |") and "| no content |" in text
    with pytest.raises(FileNotFoundError, match=r"make it with `python .*ngt_recall.py`"):
        ngt_tables.recall_text(tmp_path)


def test_a_recall_run_says_what_it_measured(tmp_path: Path) -> None:
    import ngt_recall
    import ngt_tables

    runs = ngt_recall.plan([0, 1], steps=2)
    assert len({run["id"] for run in runs}) == len(runs) == 4 * len(ngt_recall.VARIANTS)
    run = next(run for run in runs if run["variant"] == "NGT v2")
    row = ngt_recall.work(run)
    assert (row["variant"], row["rate"], row["seed"]) == ("NGT v2", run["rate"], 0)
    assert list(row["curve"]) == [2] and row["steps_to_recall"] is None
    (tmp_path / "ngt_recall.jsonl").write_text(json.dumps(row), encoding="utf-8")
    lines = ngt_tables.recall_text(tmp_path).splitlines()
    assert lines[2].startswith(
        f"| NGT v2 | {row['parameters']:,} | {row['accuracy']:.3f} | never |"
    )


def committed(name: str) -> Path:
    file = EXPERIMENTS / "results" / name
    if not file.is_file():
        pytest.skip(f"{name} has not been measured yet")
    return file


def test_committed_language_models_are_comparable() -> None:
    """Three seeds and more of all main arms on every text; parameters within one percent."""
    from ngt_arms import ARMS
    from ngt_report import by_section

    content = json.loads(committed("ngt_language_model.json").read_text(encoding="utf-8"))
    main = {name for name, arm in ARMS.items() if arm.group == "main"}
    for section, arms in by_section(content).items():
        rows = [row for found in arms.values() for row in found]
        own = arms["NGT v2"][0]["parameters"]
        assert all(abs(row["parameters"] - own) <= 0.01 * own for row in rows), section
        assert len({row["tokens"] for row in rows}) == 1, section
        assert main <= set(arms) and all(len(arms[name]) >= 3 for name in main), section


def test_committed_recall_keeps_the_promise() -> None:
    """v2 recalls at every seed; the published law, blind to its own token, at none."""
    rows = [json.loads(x) for x in committed("ngt_recall.jsonl").read_text("utf-8").splitlines()]
    by = {
        name: [x["accuracy"] for x in rows if x["variant"] == name and x["rate"] <= highest]
        for name, highest in (("NGT v2", 1e-3), ("NGT reference", 1.0))
    }
    assert len(by["NGT v2"]) >= 10 and min(by["NGT v2"]) >= 0.99
    assert max(by["NGT reference"]) < 0.6
