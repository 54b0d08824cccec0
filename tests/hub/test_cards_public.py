"""What is published names no place on the machine that it was made on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import RESULTS, results

from gravity_hf.hub.card_facts import complete
from gravity_hf.hub.card_public import is_local, public
from gravity_hf.hub.cards import model_card
from gravity_hf.hub.staging import Extras, staged

PATHS = {
    "/home/somebody/a model": "a model",
    "~/models/mine": "mine",
    "~somebody/mine": "mine",
    "../mine": "mine",
    "data/../mine": "mine",
    "C:\\Users\\somebody\\mine": "mine",
    "c:/somebody/mine": "mine",
    "\\\\server\\somebody\\mine": "mine",
    "file:///home/somebody/mine.txt": "mine.txt",
    "1 file, /home/somebody/mine.txt; 3 examples": "1 file, mine.txt; 3 examples",
    "folder '/home/somebody/mine', read": "folder 'mine', read",
}
NO_PATHS = (
    *("maker/model", "https://example.org/a/b", "M^2 / (d^2 + eps)", "50 / 2", "and/or"),
    *("model.layers.0.self_attn", "2026-01-02T03:04:05+00:00", "about ~ 3", "wait...", "runs/a"),
)


@pytest.mark.parametrize(("text", "shown"), PATHS.items())
def test_a_path_becomes_its_last_name(text: str, shown: str) -> None:
    found = public({"a": [{"b": text}], text: 1})
    assert found == {"a": [{"b": shown}], shown: 1}
    assert public(found) == found


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_is_no_path_stays(text: str) -> None:
    assert public({"a": text, "command": f"x --y '{text}'"})["a"] == text
    assert public({"command": f"x --y '{text}'"}) == {"command": f"x --y '{text}'"}


def test_the_words_of_a_command_lose_their_folders_and_it_still_reads() -> None:
    command = "python /opt/x/convert.py --model='~/a b' --out '/tmp/my out' --prompts 'def read('"
    shown = public({"command": command})["command"]
    assert shown == "python convert.py '--model=a b' --out 'my out' --prompts 'def read('"
    assert public({"command": "broken ' /home/me/x"})["command"] == "broken ' x"


def test_files_of_one_name_stay_two() -> None:
    assert public({"/a/x.txt": 1, "/b/x.txt": 2}) == {"x.txt": 1, "x.txt (2)": 2}


def test_what_a_model_wrote_and_was_asked_is_quoted_as_it_was() -> None:
    quoted = {"samples": [{"text": "#!/usr/bin/env"}], "prompts": ["/usr"], "citation": "x /a/b"}
    assert public(quoted) == quoted


def older(place: str) -> dict[str, Any]:
    """As they were written before paths were left out of them."""
    found = results()
    host = {key: value for key, value in found["host"].items() if key != "local"}
    found["host"] = {**host, "name": f"{place}/my-host"}
    found["settings"] |= {"dataset": f"{place}/words", "text_files": [f"{place}/a.txt"]}
    found["conditions"]["command"] = f"gravity-hf convert {place}/my-host {place}/out"
    found["evaluation"]["text"] = f"dataset {place}/words; 3 examples"
    return found


@pytest.mark.parametrize("place", ["/home/somebody", "~/somebody", "D:\\somebody"])
def test_a_card_of_older_results_names_no_place_and_claims_no_name_on_the_hub(place: str) -> None:
    card = model_card(older(place), "me/out")
    assert "somebody" not in str(card) and "my-host" in card.text
    assert card.data.base_model is None and card.data.datasets == ["maker/words"]
    assert card.data.eval_results[0].dataset_type == "text"
    # Nor does what is left of them, read again.
    again = model_card(public(older(place)), "me/out")
    assert str(again) == str(card)


def test_a_push_of_older_results_leaves_their_paths_at_home(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    (copy / "results.json").write_text(json.dumps({**older("/home/somebody"), "layers": None}))
    options: Any = {"max_shard_size": "1GB", "online": False}
    with staged(copy, "me/out", Extras(figures=False), **options) as found:
        pushed = {name: file.read_bytes() for name, file in found.files.items()}
    for name in ("results.json", "README.md"):
        assert b"my-host" in pushed[name] and b"somebody" not in pushed[name]
    given = Extras(figures=False, results=older("/home/somebody"))
    with staged(export, "me/out", given, **options) as found:
        assert b"somebody" not in found.files["results.json"].read_bytes()


def test_a_name_is_claimed_only_where_the_hub_could_have_it(tmp_path: Path) -> None:
    for name, local in {"maker/host": False, "two/many/parts": False, "bad--name": False}.items():
        host = {**RESULTS["host"], "name": name, "local": local}
        expected = name if name == "maker/host" else None
        assert model_card(results(host=host), "x").data.base_model == expected
    assert is_local(str(tmp_path)) and is_local("./x") and not is_local("maker/host")
    assert complete(results())["dataset_local"] is None
