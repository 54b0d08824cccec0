"""Resuming: a checkpoint that was cut off is none, and training goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from torch import Tensor

from gravity_hf import GravityTrainer, calibrate, gravity_lora, patch_with_gravity
from gravity_hf.training.recipe import (
    TrainingOptions,
    arguments_of,
    checkpoints_of,
    is_whole_checkpoint,
    last_whole_checkpoint,
    train_resumably,
)

STEPS = 6


class Windows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tiny_inputs("qwen2", batch=1, seed=index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder: Path, **changes: Any) -> GravityTrainer:
    model = patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")])
    torch.manual_seed(0)
    # Dropout, so that a resumed run must have the random numbers of the other.
    model = gravity_lora(model, r=2, dropout=0.3)
    options = TrainingOptions(batch_size=2, save_steps=2, logging_steps=1, **changes)
    arguments = arguments_of(options, folder, steps=STEPS, learning_rate=1e-2, use_cpu=True)
    return GravityTrainer(model=model, args=arguments, train_dataset=Windows())


def trained(trainer: GravityTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[Any], dict[str, Tensor]]:
    """The last two checkpoints, the losses and the weights of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = make_trainer(folder)
    losses = train_resumably(trainer)
    return folder, losses, trained(trainer)


def test_every_loss_is_reported_from_the_first_step(whole_run: Any) -> None:
    _, losses, _ = whole_run
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("damage", ["none", "optimizer.pt", "trainer_state.json", "half a folder"])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_did(
    damage: str, whole_run: Any, tmp_path: Path
) -> None:
    folder, losses, weights = whole_run
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    # Stopped after step 4, or while the checkpoint of step 6 was written.
    last = run / f"checkpoint-{STEPS}"
    if damage == "none":
        shutil.rmtree(last)
    elif damage == "half a folder":
        for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
            (last / name).unlink()
    else:
        cut(last / damage)
    assert last_whole_checkpoint(run) == run / "checkpoint-4"
    trainer = make_trainer(run)
    assert train_resumably(trainer) == losses
    resumed = trained(trainer)
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def cut(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(max(1, file.stat().st_size * 2 // 3))


NEEDED = (
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json"),
)


@pytest.mark.parametrize("how", ["cut", "missing"])
@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_with_a_broken_file_is_not_whole(
    name: str, how: str, whole_run: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert is_whole_checkpoint(folder)
    if how == "cut":
        cut(folder / name)
    else:
        (folder / name).unlink()
    assert not is_whole_checkpoint(folder)


def test_every_process_must_have_left_its_random_numbers(whole_run: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole_run[0] / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert not is_whole_checkpoint(folder, processes=2)
    for rank in range(2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    assert is_whole_checkpoint(folder, processes=2)
    assert not is_whole_checkpoint(folder, processes=3)


def test_checkpoints_of_another_number_of_processes_are_refused_not_deleted(
    whole_run: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (4, 6):
        shutil.copytree(whole_run[0] / f"checkpoint-{step}", run / f"checkpoint-{step}")
    last = run / "checkpoint-6"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    with pytest.raises(ValueError, match=r"checkpoint-6: expected .* 1 process.*one of 2"):
        train_resumably(make_trainer(run))
    assert is_whole_checkpoint(last, processes=2)


def test_checkpoints_are_ordered_by_step_and_nothing_else_is_one(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "runs"):
        (tmp_path / name).mkdir()
    assert [c.name for c in checkpoints_of(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"warmup": 1.0}, {"save_steps": 5, "logging_steps": 2}]
)
def test_options_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        TrainingOptions(**wrong).check()
