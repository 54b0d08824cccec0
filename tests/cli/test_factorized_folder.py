"""The commands on a host whose maps are of low rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.commands import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf import factorize, load_gravity_model

SMALL = ("--samples", 2, "--length", 32, "--no-figures")


@pytest.fixture
def low_rank(decoder: Path, tmp_path: Path) -> Path:
    host, folder = AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "low"
    factorize(host, 0.5)
    host.save_pretrained(folder)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return folder


def test_status_says_what_loads_it(low_rank: Path) -> None:
    shown = " ".join(run("status", low_rank).output.split())
    assert "14 maps of low rank" in shown and "gravity_hf.load_factorized" in shown


def test_it_is_converted_and_writes(low_rank: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", low_rank, out, *SMALL)
    assert result.exit_code == 0, result.output
    assert len(load_gravity_model(out).config.low_rank["ranks"]) == 14
    result = run("generate", out, "ab", "--max-new-tokens", 4)
    assert result.exit_code == 0 and result.output.startswith("ab")
    assert "14 maps of low rank" in " ".join(run("status", out).output.split())
