"""`gravity-hf profile`: a table on the screen, a manifest on disk, a tier to run."""

from __future__ import annotations

import json
from pathlib import Path

from cli.commands import run

from gravity_hf.training.profiling_manifest import read_manifest

SMALL = ("--prompt-length", 24, "--tokens", 4, "--runs", 1, "--windows", 1)


def test_a_profile_is_shown_and_written(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    given = (*SMALL, "--tiers", "half, packed-cache", "--min-quality", 0, "--out", out)
    result = run("profile", decoder, *given)
    assert result.exit_code == 0, result.output
    for words in ("full", "half", "packed-cache: left out", "Tier to run: ", "agreement"):
        assert words in result.output
    manifest = read_manifest(out, decoder)
    assert [tier["name"] for tier in manifest["tiers"]] == ["full", "half"]
    assert manifest["text"] == "Python's help text"
    assert str(tmp_path) not in json.dumps({k: v for k, v in manifest.items() if k != "conditions"})


def test_no_tier_within_the_bounds_is_said(decoder: Path) -> None:
    result = run("profile", decoder, *SMALL, "--tiers", "half", "--max-latency", 0)
    assert result.exit_code == 0, result.output
    assert "none is within these bounds" in result.output


def test_what_cannot_be_profiled_is_refused_in_one_line(decoder: Path, encoder: Path) -> None:
    refused = run("profile", decoder, *SMALL, "--tiers", "early-exit")
    assert refused.exit_code == 2 and "expected some of" in refused.output
    refused = run("profile", encoder, *SMALL)
    assert refused.exit_code == 2 and "causal" in refused.output


def test_a_device_that_is_not_there_is_refused_in_one_line(decoder: Path) -> None:
    for device in ("cuda:77", "gpu"):
        refused = run("profile", decoder, *SMALL, "--device", device)
        assert refused.exit_code == 2 and "device: expected one that this" in refused.output
