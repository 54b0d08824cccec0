"""README's tables of results say what the result files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arm, seed, raw, healed, rate=1e-3, contrast=2.0):
    attention = {"contrast_median": contrast, "softness_median": 1.0}
    row = {
        "run": {"arm": arm, "seed": seed, "learning_rate": rate},
        "raw": raw,
        "healed": healed,
        "attention_converted": {} if arm == "host" else attention,
    }
    return row if arm == "host" else {**row, "attention_healed": attention}


def test_readme_is_what_the_result_files_say(tables):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: conversion -->" in text
    assert tables.with_tables(text) == text, "run: python scripts/make_tables.py"


def test_rows_are_compared_with_the_control_at_its_own_best_rate(tables):
    rows = [
        run("host", s, 1.0, healed, rate) for s in (0, 1) for rate, healed in ((1, 0.9), (2, 0.8))
    ]
    rows += [run("force", 0, 1.5, 0.81), run("force", 1, 1.7, 0.83)]
    rate, control = tables.best_control(rows)
    assert rate == 2
    host, force = tables.conversion_rows(rows, {"force": "gravity", "absent": "never run"})
    assert host[3] == "–" and host[2] == "0.8000 ± 0.0000"
    # Paired by seed: +0.01 and +0.03.
    assert force[:4] == ["gravity", "1.6000 ± 0.1414", "0.8200 ± 0.0141", "+0.0200 ± 0.0141"]
    assert force[-1] == "2"


def test_one_seed_has_no_spread(tables):
    assert tables.mean_and_spread([0.5]) == "0.5000"
    assert tables.mean_and_spread([-0.5], signed=True) == "-0.5000"


def test_an_unknown_table_is_an_error(tables):
    with pytest.raises(ValueError, match="got 'nothing'"):
        tables.with_tables("<!-- table: nothing -->\n<!-- end of table -->")
