"""The masked end of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gravity_hf.integration.sparse_feed_forward import sparse_layers, sparsify_feed_forward
from gravity_hf.training.mask_aware import MaskAwarePhase


class Texts(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 97, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    """The policy that each step was taken under."""

    def __init__(self, model: Any) -> None:
        self.layers, self.policies = sparse_layers(model).values(), []

    def on_step_end(self, *args: Any, **_: Any) -> None:
        self.policies.append({layer.policy for layer in self.layers})


def train(folder: Path, steps: int = 10, resume: str | None = None) -> tuple[Any, Watch]:
    model = sparsify_feed_forward(tiny_host("llama"), block_size=8, sparsity=0.5, gate_rank=4)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=9,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    watch = Watch(model)
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[MaskAwarePhase(), watch])
    trainer.train(resume_from_checkpoint=resume)
    return model, watch


def test_last_fifth_is_masked_and_trains_the_predictors(tmp_path: Path) -> None:
    first = [layer.predictor.up.weight for layer in sparse_layers(train(tmp_path, 1)[0]).values()]
    model, watch = train(tmp_path)
    assert watch.policies == [{"dense"}] * 8 + [{"masked"}] * 2
    assert {layer.policy for layer in sparse_layers(model).values()} == {"dense"}
    # A host's loss has no term for them: what they learned they have from the mask.
    last = [layer.predictor.up.weight for layer in sparse_layers(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_resumed_run_is_in_the_phase_of_its_step(tmp_path: Path) -> None:
    train(tmp_path)
    _, watch = train(tmp_path, resume=str(tmp_path / "checkpoint-9"))
    assert watch.policies == [{"masked"}]


@pytest.mark.parametrize(("share", "steps", "dense"), [(0.2, 10, 8), (0.2, 2, 1), (1.0, 3, 0)])
def test_shortest_run_has_a_masked_step(share: float, steps: int, dense: int) -> None:
    assert MaskAwarePhase(share).first_masked_step(steps) == dense


def test_wrong_shares_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 0 and at most 1, got 0"):
        MaskAwarePhase(0)
    with pytest.raises(ValueError, match="LlamaForCausalLM without any"):
        MaskAwarePhase().on_train_begin(None, None, None, model=tiny_host("llama"))
