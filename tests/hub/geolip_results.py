"""Shared by the tests of geolips in the hub, in figures and in the command line: tiny saved models,
and what was measured of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gravity_hf import GeolipConfig, GeolipForReconstruction, GeolipModel

FEATURES: dict[str, Any] = {"patch_dim": 12, "num_rows": 8, "lens_dim": 12, "hidden_size": 8}
IMAGES: dict[str, Any] = {**FEATURES, "patch_dim": None, "patch_size": 4, "image_size": 8}
VERDICT: dict[str, Any] = {
    **{"recon_cosine": 0.9518, "recon_mse": 0.0931, "tokens": 4321, "n_params": 999, "steps": 60},
    **{"frame_deviation": 0.0043, "frame_deviation_absmax": 0.0612, "frac_in_envelope": 0.9975},
    **{"random_deviation_absmax": 0.0587, "random_frac_in_envelope": 0.9852},
    **{"dev_critical": 0.04, "in_envelope": True, "lens_orthogonality_error": 3.1e-8},
    **{"lens_angle_error": 7.2e-9, "omega_energy_error": 4.1e-6, "mean_alpha": 0.0271},
    **{"alpha_min": 0.0221, "alpha_max": 0.0334, "alpha_init": 0.0238406, "alpha_ratio": 1.1367},
    **{"coordination_gain": 0.0002, "alpha_drift": False, "mechanism": "B"},
}
ENGAGED: dict[str, Any] = {**VERDICT, "coordination_gain": 0.0331, "mechanism": "A"}
DRIFTED: dict[str, Any] = {**VERDICT, "alpha_drift": True}
# As training/geolip writes it; what no card reads is left out.
RECORD: dict[str, Any] = {
    "model_type": "geolip",
    "training": {
        **{"task": "features", "data": "last hidden states of a host on two files", "rows": 90},
        **{"held_out_rows": 10, "steps": 60, "warmup_steps": 30, "schedule": "cosine"},
        **{"optimizer": "Adam, no decay", "batch_size": 16, "learning_rate": 2e-3, "seed": 7},
        **{"denoise": 0.5, "held_out": 0.1, "bf16": False, "preset": "base", "seconds": 1.5},
    },
    "verdict": VERDICT,
    "settings": {"out": "/home/me/runs/geolip", "host": "/home/me/hosts/minilm"},
    "conditions": {
        "command": "python /home/me/scripts/train_geolip.py features --out /home/me/runs/geolip",
        "date": "2026-01-02",
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
    },
}


def geolip(**settings: Any) -> GeolipModel:
    """A new one of features 12 wide, in evaluation."""
    torch.manual_seed(0)
    return GeolipForReconstruction(GeolipConfig(**{**FEATURES, **settings})).eval()


def samples(model: GeolipModel, count: int = 3) -> dict[str, Tensor]:
    """Inputs of a forward pass, of which the last sample has one token less."""
    generator = torch.Generator().manual_seed(1)
    if model.config.patch_size is not None:
        side = model.config.image_size
        drawn = torch.rand(count, model.config.num_channels, side, side, generator=generator)
        return {"pixel_values": 2 * drawn - 1}
    mask = torch.ones(count, 5, dtype=torch.long)
    mask[-1, -1] = 0
    drawn = torch.randn(count, 5, model.config.patch_dim, generator=generator)
    return {"patches": drawn, "attention_mask": mask}


def history(model: GeolipModel, steps: int = 4) -> dict[str, Tensor]:
    """Alphas that rise a little with every step."""
    rise = 1 + 0.1 * torch.arange(steps)[:, None, None]
    return {"steps": 10 * torch.arange(steps), "alphas": rise * model.alphas()}


def trained_folder(folder: Path, **settings: Any) -> Path:
    """What a training leaves: a model with its verdict, inputs to draw, and alphas."""
    model = geolip(**{"verdict": VERDICT, **settings})
    model.save_pretrained(folder)
    save_file(samples(model), folder / "samples.safetensors")
    save_file(history(model), folder / "alphas.safetensors")
    return folder
