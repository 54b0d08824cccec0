"""transformers' own Trainer on a patched model: evaluates, saves, resumes, smooths labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.folders import all_differ, byte_decoder, masses
from models.lgt.lgt_cases import tiny
from models.trimodel.tri_cases import tiny_language_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from gravity_hf import load_gravity_model

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(1, 256, (8, 12), generator=torch.Generator().manual_seed(2))
]


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        seed=1,
        **{"save_strategy": "no", **options},
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        data_collator=default_data_collator,
    )


def test_a_run_evaluates_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    model = byte_decoder()
    before = masses(model)
    whole = trainer(model, tmp_path / "whole", eval_steps=3, **steps)
    whole.train()
    assert all_differ(before, masses(model))

    batch = default_data_collator(ROWS[:2])
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert whole.state.log_history[-2]["eval_loss"] == pytest.approx(expected, rel=1e-5)

    resumed = trainer(byte_decoder(), tmp_path / "resumed", eval_steps=3, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed.save_model(str(tmp_path / "out"))
    loaded = load_gravity_model(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("kind", ["patched", "lgt", "tri"])
def test_smoothed_labels_are_shifted_as_for_any_decoder(kind: str, tmp_path: Path) -> None:
    """Once a class that transformers does not list by name was smoothed against labels that were
    not shifted: each token learned to predict itself."""
    batch, beside = default_data_collator(ROWS[:2]), {}
    if kind == "patched":
        model = byte_decoder()
    elif kind == "lgt":
        model = tiny(vocab_size=256)
    else:
        model = tiny_language_model(vocab_size=256)
        beside = {f"{name}_input_ids": batch["input_ids"][:, :3] for name in ("self", "env")}
    batch |= beside
    smoothing = trainer(model, tmp_path, label_smoothing_factor=0.1)
    got = smoothing.compute_loss(model, dict(batch)).item()
    with torch.no_grad():
        predicted = model(input_ids=batch["input_ids"], **beside).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(
        predicted, batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    assert got == pytest.approx(wanted.item(), rel=1e-5)
