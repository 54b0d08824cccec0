"""The experiments on beliefs: quick runs, runs that go on, and what their numbers mean."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = (
    *("pool", "geolip_runs", "knowledge_base", "belief_runs", "belief_measures"),
    *("belief_report", "beliefs", "belief_interference", "belief_restore", "belief_routing"),
    "belief_forge",
)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield
    for name in MODULES:
        sys.modules.pop(name, None)


def experiment(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all quick runs write, so that they share one base."""
    return tmp_path_factory.mktemp("beliefs")


def run(name: str, folder: Path, *more: str) -> dict[str, Any]:
    file = folder / f"{name}.json"
    given = ["--quick", "--commit", "0123abc", "--out", str(file), *more]
    experiment(name).main(given)
    text = file.read_text(encoding="utf-8")
    assert str(folder) not in text
    return json.loads(text)


@pytest.fixture(scope="module")
def beliefs(folder: Path) -> dict[str, Any]:
    return run("beliefs", folder, "--banks", "invented", "--per-bank", "3")


def test_a_result_says_how_it_was_made(beliefs: dict[str, Any]) -> None:
    assert beliefs["schema"] == "gravity-beliefs/1"
    assert beliefs["commit"] == "0123abc"
    assert beliefs["command"].startswith("python scripts/experiments/beliefs.py --quick")
    for name in ("versions", "device", "seeds", "config", "controls", "base", "summary"):
        assert beliefs[name], name
    assert len(beliefs["base"]["digest"]) == 64


def test_every_fact_is_measured_in_every_way(beliefs: dict[str, Any]) -> None:
    from belief_measures import MEASURES
    from belief_report import CONTROLS, WAYS

    assert len(beliefs["per_item"]) == 3
    for item in beliefs["per_item"]:
        assert all(len(item[way]) == len(MEASURES) for way in (*WAYS, *CONTROLS))
    (unit,) = beliefs["units"]
    assert set(unit["elsewhere"]["prompts"]) == {"oracle", "routed", "all_active", "lora"}
    assert unit["deltas"]["parameters"] > 0


def test_what_is_done_is_not_done_again(
    beliefs: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def work(options: Any, model: Any, tokenizer: Any, bank: str, seed: int) -> dict[str, Any]:
        done.append(bank)
        (unit,) = beliefs["units"]
        items = [{k: v for k, v in x.items() if k != "unit"} for x in beliefs["per_item"]]
        return {**unit, "bank": bank, "per_item": items}

    monkeypatch.setattr(experiment("beliefs"), "work", work)
    again = run("beliefs", folder, "--banks", "invented", "--per-bank", "3")
    assert not done
    assert again["per_item"] == beliefs["per_item"]
    # Other settings are another measurement.
    run("beliefs", folder, "--banks", "invented", "--per-bank", "2")
    assert done == ["invented"]


def test_the_base_comes_back_and_flips_are_named(folder: Path) -> None:
    content = run("belief_restore", folder)
    found = content["summary"]
    assert found["equal"] == found["comparisons"] > 0
    assert found["active_equal"] < found["active_comparisons"]
    assert found["reopened_equal"] == found["reopened"] == 24
    assert found["named"] == found["flipped"] == 2
    assert found["restored"] is True


def test_the_forge_is_asked_for_what_no_delta_can_do_too(folder: Path) -> None:
    content = run("belief_forge", folder, "--banks", "invented")
    assert set(content["summary"]) == {"given invented", "misworded invented"}
    for found in content["summary"].values():
        assert found["facts"]["trials"] == 4 and found["batches"] == 2
    for item in content["per_item"]:
        assert item["passed"] or item["reason"]
    headers, rows = experiment("belief_report").forge_table(content)
    assert len(rows) == 2 and all(len(row) == len(headers) for row in rows)


def test_misworded_facts_are_held_to_each_others_paraphrases() -> None:
    from gravity_hf.knowledge.facts import load_facts

    facts = load_facts("invented")[:3]
    changed = experiment("belief_forge").misworded(facts)
    for fact, other, new in zip(facts, [*facts[1:], facts[0]], changed, strict=True):
        assert (new.id, new.prompt, new.answer) == (fact.id, fact.prompt, fact.answer)
        assert new.paraphrases == (fact.paraphrases[0], *other.paraphrases[1:])


@pytest.mark.slow
def test_interference_is_measured_for_both_kinds(folder: Path) -> None:
    content = run("belief_interference", folder)
    assert set(content["summary"]) == {"plain", "projected"}
    headers, rows = experiment("belief_report").interference_table(content)
    assert [row[0] for row in rows] == ["1", "2", "12"]
    assert len(headers) == len(rows[0]) == 7


@pytest.mark.slow
def test_routing_has_its_controls(folder: Path) -> None:
    content = run("belief_routing", folder)
    encoders = content["summary"]["routing"]
    assert set(encoders) == set(experiment("belief_routing").ROUTERS)
    assert encoders["hidden:quarter"]["beliefs"] == 8
    assert set(content["summary"]) == {"routing", "confidence", "separation", "few_shot"}


def item(name: str, known: bool, **exact: float) -> dict[str, Any]:
    """A fact whose measures are all `exact`, or 0 where none is given."""
    from belief_report import CONTROLS, WAYS

    return {
        "id": name,
        "known": known,
        **{way: [exact.get(way, 0.0)] * 9 for way in (*WAYS, *CONTROLS)},
    }


def unit(seed: int, items: list[dict[str, Any]]) -> dict[str, Any]:
    elsewhere = {
        "prompts": {"oracle": {"kl": 0.1, "kept": 1.0, "prompts": 5}},
        "text": {"base": 2.0, "oracle": 0.01},
    }
    deltas = {"parameters": 10, "seconds": 1.0}
    return {
        **{"bank": "b", "seed": seed, "deltas": deltas, "elsewhere": elsewhere},
        "per_item": items,
    }


def test_a_fact_counts_once_and_where_most_seeds_have_it() -> None:
    report = experiment("belief_report")
    often, seldom = [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]
    units = [
        unit(s, [item("x", False, oracle=often[s]), item("y", False, oracle=seldom[s])])
        for s in range(3)
    ]
    found = report.beliefs_summary(units)["b"]["unknown"]
    assert found["facts"] == 2
    exact = found["oracle"]["exact"]
    assert (exact["successes"], exact["trials"]) == (1, 2)
    assert found["oracle"]["spread"]["exact"]["mean"] == pytest.approx(0.5)
    assert found["oracle"]["spread"]["exact"]["highest"] == 1.0
    assert found["oracle_minus_random"]["mean"] == pytest.approx(0.5)
    assert found["routed_against_base"]["only_first"] == 0


def test_what_the_base_knows_is_summed_up_apart() -> None:
    report = experiment("belief_report")
    items = [item("x", True, oracle=1.0, base=1.0), item("y", False), item("z", False)]
    found = report.beliefs_summary([unit(0, items)])["b"]
    assert (found["known"]["facts"], found["unknown"]["facts"]) == (1, 2)
    assert found["known"]["base"]["exact"]["rate"] == 1.0
    headers, rows = report.beliefs_table({"summary": {"b": found}})
    assert rows[0][:2] == ["b (2), its own delta, by name", "0% (0% to 66%)"]
    assert all(len(row) == len(headers) for row in rows)


def test_random_deltas_are_as_large_on_each_map() -> None:
    from gravity_hf.knowledge.delta import LowRankDelta

    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 5, 3), "b": (1, 4, 6)}
    factors = {
        name: tuple(torch.randn(*s, generator=generator) for s in ((r, i), (o, r)))
        for name, (r, i, o) in shapes.items()
    }
    delta = LowRankDelta(factors)
    random = experiment("belief_measures").random_like(delta, 1)
    for name in shapes:
        assert random.update(name).norm() == pytest.approx(float(delta.update(name).norm()))
        assert not torch.allclose(random.update(name), delta.update(name))


