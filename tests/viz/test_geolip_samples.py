"""What lies in a folder for figures is read whole, or refused with its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gravity_hf.viz.geolip import HISTORY_FILE, SAMPLES_FILE, read_history, read_samples


def test_nothing_there_is_nothing_read(tmp_path: Path) -> None:
    assert read_samples(tmp_path) is None and read_history(tmp_path) is None


def test_half_precision_is_widened_and_masks_stay(tmp_path: Path) -> None:
    mask = torch.ones(2, 3, dtype=torch.long)
    stored = {"patches": torch.randn(2, 3, 4).half(), "attention_mask": mask}
    save_file(stored, tmp_path / SAMPLES_FILE)
    found = read_samples(tmp_path)
    assert found is not None and found["patches"].dtype == torch.float32
    assert found["attention_mask"].dtype == torch.long


def test_a_run_without_steps_or_layers_has_no_curves(tmp_path: Path) -> None:
    for shape in ((0, 2, 4), (3, 0)):
        tensors = {"steps": torch.arange(shape[0]), "alphas": torch.zeros(shape)}
        save_file(tensors, tmp_path / HISTORY_FILE)
        assert read_history(tmp_path) is None


def test_other_content_is_refused(tmp_path: Path) -> None:
    save_file({"pixels": torch.zeros(1)}, tmp_path / SAMPLES_FILE)
    with pytest.raises(ValueError, match="either patches or pixel_values"):
        read_samples(tmp_path)
    (tmp_path / HISTORY_FILE).write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_history(tmp_path)
