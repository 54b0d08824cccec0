"""Models to watch, and what their forces are, computed once more in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM

LENGTH = 9
VOCABULARY = 40


def tiny_lgt(**settings: Any) -> LGTForCausalLM:
    """Two layers, positions and masses far enough apart for forces to differ."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "dim_position": 4,
        "max_position_embeddings": 24,
    }
    torch.manual_seed(0)
    model = LGTForCausalLM(LGTConfig(**{**sizes, **settings})).eval()
    with torch.no_grad():
        model.model.pos_embedding.positions.normal_(std=0.3)
        for layer in model.model.layers:
            layer.attn.gravity.mass_proj.weight.normal_(std=0.8)
            layer.attn.out_proj.weight.normal_(std=0.3)
    return model


def tiny_tri() -> Any:
    """A tri-model of continuous streams."""
    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "dim_position": 4, "max_position_embeddings": 24}
    config = AutoConfig.for_model("lgt_tri", hidden_size=16, num_hidden_layers=1, **settings)
    return AutoModel.from_config(config).eval()


def token_ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def lgt_forces(model: LGTForCausalLM, ids: Tensor, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(forces before the cap `[B, H, T, T]`, masses `[B, H, T]`) of each layer, from the weights:
    `|G| m_i m_j / (max(s (1 + kappa cos sqrt(s + eps)), eps) + softening)`."""
    config = model.config
    places = inputs.get("position_ids", torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, **inputs)
        positions = model.model.pos_embedding(places).double() * config.length_unit
    s = (positions[:, :, None] - positions[:, None]).square().sum(-1)
    eps, kappa = config.event_horizon, config.curvature
    distance = (s * (1 + kappa * (s + eps).sqrt().cos())).clamp(min=eps) + config.softening
    found = []
    for layer, hidden in zip(model.model.layers, output.hidden_states, strict=False):
        gravity = layer.attn.gravity
        heads = hidden.double().unflatten(-1, (gravity.heads, gravity.width))
        weight = gravity.mass_proj.weight.detach().double()
        mass = torch.nn.functional.softplus(torch.einsum("bthw,hw->bht", heads, weight))
        strength = gravity.G.detach().double().abs()[:, None, None]
        found.append((strength * mass[..., None] * mass[:, :, None] / distance[:, None], mass))
    return found


def entropy_of(weights: Tensor, live: Tensor | None = None) -> Tensor:
    """`[H]`, in nats, mean over the rows of `weights` `[B, H, Tq, Tk]`; `live` bool `[B, Tq]`."""
    per_row = torch.special.entr(weights.double()).sum(-1)
    if live is None:
        return per_row.mean((0, 2))
    return torch.stack([head[live].mean() for head in per_row.unbind(1)])


def causal(length: int) -> Tensor:
    """Bool `[T, T]`."""
    return torch.ones(length, length, dtype=torch.bool).tril()
