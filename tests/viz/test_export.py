"""The folder holds what its list says; the page fetches nothing; failures leave all as it was."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hosts import tiny_host

from gravity_hf.viz.export import write_figures
from gravity_hf.viz.figures import chosen_label, figures_of, interactive_figures_of


@pytest.fixture(scope="module")
def drawn(case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("figures") / "out"
    entries = write_figures(
        case.model, folder, batches=[case.batch], host=case.host, interactive=True, progress=False
    )
    return folder, entries


def test_the_list_names_exactly_what_lies_there(drawn) -> None:
    folder, entries = drawn
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == entries
    listed = {entry[key] for entry in entries for key in ("file", "svg")}
    assert {f.name for f in folder.iterdir()} == listed | {"figures.json", "interactive.html"}
    for entry in entries:
        assert (folder / entry["file"]).read_bytes().startswith(b"\x89PNG")
        assert {"name", "file", "title", "caption"} <= entry.keys()
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_masses_need_the_model_alone(case, tmp_path: Path) -> None:
    entries = write_figures(case.model, tmp_path / "a", theme="both")
    assert [entry["name"] for entry in entries] == ["masses"]
    assert (tmp_path / "a" / entries[0]["dark"]).read_bytes() != (
        tmp_path / "a" / entries[0]["file"]
    ).read_bytes()


def test_earlier_figures_are_replaced_and_other_files_stay(case, tmp_path: Path) -> None:
    results = {"training": {"lora": {"losses": [{"step": 1, "loss": 2.0}]}}}
    write_figures(case.model, tmp_path, results=results)
    (tmp_path / "mine.txt").write_text("mine")
    assert (tmp_path / "losses.png").is_file()
    write_figures(case.model, tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"masses.png", "masses.svg", "figures.json", "mine.txt"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 9}, "layer: expected a converted one of 0, 1, got 9"),
        ({"head": 6}, "head: expected 0 to 5, got 6"),
        ({"theme": "sepia"}, "theme"),
        ({"other_host": True}, "host: expected attention weights"),
    ],
    ids=["layer", "head", "theme", "host"],
)
def test_nothing_is_written_where_something_is_refused(
    options: dict[str, Any], words: str, case, tmp_path: Path
) -> None:
    if options.pop("other_host", False):
        options["host"] = tiny_host("qwen2", num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=words):
        write_figures(case.model, tmp_path / "a", batches=[case.batch], progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_keeps_its_list(case, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "masses.png" / "mine").mkdir(parents=True)
    (folder / "figures.json").write_text("[]")
    with pytest.raises(OSError):
        write_figures(case.model, folder)
    assert (folder / "figures.json").read_text() == "[]"
    assert {f.name for f in folder.iterdir()} == {"masses.png", "figures.json"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="patch_with_gravity"):
        write_figures(tiny_host("qwen2"), tmp_path / "a")


def test_what_was_not_chosen_goes_by_the_highest_contrast(case, data) -> None:
    every = [head for row in data.measured.heads.values() for head in row]
    best = max(every, key=lambda head: head.contrast)
    assert data.measured.chosen == (best.layer, best.head)
    assert any("highest contrast" in drawing.caption for drawing in figures_of(data))


class _References(html.parser.HTMLParser):
    """What a browser would fetch, and the scripts of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        wanted = {"src", "href", "data", "action", "poster", "srcset"}
        self.found += [value or "" for name, value in attributes if name in wanted]


def test_the_page_holds_plotly_once_and_refers_to_nothing_outside(drawn) -> None:
    folder, entries = drawn
    page = (folder / "interactive.html").read_text(encoding="utf-8")
    references = _References()
    references.feed(page)
    assert references.scripts >= 3
    assert references.found == []
    assert "@import" not in page.split("<script", 1)[0]
    assert len(re.findall(r"plotly\.js v\d", page)) == 1
    for entry in entries:
        if "interactive" in entry:
            assert f'id="{entry["interactive"].split("#")[1]}"' in page


def test_the_page_shows_the_same_numbers(data) -> None:
    shown = {figure.name: figure.figure for figure in interactive_figures_of(data)}
    assert [list(row) for row in shown["masses"].data[0].customdata] == data.masses["trained"]
    seen = data.measured
    name, head = seen.chosen
    own, host = seen.maps[name], seen.host_maps[name]
    for trace, weights in zip(shown["attention"].data, (host, own), strict=True):
        values = [[cell or 0.0 for cell in row] for row in trace.z]
        assert values == [pytest.approx(row, abs=1e-4) for row in weights.weights[head].tolist()]
    menu = shown["attention"].layout.updatemenus[0]
    assert len(menu.buttons) == 12
    assert menu.buttons[menu.active].label == chosen_label(seen, data)
    keys = shown["queries-and-keys"].data[1]
    assert list(keys.marker.size) == pytest.approx(seen.cloud.areas.sqrt().tolist())
    assert list(keys.x) == pytest.approx(seen.cloud.keys[:, 0].tolist())
