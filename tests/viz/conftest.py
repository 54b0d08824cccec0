"""One small calibrated model, its host, and a batch of which part is padding."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hosts import VOCABULARY, tiny_host
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import CalibrationReport, GravityConfig, calibrate, patch_with_gravity
from gravity_hf.viz.collecting import FigureData, collect


@dataclass(frozen=True)
class Case:
    """`batch`: two rows of 9 and 6 real tokens."""

    host: PreTrainedModel
    model: PreTrainedModel
    batch: dict[str, Tensor]
    report: CalibrationReport


@pytest.fixture(scope="session")
def case() -> Case:
    host = tiny_host("qwen2", num_hidden_layers=2)
    torch.manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": torch.randint(3, VOCABULARY, (2, 9)), "attention_mask": mask}
    model = patch_with_gravity(copy.deepcopy(host), GravityConfig())
    report = calibrate(model, [batch], softness=0.5, progress=False)
    return Case(host, model, batch, report)


@pytest.fixture(scope="session")
def data(case: Case) -> FigureData:
    """With everything: a host, masses that moved, and a training that was logged."""
    moved = copy.deepcopy(case.model)
    with torch.no_grad():
        moved.model.layers[0].self_attn.gravity.mass_log.mul_(1.1)
    losses = [{"step": i, "loss": 3.0 / i, "grad_norm": 1.0 / i} for i in range(1, 6)]
    return collect(
        moved,
        batches=[case.batch],
        host=case.host,
        results={"training": {"lora": {"losses": losses}, "control": {"losses": losses}}},
        calibration=case.report.rows,
        progress=False,
    )
