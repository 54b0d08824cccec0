"""LGT's experiments: what is compared is comparable, what is committed is what the script makes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
MODULES = ("pool", "lgt_recall", "lgt_report", "lgt_language_model")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def committed(name: str) -> Path:
    return EXPERIMENTS / "results" / name


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole experiment with tiny models: its folder and its summary."""
    out = tmp_path_factory.mktemp("lgt")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import lgt_language_model

        patch.setattr(
            sys, "argv", ["x", "--quick", "--workers", "0", "--seeds", "0", "--out", str(out)]
        )
        lgt_language_model.main()
    return {"out": out, "summary": json.loads((out / "lgt_language_model.json").read_text())}


def test_every_arm_is_measured_on_the_same_text(quick: dict[str, Any]) -> None:
    import lgt_language_model as experiment

    rows = quick["summary"]["rows"]
    assert [row["arm"] for row in rows] == ["unigram", "bigram", *experiment.ARMS]
    assert len({row["tokens"] for row in rows[2:]}) == 1
    tried = {row["arm"]: [] for row in quick["summary"]["tuning"]}
    for row in quick["summary"]["tuning"]:
        tried[row["arm"]].append(row["learning_rate"])
    assert all(rates == list(experiment.SIZES["quick"]["rates"]) for rates in tried.values())
    # Untrained models know nothing of bytes: eight bits.
    assert all(6 < row["bits_per_byte"] < 9 for row in rows[2:])


def test_the_best_rate_of_an_arm_is_that_of_the_lowest_loss() -> None:
    import lgt_language_model as experiment

    runs = [
        {"run": {"arm": "a", "rate": 1.0}, "loss": 3.0},
        {"run": {"arm": "a", "rate": 2.0}, "loss": 2.0},
        {"run": {"arm": "a", "rate": 3.0}, "loss": math.nan},
        {"run": {"arm": "b", "rate": 1.0}, "loss": 1.0},
    ]
    assert experiment.best_rates(runs) == {"a": 2.0, "b": 1.0}


def test_a_rate_that_does_not_last_is_replaced_by_the_next_lower_one() -> None:
    import lgt_language_model as experiment

    losses = {"a": (2.0, [1.5, 1.6]), "b": (2.0, [1.5, 2.6]), "c": (2.0, [math.nan]), "d": (2, [3])}
    rates = {"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.1}
    tuned = [
        {"run": {"arm": arm, "rate": rate}, "loss": short}
        for arm, (short, _) in losses.items()
        for rate in (0.1, 0.2)
    ]
    full = [{"run": {"arm": arm}, "loss": x} for arm, (_, runs) in losses.items() for x in runs]
    # There is none below that of the last one.
    assert experiment.lowered_rates(rates, tuned, full) == {"b": 0.1, "c": 0.1}


def test_softmax_has_the_shape_of_lgt_or_as_many_parameters() -> None:
    import lgt_language_model as experiment
    from transformers import AutoConfig, AutoModelForCausalLM

    import gravity_hf  # noqa: F401  registers LGT

    counts = {}
    for arm in experiment.ARMS:
        kind, changes = experiment.overrides(arm, experiment.SIZES["small"])
        config = AutoConfig.for_model(kind, vocab_size=256, **changes)
        assert config.hidden_size == 96 and config.num_hidden_layers == 3
        counts[arm] = AutoModelForCausalLM.from_config(config).num_parameters()
        if arm == experiment.SOFTMAX:
            lgt = experiment.overrides(experiment.LGT, experiment.SIZES["small"])
            inner = AutoConfig.for_model("lgt", **lgt[1]).intermediate_size
            assert config.n_inner == inner
    small, lgt = counts[experiment.SOFTMAX_SMALL], counts[experiment.LGT]
    assert abs(small - lgt) < 0.05 * lgt < counts[experiment.SOFTMAX] - lgt


def test_what_is_kept_is_a_model_with_its_card(quick: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gravity_hf.hub.cards import card_of_folder

    folder = quick["out"] / "lgt"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("def f", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, 5, 256)
    text = card_of_folder(folder, "lgt").text
    row = next(r for r in quick["summary"]["rows"] if r["arm"] == "LGT")
    assert f"the model in this folder has {row['bits_per_byte']:.4f}" in text
    assert "python scripts/experiments/lgt_language_model.py --quick" in text
    assert "**LGT: this model**" in text and str(quick["out"]) not in text
    assert "![Learning curves on held-out text](figures/learning-curves.png)" in text


def test_recall_runs_have_ids_of_their_own() -> None:
    import lgt_recall

    runs = lgt_recall.plan([0, 1, 2])
    assert len({run["id"] for run in runs}) == len(runs) == 6 * len(lgt_recall.VARIANTS)


def test_a_recall_run_says_what_it_measured(tmp_path: Path) -> None:
    import lgt_recall

    run = next(r for r in lgt_recall.plan([3]) if r["variant"] == "defaults")
    row = lgt_recall.work({**run, "steps": 1})
    assert (row["variant"], row["task"], row["seed"]) == ("defaults", "previous", 3)
    assert row["change_of_earlier_logits"] == 0.0 < row["change_of_later_logits"]
    assert row["settings"]["steps"] == 1 and "versions" in row["conditions"]


def test_committed_recall_keeps_the_promise() -> None:
    """LGT at its defaults: 0.99 and more on both tasks, on three seeds; nothing leaks."""
    import lgt_recall

    rows = [json.loads(line) for line in committed("lgt_recall.jsonl").read_text().splitlines()]
    known = {run["id"]: run for run in lgt_recall.plan([0, 1, 2])}
    for row in rows:
        assert row["run"] == known[row["id"]] and row["settings"]["steps"] == 400
        assert row["change_of_earlier_logits"] == 0.0
    mine = [row for row in rows if row["variant"] == "defaults"]
    assert len(mine) == 6 and all(row["accuracy"] >= 0.99 for row in mine)


def test_committed_language_models_beat_their_bigrams() -> None:
    import lgt_language_model as experiment

    content = json.loads(committed("lgt_language_model.json").read_text())
    best = {}
    for row in content["rows"]:
        best.setdefault(row["arm"], []).append(row["bits_per_byte"])
    for arm in (experiment.LGT, experiment.LGT_OPTIONS):
        assert len(best[arm]) == 3
        assert max(best[arm]) < best["bigram"][0] < best["unigram"][0]
    assert set(best) == {"unigram", "bigram", *experiment.ARMS}
