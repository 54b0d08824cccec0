"""NGT models as checkpoints that published code reads."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..converting import some_of
from .causal_ngt import NGTForCausalLM
from .configuration_ngt import NGTConfig
from .modeling_ngt import MASS_OF_ONE
from .published import EMBEDDING, HEAD, published_settings, published_state
from .published_tokenizers import state_of

# What published code computes; it has no names for anything else.
_OF_BOTH: dict[str, tuple[Any, ...]] = {"layer_norm_eps": (1e-5,), "tie_word_embeddings": (True,)}
_OF_NGT: dict[str, tuple[Any, ...]] = {
    "law": ("force",),
    "repulsive": (True,),
    "softening": (1e-6,),
    "learn_softening": (False,),
    "exclude_self": (False,),
    "head_coord_dim": (16,),
    "coordinate_positions": ("learned", "learned_sinusoidal"),
    "content_coordinates": (False,),
    "anchor_coordinates": (False,),
    "hidden_head_coordinates": (False,),
    "asymmetric": (False,),
    "coordinate_source": ("attention",),
    "cutoff": ("none", "hard", "soft"),
}
_OF_TWIN: dict[str, tuple[Any, ...]] = {"positions": ("learned",)}


def write_reference_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | os.PathLike[str],
    *,
    steps: int = 0,
    best_val: float = math.inf,
    dataset: str = "shakespeare",
    seed: int | None = None,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 3e-4,
) -> Path:
    """Write a model as published training does, so that published code loads and continues it.

    Weights that the published layout has and the model has not are filled in so that nothing is
    computed otherwise: biases and the last layer's motion with 0, absent masses with 1. The
    optimizer's state is that of a new AdamW. Where the model refuses inputs beyond
    `max_position_embeddings`, published code reads their end.

    Args:
        model: an `NGTForCausalLM` by the published law (presets `"reference"` and `"fixed"`), or a
            twin with learned positions, which is written as the published vanilla transformer.
        tokenizer: any fast one; see `gravity_hf.models.ngt.published_tokenizers.state_of`.
        file: a new file. Published code looks for names that end in `_best.pt` or `_last.pt`.
        steps, best_val, dataset, seed, gradient_accumulation_steps, learning_rate: what the file
            says about the training run.

    Returns:
        The file.

    Raises:
        ValueError: what the published layout cannot say, all reasons at once, or a file that is
            there already; nothing is written then.
    """
    path = Path(file)
    if path.exists():
        raise ValueError(f"{path}: expected a new file, got one that exists. Choose another name")
    check_expressible(model)
    config = model.config
    vocabulary = state_of(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most {config.vocab_size} tokens, as the model has, got "
            f"{len(tokenizer)}. They do not belong together"
        )
    state = _laid_out(model)
    weights = [x for key, x in state.items() if key != HEAD]
    run = {
        "dataset": dataset,
        "seed": seed,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    content = {
        "model_state": state,
        "optimizer_state": torch.optim.AdamW(weights, lr=learning_rate).state_dict(),
        "iter": steps,
        "best_val": float(best_val),
        "config": {**published_settings(config), **run},
        "vocab": vocabulary,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    torch.save(content, unfinished)
    unfinished.replace(path)
    return path


def check_expressible(model: PreTrainedModel) -> None:
    """Refuse a model that published code would compute otherwise.

    Raises:
        ValueError: every setting that it has no words for.
    """
    if not isinstance(model, NGTForCausalLM):
        raise ValueError(
            f"model: expected an NGTForCausalLM, the one model with a published layout of this "
            f"kind, got a {type(model).__name__}"
        )
    config = model.config
    known = {**_OF_BOTH, **(_OF_TWIN if config.is_twin else _OF_NGT)}
    reasons = [
        f"{name} {' or '.join(map(repr, allowed))}, not {getattr(config, name)!r}"
        for name, allowed in known.items()
        if getattr(config, name) not in allowed
    ]
    if reasons:
        raise ValueError(
            f"model: expected one that the published layout can hold, got another: it holds only "
            f"{'; '.join(reasons)}. Keep it as a folder; no published file says what it computes"
        )


def _laid_out(model: NGTForCausalLM) -> dict[str, Tensor]:
    """Every weight of the published layout, float32, in its order."""
    own = published_state(
        {key: x.detach().cpu().float().contiguous() for key, x in model.state_dict().items()}
    )
    filled: dict[str, Tensor] = {}
    for key, shape in _layout(model.config).items():
        filled[key] = own.pop(key) if key in own else _absent(key, shape, model.config)
        if tuple(filled[key].shape) != shape:
            got = tuple(filled[key].shape)
            raise ValueError(f"model: {key}: expected the shape {shape}, got {got}")
    if own:
        raise ValueError(
            f"model: expected the weights of an NGTForCausalLM alone, got {some_of(own)} as well. "
            "Merge adapters, and undo quantisation, first"
        )
    filled[HEAD] = filled[EMBEDDING]
    return filled


def _absent(key: str, shape: tuple[int, ...], config: NGTConfig) -> Tensor:
    """What changes nothing in the place of a weight that the model has not."""
    part = key.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    if key == "mass_emb.weight":
        return torch.full(shape, MASS_OF_ONE)
    if key.endswith("radius_param"):
        return torch.full(shape, float(config.initial_radius))
    if key.endswith("coord_norm.weight"):
        return torch.ones(shape)
    if key.endswith(("gravity_bias", "coord_norm.bias", "head.bias")) or part == "coord_proj_next":
        return torch.zeros(shape)
    raise ValueError(f"model: expected the weight {key}, got a model without it")


def _layout(config: NGTConfig) -> dict[str, tuple[int, ...]]:
    """Published names in their order, and shapes."""
    vocabulary, width, inner = config.vocab_size, config.hidden_size, config.intermediate_size
    places, heads, coords = (
        config.max_position_embeddings,
        config.num_attention_heads,
        config.coord_dim,
    )
    layout: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, width)}

    def linear(name: str, out: int, read: int) -> None:
        layout.update({f"{name}.weight": (out, read), f"{name}.bias": (out,)})

    def norm(name: str, size: int) -> None:
        layout.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    if config.is_twin:
        layout["pos_emb.weight"] = (places, width)
    else:
        layout.update({"mass_emb.weight": (vocabulary, 1), "coord_emb.weight": (places, coords)})
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        attn = f"{layer}.attn"
        if config.is_twin:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{attn}.{name}", width, width)
        else:
            layout.update({f"{attn}.{x}": (1, heads, 1, 1) for x in ("gamma", "gravity_bias")})
            layout[f"{attn}.radius_param"] = ()
            linear(f"{attn}.v_proj", width, width)
            linear(f"{attn}.coord_proj_attn", heads * config.head_coord_dim, coords)
            linear(f"{attn}.coord_proj_next", coords, width)
            linear(f"{attn}.out_proj", width, width)
        linear(f"{layer}.ffn.net.0", inner, width)
        linear(f"{layer}.ffn.net.3", width, inner)
        norm(f"{layer}.norm1", width)
        norm(f"{layer}.norm2", width)
        if not config.is_twin:
            norm(f"{layer}.coord_norm", coords)
    norm("norm", width)
    linear("head", vocabulary, width)
    return layout
