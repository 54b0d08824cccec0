"""Governed training under DDP: both processes decide alike, and as one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.governed_trainer.governed_cases import assert_same, state_of
from training.governed_trainer.two_governed_processes import trained

SCRIPT = Path(__file__).with_name("two_governed_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(place)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_two_processes_train_what_one_does(folder: Path, tmp_path: Path) -> None:
    states = [load_file(folder / f"model-{rank}.safetensors") for rank in (0, 1)]
    assert_same(*states)
    reports = [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]

    model, report = trained(tmp_path)
    assert reports[0]["changes"] and len(reports[0]["changes"]) == len(report["changes"])
    for one, other in zip(reports[0]["changes"], report["changes"], strict=True):
        assert one.pop("ratio") == pytest.approx(other.pop("ratio"), rel=1e-3)
        assert one == other
    for name, tensor in state_of(model).items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_ddp_that_would_wait_for_frozen_groups_is_refused(folder: Path) -> None:
    for rank in (0, 1):
        said = (folder / f"refused-{rank}.txt").read_text()
        assert "expected ddp_find_unused_parameters=True" in said
