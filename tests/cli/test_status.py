"""`gravity-hf status` shows how gravitational each calibration left the heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.commands import run
from hosts import tiny_host, tiny_inputs

from gravity_hf import GravityConfig, calibrate, gravity_lora, patch_with_gravity
from gravity_hf.hub.file_names import CALIBRATION_FILE


def shown(folder: Path, **options: Any) -> str:
    """The status of a tiny model calibrated with `options`, on one line."""
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(law="power"))
    report = calibrate(model, [tiny_inputs("qwen2")], **options)
    model.save_pretrained(folder)
    (folder / CALIBRATION_FILE).write_text(report.to_json(), encoding="utf-8")
    result = run("status", folder)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_one_softness_for_all_heads_is_told_once(tmp_path: Path) -> None:
    text = shown(tmp_path, softness=2.0)
    assert "softness 2" in text and "softness over all heads" not in text
    assert "over the KL budget" not in text


def test_a_budget_is_told_with_the_spread_of_softness(tmp_path: Path) -> None:
    text = shown(tmp_path, max_kl=0.005)
    assert "each head's least within a KL of 0.005 nats" in text and "softness up to" in text
    assert "softness over all heads, lowest / median / highest:" in text
    assert "over the KL budget" not in text


def test_heads_over_the_budget_are_counted(tmp_path: Path) -> None:
    text = shown(tmp_path, max_kl=1e-6, max_softness=0.5)
    assert "18 of 18 heads are over the KL budget" in text


def test_an_adapter_is_shown_with_settings_and_masses(tmp_path: Path) -> None:
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(law="power", mass_per="layer"))
    gravity_lora(model, r=2).save_pretrained(tmp_path)
    result = run("status", tmp_path)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "GRAVITY_LORA adapter (with masses)" in text and "law power" in text
    # One mass for all heads of a layer: softplus(0.5).
    assert "layer masses mass model.layers.0.self_attn 1 0.9741 / 0.9741 / 0.9741" in text