def test_another_fact_has_another_answer() -> None:
    from gravity_hf.knowledge.facts import load_facts

    measures, facts = experiment("belief_measures"), load_facts("chemistry")
    chosen = measures.others(facts, 0)
    assert set(chosen) == {fact.id for fact in facts}
    assert all(not set(x.answers) & set(chosen[x.id].answers) for x in facts)
    same = [fact for fact in facts if fact.answer == "halogens"]
    with pytest.raises(ValueError, match="several answers"):
        measures.others(same, 0)


def test_everything_added_is_removed_once_and_later() -> None:
    order = experiment("belief_restore").changes(20, 3)
    added = [number for action, number in order if action == "add"]
    removed = [number for action, number in order if action == "remove"]
    assert sorted(added) == sorted(removed) == list(range(20))
    assert all(order.index(("add", x)) < order.index(("remove", x)) for x in range(20))
    assert order != experiment("belief_restore").changes(20, 4)


def test_overlap_is_nothing_for_orthogonal_deltas_and_all_for_equal_ones() -> None:
    from types import SimpleNamespace

    from gravity_hf.knowledge.delta import LowRankDelta

    eye = torch.eye(12)
    made = [
        SimpleNamespace(delta=LowRankDelta({"m": (eye[i : i + 1], torch.ones(2, 1))}))
        for i in range(12)
    ]
    overlap = experiment("belief_interference").overlap
    assert overlap(made) == pytest.approx(0.0)
    assert overlap([*made[:10], *made[:10]]) == pytest.approx(1.0)
    assert overlap(made[:10]) is None


def test_foreign_prompts_are_about_no_fact_of_the_bank() -> None:
    from gravity_hf.knowledge.facts import load_facts

    facts = load_facts("general")
    prompts = experiment("belief_runs").foreign_prompts(facts, 200, 0)
    own = {text for fact in facts for text in (*fact.prompts, *fact.unrelated)}
    assert len(set(prompts)) == 200
    assert not own & set(prompts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--quick"], "--out"),
        (["--base", "nowhere"], "config.json"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_options_that_cannot_work_are_refused(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        experiment("beliefs").main(more)
    assert message in capsys.readouterr().err
