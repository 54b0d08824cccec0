"""Tiers follow the model in training, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as processes
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from gravity_hf.runtime import Ledger
from gravity_hf.training.governed.data import (
    RescoringCallback,
    TieredSampler,
    TieredTrainer,
    TierSettings,
    sample_losses,
)
from gravity_hf.training.governed.data.rescoring import _of_the_first_process

SIZE, STEPS = 30, 20
# Around the loss of a model that knows nothing of 32 words.
TIERS = TierSettings(learning=3.4, struggling=3.45, failing=3.5)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.rows = torch.randint(32, (SIZE, 10), generator=draw)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    return LlamaForCausalLM(config)


def trained(
    folder: Path,
    resume: Path | None = None,
    ledger: Ledger | None = None,
    rescoring: bool = True,
) -> tuple[LlamaForCausalLM, TieredSampler]:
    model, sampler, rows = tiny_model(), TieredSampler(size=SIZE, seed=3), Rows()
    callback = RescoringCallback(
        sampler, rows, every=3, fraction=0.4, settings=TIERS, ledger=ledger
    )
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
    )
    trainer = TieredTrainer(model, args, train_dataset=rows, sampler=sampler, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, sampler


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, TieredSampler]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder)


def test_every_sample_is_drawn_in_the_first_epoch_and_scored(whole) -> None:
    _, _, sampler = whole
    coverage = sampler.coverage()
    assert coverage["unique"] == SIZE
    assert (sampler.tiers >= 0).all() and len(set(sampler.tiers.tolist())) > 1
    assert coverage["drawn_unknown"] < coverage["draws"]


@pytest.mark.parametrize("step", [5, 10, 15])
def test_a_resumed_run_is_the_uninterrupted_one(whole, step: int, tmp_path: Path) -> None:
    folder, model, sampler = whole
    again, resumed = trained(tmp_path, folder / f"checkpoint-{step}")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert resumed.state_dict() == sampler.state_dict()


def test_without_rescoring_an_epoch_that_covers_all_is_found_again(tmp_path: Path) -> None:
    model, _ = trained(tmp_path / "a", rescoring=False)
    again, _ = trained(tmp_path / "b", tmp_path / "a" / "checkpoint-10", rescoring=False)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_parts_go_through_the_whole_dataset() -> None:
    callback = RescoringCallback(TieredSampler(size=SIZE), Rows(), fraction=0.2)
    seen = np.concatenate([callback.part(number) for number in range(5)])
    assert sorted(seen.tolist()) == list(range(SIZE))


def test_each_rescoring_is_a_line_with_what_was_covered(tmp_path: Path) -> None:
    ledger = Ledger("agent")
    trained(tmp_path, ledger=ledger)
    lines = [entry.payload for entry in ledger.entries("rescored")]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert {line["scored"] for line in lines} == {12} and lines[-1]["unique"] == SIZE


@pytest.mark.parametrize("wrong", [{"every": 0}, {"fraction": 0.0}, {"dataset": [1]}])
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="RescoringCallback"):
        RescoringCallback(TieredSampler(size=SIZE), **{"dataset": Rows(), **wrong})


def test_a_sampler_of_another_dataset_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="TieredTrainer"):
        TieredTrainer(tiny_model(), args, train_dataset=Rows(), sampler=TieredSampler(size=3))


def _score(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = tiny_model()
    with torch.no_grad():
        # As kernels that add up in another order would, only more.
        model.lm_head.weight.mul_(1 + 10 * rank)
    losses = sample_losses(model, Rows(), range(SIZE)).losses
    np.save(f"{folder}/own{rank}.npy", losses)
    np.save(f"{folder}/shared{rank}.npy", _of_the_first_process(losses, torch.device("cpu")))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_agree_on_tiers(tmp_path: Path) -> None:
    processes.start_processes(_score, (str(tmp_path),), nprocs=2, start_method="fork")
    own = [np.load(tmp_path / f"own{rank}.npy") for rank in range(2)]
    shared = [np.load(tmp_path / f"shared{rank}.npy") for rank in range(2)]
    assert not np.allclose(own[0], own[1])
    assert np.array_equal(shared[0], shared[1])
    np.testing.assert_allclose(shared[0], own[0], rtol=1e-6)
