"""Each limitation stands in a card exactly where its fact holds."""

from __future__ import annotations

from typing import Any

import pytest
from hub.card_results import ATTENTION, RESULTS, gravity, results, section

from gravity_hf.hub.card_software import SOFTWARE
from gravity_hf.hub.cards import model_card

LIMITS = "What it cannot do"


def limits(**changes: Any) -> str:
    return section(model_card(results(**changes), "out"), LIMITS)


def host(**changes: Any) -> dict[str, Any]:
    return {**RESULTS["host"], **changes}


def evaluation(**changes: Any) -> dict[str, Any]:
    return {**RESULTS["evaluation"], **changes}


def attention(**changes: Any) -> dict[str, Any]:
    rows = [{**row, "attention": {**ATTENTION, **changes}} for row in RESULTS["evaluation"]["rows"]]
    return evaluation(rows=rows)


# A sentence, facts where it must stand, facts where it must not.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "softmax": (
        "softmax; it is not literal gravity",
        {"law": "force", "gravity": gravity(law="force")},
        {"law": "power", "gravity": gravity(law="power")},
    ),
    "normalised": (
        "pulls are shares",
        {"law": "power", "gravity": gravity(law="power")},
        {"law": "force", "gravity": gravity(law="force")},
    ),
    "mass per head": (
        "One mass per query head;",
        {"gravity": gravity(mass_per="query_head")},
        {"gravity": gravity(mass_per="layer")},
    ),
    "mass per group": (
        "One mass per KV head, shared",
        {"gravity": gravity(mass_per="kv_head")},
        {"gravity": gravity(mass_per="query_head")},
    ),
    "mass per layer": (
        "One mass per layer, shared",
        {"gravity": gravity(mass_per="layer")},
        {"gravity": gravity(mass_per="kv_head")},
    ),
    "kept layers": (
        "1 attention module keeps dot-product attention",
        {"patch": {"layers": ["a"], "skipped": ["b"]}},
        {"patch": {"layers": ["a", "b"], "skipped": []}},
    ),
    "clamped": (
        "Squared distances are clamped at 0",
        {"gravity": gravity(distance="lifted")},
        {"gravity": gravity(distance="euclidean")},
    ),
    "softness": (
        "Softness 4;",
        {"gravity": gravity(softness=4.0)},
        {"gravity": gravity(softness=None)},
    ),
    "not calibrated": (
        "It was not calibrated",
        {"gravity": gravity(softness=None)},
        {"gravity": gravity(softness=0.5)},
    ),
    "the host again": (
        "this is the host again",
        {"evaluation": attention(contrast_median=1.05)},
        {"evaluation": attention(contrast_median=1.86)},
    ),
    "longer texts": (
        "the lengths between: not measured",
        {"host": host(max_positions=1024)},
        {"host": host(max_positions=256)},
    ),
    "unknown most": (
        "longer ones: not measured",
        {"host": host(max_positions=None)},
        {"host": host(max_positions=1024)},
    ),
    "no quality": (
        "Its quality was not measured",
        {"evaluation": None},
        {"evaluation": evaluation()},
    ),
    "other text": (
        "other text was not measured",
        {"evaluation": evaluation()},
        {"evaluation": None},
    ),
}


@pytest.mark.parametrize(("sentence", "holds", "fails"), CASES.values(), ids=CASES.keys())
def test_a_limitation_stands_where_its_fact_holds_and_nowhere_else(
    sentence: str, holds: dict[str, Any], fails: dict[str, Any]
) -> None:
    assert sentence in limits(**holds)
    assert sentence not in limits(**fails)


def test_both_lengths_are_those_of_the_results() -> None:
    text = limits(evaluation=evaluation(length=128))
    assert "Calibrated on texts of at most 256 tokens and measured on texts of at most 128" in text


@pytest.mark.parametrize("saved", ["model", "adapter"])
def test_every_program_that_cannot_run_it_is_named_with_what_happens_there(saved: str) -> None:
    text = limits(saved=saved)
    for software in SOFTWARE:
        what = software.adapter if saved == "adapter" else software.model
        assert (f"- {software.name}: " in text) == (what is not None)
        names = {"model_type": "gravity_qwen2", "name": software.name}
        assert what is None or what.format(**names) in text


def test_the_model_type_is_that_of_the_export() -> None:
    assert "`gravity_qwen2`" in limits()
    assert "`gravity_bert`" in limits(host=host(model_type="bert"))
