"""Calibrated tiny students, their inputs and trainers, for the tests of transfer."""

from __future__ import annotations

import torch
from hosts import tiny_host, tiny_inputs
from transformers import TrainingArguments

from gravity_hf import calibrate, gravity_lora, patch_with_gravity
from gravity_hf.training.transfer import TransferSettings, TransferTrainer

LAYERWISE = TransferSettings(mode="layerwise")
END_TO_END = TransferSettings()


def calibrated(family="qwen2", softness=1.0, **overrides):
    model = patch_with_gravity(tiny_host(family, **overrides))
    calibrate(model, [tiny_inputs(family)], softness=softness, progress=False)
    return model


def padded_inputs(family="qwen2", side="right"):
    inputs = tiny_inputs(family, batch=4)
    hidden = slice(7, None) if side == "right" else slice(None, 4)
    inputs["attention_mask"][1, hidden] = 0
    inputs["attention_mask"][3, hidden] = 0
    return inputs


class Examples(torch.utils.data.Dataset):
    """Sixteen sequences of unequal length, padded to eleven."""

    def __init__(self, family="qwen2", labels=True):
        self.rows = []
        for seed in range(16):
            ids = tiny_inputs(family, batch=1, seed=seed)["input_ids"][0]
            mask = torch.arange(len(ids)) < 6 + seed % 6
            row = {"input_ids": ids, "attention_mask": mask.long()}
            self.rows.append({**row, "labels": ids.masked_fill(~mask, -100)} if labels else row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer_of(model, folder, settings, *, data=None, **options):
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    data = Examples() if data is None else data
    return TransferTrainer(
        model=model, args=TrainingArguments(folder, **arguments), train_dataset=data,
        eval_dataset=data, transfer=settings,
    )  # fmt: skip


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def moved_lora(family="qwen2", **options):
    model = gravity_lora(calibrated(family), r=2, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
            elif "modules_to_save" in name:
                parameter.mul_(1.1)
    return model
