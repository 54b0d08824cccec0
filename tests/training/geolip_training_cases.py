"""The smallest geolips that can be trained, and what they are trained on."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
from gravity_hf.training.geolip.trainer import GeolipTrainer

WIDTH = 6


def small_geolip(**settings):
    torch.manual_seed(0)
    sizes = {"patch_dim": WIDTH, "num_rows": 4, "lens_dim": 4, "hidden_size": 8}
    return GeolipForReconstruction(
        GeolipConfig(**{**sizes, "num_attention_heads": 2, "num_spectral_layers": 1, **settings})
    )


def ragged_rows(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"patches": torch.randn(2 + i % 4, WIDTH, generator=generator)} for i in range(count)]


def small_trainer(folder, *, model=None, steps=6, callbacks=(), denoise=0.0, **arguments):
    values = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 2,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return GeolipTrainer(
        model=small_geolip() if model is None else model,
        args=TrainingArguments(str(folder), **{**values, **arguments}),
        train_dataset=ragged_rows(),
        eval_dataset=ragged_rows(7, seed=1),
        denoise=denoise,
        callbacks=list(callbacks),
    )
