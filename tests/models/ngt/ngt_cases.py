"""Tiny NGTs whose attention matters, padded inputs, and published models with their outputs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM, NGTPreTrainedModel

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "ngt"
VOCABULARY = 50
IDS = torch.arange(18).reshape(2, 9) * 7 % 47 + 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "coord_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Every option that changes what a token sees or how strongly; the first word is the preset.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("v2", {}),
    "reference": ("reference", {}),
    "fixed": ("fixed", {}),
    "mass_in_value": ("reference", {"mass_in_value": True}),
    "soft": ("reference", {"cutoff": "soft"}),
    "hard": ("v2", {"cutoff": "hard"}),
    "log": ("v2", {"cutoff": "log"}),
    "attractive": ("fixed", {"repulsive": False, "softening": 0.5, "cutoff": "none"}),
    "massless": ("v2", {"token_masses": False}),
    "self_kept": ("v2", {"exclude_self": False}),
    "asymmetric": ("v2", {"shared_start": False}),
    "symmetric": ("v2", {"asymmetric": False, "hidden_head_coordinates": False}),
    "unfading": ("v2", {"mass_fading": 0.0}),
    "half_fading": ("v2", {"mass_fading": 0.5}),
    "anchored": ("v2", {"anchor_coordinates": True, "coordinate_source": "hidden"}),
    "pre_attention": ("v2", {"coordinate_source": "pre_attention"}),
    "still": ("v2", {"coordinate_source": "none", "content_coordinates": False}),
    "learned": ("v2", {"coordinate_positions": "learned"}),
}


def tiny(
    model_class: type = NGTForCausalLM, preset: str = "v2", **settings: Any
) -> NGTPreTrainedModel:
    """In evaluation; larger embeddings than a new model's, so that tokens matter."""
    torch.manual_seed(0)
    config = NGTConfig.from_preset(preset, **{"initializer_range": 0.5, **SMALL, **settings})
    return model_class(config).eval()


def option(name: str, model_class: type = NGTForCausalLM, **settings: Any) -> NGTPreTrainedModel:
    """The tiny model of an entry of `OPTIONS`."""
    preset, own = OPTIONS[name]
    return tiny(model_class, preset, **{**own, **settings})


def padded(side: str, count: int = 3) -> dict[str, Tensor]:
    """`IDS` with padding on a side, and the mask; keyword arguments of a model."""
    pads = torch.zeros(2, count, dtype=torch.long)
    parts, seen = [IDS, pads], [torch.ones_like(IDS), pads]
    if side == "left":
        parts, seen = parts[::-1], seen[::-1]
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(seen, 1)}


class Published(NamedTuple):
    """A published model: constructor arguments, weights by our names, and tensors by published
    ones, of which some hold only a few rows of all (see `ROWS`)."""

    kwargs: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]
    parameters: int


# The rows of the outputs that the file holds.
ROWS: dict[str, tuple[Any, ...]] = {
    "logits_causal": (1, slice(8, None)),
    "logits_nomask": (0, slice(None, 4)),
    "logits_long": (0, slice(-4, None)),
    "z_last": (1,),
    "mass": (1,),
    "layer": (0, slice(-3, None)),
}


def our_name(name: str) -> str:
    """Of a parameter of a published model."""
    pairs = {
        "attn.coord_proj_next": "coord_proj_next",
        "coord_proj_attn": "coord_proj",
        "attn.gamma": "attn.gravity.gamma",
        "gravity_bias": "gravity.bias",
        "radius_param": "gravity.radius",
        "ffn.net.0": "fc1",
        "ffn.net.3": "fc2",
    }
    for theirs, ours in pairs.items():
        name = name.replace(theirs, ours)
    return f"lm_{name}" if name.startswith("head.") else f"model.{name}"


def per_head(name: str, value: Tensor) -> Tensor:
    """Published `[1, H, 1, 1]` as `[H]`."""
    return value.flatten() if name.endswith(("gamma", "gravity_bias")) else value


@functools.cache
def _file() -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = json.loads((GOLDEN / "models.json").read_text(encoding="utf-8"))
    return load_file(GOLDEN / "models.safetensors"), facts


CASES = list(_file()[1])


@functools.cache
def published(case: str) -> Published:
    every, facts = _file()
    own = {k.removeprefix(f"{case}/"): x for k, x in every.items() if k.startswith(f"{case}/")}
    state = {k.removeprefix("state."): x for k, x in own.items() if k.startswith("state.")}
    weights = {our_name(k): per_head(k, x) for k, x in state.items()}
    weights["lm_head.weight"] = weights["model.token_emb.weight"]
    if facts[case]["kwargs"].get("use_radius_cutoff") is False:
        weights = {k: x for k, x in weights.items() if not k.endswith("radius")}
    tensors = {k: x for k, x in own.items() if not k.startswith("state.")}
    for name in ("ids", "long_ids"):
        tensors[name] = tensors[name].long()
    return Published(facts[case]["kwargs"], weights, tensors, facts[case]["parameters"])


def published_model(case: str, **settings: Any) -> NGTForCausalLM:
    """Its weights in our model, in evaluation."""
    known = published(case)
    given = dict(known.kwargs)
    cut, soft = given.pop("use_radius_cutoff", True), given.pop("use_soft_cutoff", False)
    if case == "vanilla":
        given["attention"] = "dot_product"
    else:
        given["cutoff"] = ("soft" if soft else "hard") if cut else "none"
    model = NGTForCausalLM(NGTConfig.from_preset("reference", **given, **settings))
    model.load_state_dict(known.state)
    return model.eval()
