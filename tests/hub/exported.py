"""Shared by the tests of formats: tiny gravity models in folders, and exact answers to compare."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hosts import logits, tiny_host
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, load_gravity_model, patch_with_gravity

# One layer that every head differs in is all that a format has to carry.
_ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
_SMALL = dict.fromkeys(("qwen2", "bert", "mistral"), _ONE_LAYER)
# A named implementation: what is exported must not depend on it.
SETTINGS = GravityConfig(implementation="chunked")
OTHER_MASSES = 2.0


def host(name: str) -> PreTrainedModel:
    return tiny_host(name, **_SMALL.get(name, {}))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def save_gravity(name: str, folder: Path, softness: float = 0.25) -> Path:
    """The tiny host of that family with calibrated gravity, saved."""
    model = patch_with_gravity(host(name), SETTINGS)
    batch = {"input_ids": tokens(2, 12)}
    if name == "cross attention":
        batch["decoder_input_ids"] = batch["input_ids"]
    if name == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    calibrate(model, [batch], softness=softness, progress=False)
    model.save_pretrained(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their paths in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def left_padded(mask: Tensor) -> Tensor:
    """The mask with the second row's first tokens hidden, where it has any to spare."""
    mask = mask.clone()
    mask[1:2, : mask.shape[1] // 2] = 0
    return mask


def with_positions(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@cache
def _loaded(folder: Path, dtype: torch.dtype, changed: float) -> PreTrainedModel:
    model = load_gravity_model(folder, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gravity.mass_log"):
                parameter += changed
    return model


def exact_and_peer(folder: Path, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits of the torch model in one pass: in float64, and in float32."""
    exact, peer = (_loaded(folder, dtype, 0.0) for dtype in (torch.float64, torch.float32))
    return logits(exact, inputs), logits(peer, inputs)


def with_other_masses(folder: Path, inputs: dict[str, Any]) -> Tensor:
    return logits(_loaded(folder, torch.float32, OTHER_MASSES), inputs)
