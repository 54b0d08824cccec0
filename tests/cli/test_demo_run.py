"""The demonstration as a whole, with a model that trains in seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

from cli.commands import TINY, DemoRun

from gravity_hf import load_gravity_model
from gravity_hf.cli.console import make_console
from gravity_hf.cli.demo.heal import CALIBRATED, CONTROL, TITLES
from gravity_hf.cli.demo.host import obtain_host, recent
from gravity_hf.training.corpus import load_corpus

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "hr"}


class Balance(HTMLParser):
    """Collects links, and fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]


def test_report_is_one_file_that_fetches_nothing(demo_run: DemoRun) -> None:
    text = (demo_run.out / "report.html").read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert all(link.startswith(("#", "data:")) for link in parser.links)
    assert parser.tags.isdisjoint({"script", "link", "iframe", "img"})
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<svg") == 2


def test_report_shows_numbers_and_conditions(demo_run: DemoRun) -> None:
    text = (demo_run.out / "report.html").read_text(encoding="utf-8")
    for outcome in demo_run.results.outcomes.values():
        assert f"{outcome.converted:.3f}" in text
        assert f"{outcome.healed:.3f}" in text
    for condition in ("gravity-hf demo --out out", "Seed", "torch", "Calibration, head by head"):
        assert condition in text


def test_results_hold_every_row_and_how_gravitational_it_is(demo_run: DemoRun) -> None:
    results = json.loads((demo_run.out / "results.json").read_text())
    rows = {row["key"]: row for row in results["rows"]}
    assert list(rows) == list(TITLES)
    for row in rows.values():
        assert math.isfinite(row["converted"]) and math.isfinite(row["healed"])
        assert len(row["heal_losses"]) == TINY.heal_steps
    assert rows[CALIBRATED]["calibration"]["softness"] == TINY.softness
    assert rows[CALIBRATED]["calibration"]["contrast_median"] >= 1
    gap = rows[CALIBRATED]["healed"] - rows[CONTROL]["healed"]
    assert results["gap_nats_per_byte"] == gap
    assert results["conditions"]["settings"]["seed"] == TINY.seed


def test_table_is_markdown(demo_run: DemoRun) -> None:
    lines = (demo_run.out / "table.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 2 + len(TITLES)
    assert len({line.count("|") for line in table[: 2 + len(TITLES)]}) == 1


def test_saved_model_is_the_one_that_ran(demo_run: DemoRun) -> None:
    reload = demo_run.results.reload
    assert reload["identical"] or reload["logits_difference"] < 1e-4
    model = load_gravity_model(demo_run.out / "model")
    assert model.config.gravity["softness"] == TINY.softness
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_screen_tells_the_story(demo_run: DemoRun) -> None:
    for text in ("1/4", "2/4", "3/4", "4/4", *TITLES.values()):
        assert text in demo_run.screen


def test_a_gap_that_is_not_a_number_is_not_accepted(demo_run: DemoRun) -> None:
    broken = dataclasses.replace(demo_run.results.outcomes[CALIBRATED], healed=math.nan)
    outcomes = {**demo_run.results.outcomes, CALIBRATED: broken}
    results = dataclasses.replace(demo_run.results, outcomes=outcomes)
    assert results.problems
    assert results.verdict.startswith("Not accepted")


def test_host_is_reused_only_under_the_same_conditions(demo_run: DemoRun) -> None:
    corpus = load_corpus(None, TINY.train_bytes, TINY.validation_bytes)
    folder, console = demo_run.out / "host", make_console()
    with console.capture():
        same = obtain_host(TINY, corpus, folder, fresh=False, console=console)
        assert same.reused
        assert same.losses == demo_run.results.host_losses
        other = dataclasses.replace(TINY, host_steps=2)
        trained = obtain_host(other, corpus, folder.parent / "other", False, console)
        assert not trained.reused
        again = obtain_host(TINY, corpus, folder.parent / "other", False, console)
        assert not again.reused
    # The same seed trains the same host.
    assert again.losses == same.losses


def test_recent_loss_is_a_mean_of_the_end() -> None:
    assert recent([9.0, 1.0, 3.0], count=2) == 2.0
