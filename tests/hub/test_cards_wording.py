"""Cards of unusual conversions: what is said of them is true of them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import ATTENTION, HOST_CARD, OLD_RESULTS, RESULTS, gravity, results, section

from gravity_hf.hub.card_host import read_host_card
from gravity_hf.hub.card_words import counted
from gravity_hf.hub.cards import card_of_folder, model_card

LAW, CHANGED, MADE, MEASURED = (
    *("The law", "What was changed", "How it was made"),
    "What was measured",
)
UNTRAINED: dict[str, Any] = {"transfer": None, "lora": None, "control": None}
LORA = RESULTS["training"]
FIXED = {**gravity(learn_softening=False, softness=0.0), "distance": "euclidean"}
TEXT = "a file; 5 examples (9 tokens) to train, 2 examples (3 tokens) to validate"
EMBEDDINGS = {
    **RESULTS["evaluation"],
    "measure": "embeddings",
    "rows": [{"key": "calibrated", "title": "calibrated", "cosine_mean": 0.5}],
}


def said(title: str, **changes: Any) -> str:
    return section(model_card(results(**changes), "out"), title)


def without_attention() -> dict[str, Any]:
    row = {"key": "healed", "title": "after LoRA", "loss": 2.5}
    return {**RESULTS["evaluation"], "rows": [row]}


def test_numbers_of_the_calibration_are_not_those_of_a_trained_model() -> None:
    barely = {**ATTENTION, "contrast_median": 1.05}
    for evaluation in (None, without_attention()):
        card = model_card(results(evaluation=evaluation, calibration=barely), "out")
        assert "at calibration, before training: median softness" in section(card, CHANGED)
        assert "of the finished model: not measured" in section(card, CHANGED)
        assert "this is the host again" not in card.text
    card = model_card(results(evaluation=None, calibration=barely, training=UNTRAINED), "out")
    assert "of the finished model" not in card.text and "this is the host again" in card.text


def test_a_budget_is_named_with_what_it_means() -> None:
    card = model_card(results(gravity=gravity(max_kl=0.01, softness=3.5)), "out")
    words = "up to 3.5, each head's least within a KL of 0.01 nats"
    assert f"Softness {words}" in section(card, "What it cannot do")
    assert "softness up to 1, each head's least" in section(card, LAW)


def test_softenings_that_are_fixed_are_not_called_trained() -> None:
    for training in (LORA, UNTRAINED):
        card = model_card(results(gravity=FIXED, layers=None, training=training), "out")
        text = section(card, LAW)
        assert "eps = 0.1, fixed" in text and "softening eps per head" not in text
        assert "M and eps" not in text and "squared lengths" not in text
        assert "masses and softenings" not in card.text
        assert ("M was trained after that" in text) == (training is LORA)
    learnt = said(LAW)
    assert "softening eps per head" in learnt and "M and eps were trained after that" in learnt


def test_the_start_is_gravity_2s_only_where_its_constants_were_used() -> None:
    bare: dict[str, Any] = {"calibration": None, "training": UNTRAINED, "layers": None}
    start = {"softness": None, "learn_softening": False, "distance": "euclidean"}
    assert "started at Gravity-2's constants" in said(LAW, gravity=gravity(**start), **bare)
    for other in ({"epsilon": 0.2}, {"mass_init": 1.0}, {"law": "power"}):
        text = said(LAW, **{**bare, "gravity": gravity(**{**start, **other})})
        assert "Gravity-2" not in text and f"eps = {other.get('epsilon', 0.1)}" in text
    assert "started at M = 1.313" in said(LAW, **bare, gravity=gravity(**start, mass_init=1.0))


CONTRASTS = {"force": "steeper the score falls at a near key", "power": None}


@pytest.mark.parametrize("law", CONTRASTS)
def test_contrast_is_explained_by_its_formula_for_both_laws(law: str) -> None:
    text = said(MEASURED, law=law, gravity=gravity(law=law))
    assert text.count("((d2_95 + eps) / (d2_05 + eps))^2") == 1
    assert "pull" not in text and ("steeper" in text) == (CONTRASTS[law] is not None)


def test_an_encoder_reads_texts_and_no_windows() -> None:
    host = {**RESULTS["host"], "writes": False}
    card = model_card(results(host=host, evaluation=EMBEDDINGS), "out")
    assert "window" not in section(card, MADE) + section(card, MEASURED)
    assert "texts of at most 256 tokens" in section(card, MADE)
    assert "Calibrated on 16 texts" in section(card, MADE) and "4 x 2 texts" in card.text
    assert "windows of 256" in said(MADE) and "16 windows" in said(MADE)


def test_data_that_trained_nothing_are_not_called_training_data() -> None:
    evaluation = {**RESULTS["evaluation"], "text": TEXT}
    assert "tokens) to train," in said(MEASURED, evaluation=evaluation)
    card = model_card(results(evaluation=evaluation, training=UNTRAINED), "out")
    assert "tokens) to calibrate on," in section(card, MEASURED)
    assert card.data.eval_results[0].dataset_name.startswith("a file; 5 examples (9 tokens) to cal")


def test_a_command_cannot_end_its_own_block() -> None:
    conditions = {**RESULTS["conditions"], "command": "x '`\n~~~~\n# No heading'"}
    text = said(MEASURED, conditions=conditions)
    assert "~~~~~bash\nx '`\n~~~~\n# No heading'\n~~~~~" in text


def test_an_objective_without_factors_is_not_recorded() -> None:
    training = {**LORA, "lora": {"objective": {"outputs": 0.0, "loss": 0.0}}}
    assert "loss on not recorded" in said(MADE, training=training)


def test_one_of_a_thing_is_one() -> None:
    one = {
        "patch": {"layers": ["a"], "skipped": ["b"]},
        "evaluation": {**RESULTS["evaluation"], "attention_batches": 1},
        "settings": {**RESULTS["settings"], "lora_steps": 1, "samples": 1},
        "layers": [{**RESULTS["layers"][0], "mass": {**RESULTS["layers"][0]["mass"], "count": 1}}],
    }
    one["evaluation"]["rows"] = [
        {**row, "attention": {**ATTENTION, "heads": 1}} if row.get("attention") else row
        for row in RESULTS["evaluation"]["rows"]
    ]
    text = model_card(results(**one), "out").text
    for words in (
        *("1 of its attention modules was converted, 1 keeps", "1 attention module keeps"),
        *("1 mass;", "1 key radius, fixed", "over 1 head)", "1 step of", "on 1 process,"),
        *("on the first batch of", "Calibrated on 1 window,"),
    ):
        assert words in text, words
    assert counted(2, "batch") == "2 batches" and counted(1200, "mass") == "1,200 masses"


def test_no_card_says_none() -> None:
    host = {**RESULTS["host"], "dtype": None, "card": None}
    rare: dict[str, list[Any]] = {
        "host": [RESULTS["host"], host, {**host, "name": None, "class": None, "writes": None}],
        "training": [LORA, UNTRAINED],
        "calibration": [ATTENTION, None],
        "evaluation": [RESULTS["evaluation"], None, EMBEDDINGS, without_attention()],
    }
    kinds = itertools.cycle(["model", "adapter", "model"])
    for values in itertools.product(*rare.values()):
        changes = dict(zip(rare, values, strict=True))
        text = str(model_card(results(**changes, saved=next(kinds)), "out"))
        assert not re.search(r"\bNone\b", text), values
    assert "None" not in str(model_card(OLD_RESULTS, "out"))


def test_several_licences_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    card = read_host_card(str(tmp_path))
    found = model_card(results(host={**RESULTS["host"], "card": card}), "out")
    assert found.data.license == ["mit", "apache-2.0"]
    assert "`mit`, `apache-2.0`, inherited" in found.text


def test_a_link_into_the_hosts_folder_is_no_link_of_this_model() -> None:
    card = {**HOST_CARD, "license": "other", "license_name": "mine", "license_link": "LICENSE"}
    found = model_card(results(host={**RESULTS["host"], "card": card}), "out")
    assert found.data.license_link is None and found.data.license_name == "mine"
    assert "in the host's file `LICENSE`" in found.text


def test_a_card_that_cannot_be_read_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    card = read_host_card(str(tmp_path))
    text = model_card(results(host={**RESULTS["host"], "card": card}), "out").text
    assert "the host's card could not be read" in text and "no card of the host" not in text


def test_an_adapter_holds_no_weights_of_its_host() -> None:
    text = said("Licence and sources", saved="adapter")
    assert "It holds no weights of `maker/host`; it goes onto them." in text
    assert "The weights are those of" in said("Licence and sources")


@pytest.fixture
def plain(export: Path, tmp_path: Path) -> Path:
    """An export that nothing describes, and that was not calibrated."""
    folder = Path(shutil.copytree(export, tmp_path / "plain"))
    for name in ("results.json", "calibration.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["gravity"] |= {"softness": None, "max_kl": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_of_a_plain_folder_neither_training_nor_calibration_is_claimed(plain: Path) -> None:
    card = card_of_folder(plain, "x", online=False)
    assert "whether it was trained after that is not recorded" in section(card, LAW)
    limits = section(card, "What it cannot do")
    assert "Behaviour over length: not measured." in limits
    assert "calibrated and measured on" not in limits


def test_of_a_calibrated_folder_the_calibration_is_not_the_finished_model(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["gravity"]["softness"] = 1.0
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "calibration.json").write_text(json.dumps({"summary": ATTENTION}))
    text = section(card_of_folder(plain, "x", online=False), CHANGED)
    assert "at calibration: median softness" in text
    assert "of the finished model: not measured" in text
