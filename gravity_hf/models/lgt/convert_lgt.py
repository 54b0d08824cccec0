"""Published LGT checkpoints as model folders that transformers load.

python -m gravity_hf.models.lgt.convert_lgt lgt_edge_150k.pt edge-150k
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..converting import (
    check_target,
    check_weights,
    load_strictly,
    plain_config_errors,
    read_published,
    rows_of,
    write_folder,
)
from ..published_lgt import core_sizes, core_state
from .causal_lgt import LGTForCausalLM
from .configuration_lgt import LGT_PRESETS, LGTConfig
from .modeling_lgt import LGTModel, LGTPreTrainedModel

_EMBEDDING, _TIED = "embedding.weight", "head.embedding.weight"


def convert_lgt_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], **settings: Any
) -> Path:
    """Write a published checkpoint as a folder for `from_pretrained`.

    Args:
        source: a state dict or exported `.pt`, read without running code in it, or `.safetensors`.
            float16 is fine; integers and values that are not finite are refused.
        target: a new or empty folder.
        settings: as in `model_from_published`.

    Returns:
        The folder.

    Raises:
        ValueError: what cannot be converted; nothing is written then.
    """
    check_target(target)
    state, metadata = read_published(source)
    return write_folder(model_from_published(state, metadata, **settings), target)


def model_from_published(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    *,
    curvature: float | None = None,
    event_horizon: float = 1e-6,
    max_force: float | None = 50.0,
    dropout: float = 0.1,
    is_causal: bool = False,
    softening: float = 0.0,
) -> LGTPreTrainedModel:
    """The model of a published state dict: `LGTForCausalLM` where there is a head, else `LGTModel`.

    Every weight is used, but `token_mass`, which the published model never reads.

    Args:
        state: published names and float tensors.
        metadata: of the exporter; its preset says the curvature where the argument does not.
        curvature: of the attention heads. The weights do not tell: `curvature_scale` is another
            number.
        event_horizon, max_force, dropout: not in the weights either; the published defaults.
        is_causal: False, as published.
        softening: 0, the published law. Anything else is another model with these weights.

    Raises:
        ValueError: no curvature, a setting outside its range, or weights that are not exactly
            those of such a model.
    """
    check_weights(state)
    sizes = core_sizes(state)
    named = core_state(state)
    vocabulary = rows_of(state, _EMBEDDING)
    embedding, tied = named.pop(_EMBEDDING, None), named.pop(_TIED, None)
    head = {key: named.pop(key) for key in list(named) if key.startswith("head.")}
    if tied is not None and (embedding is None or not torch.equal(tied, embedding)):
        raise ValueError(
            f"{_TIED}: expected the same values as {_EMBEDDING}, as the model shares them, got "
            "others. The checkpoint is damaged, or not of such a model"
        )
    with plain_config_errors():
        config = LGTConfig(
            **sizes,
            vocab_size=vocabulary,
            tie_word_embeddings=tied is not None,
            curvature=_curvature(curvature, metadata or {}),
            event_horizon=event_horizon,
            max_force=max_force,
            dropout=dropout,
            is_causal=is_causal,
            softening=softening,
        )
    if embedding is not None:
        named["embed_tokens.weight"] = embedding
    if tied is None and not head:
        return _filled(LGTModel(config), named)
    named = {f"model.{key}": tensor for key, tensor in named.items()}
    named.update({f"lm_{key}": tensor for key, tensor in head.items()})
    if tied is not None:
        named["lm_head.weight"] = tied
    return _filled(LGTForCausalLM(config), named)


def _filled(model: LGTPreTrainedModel, state: dict[str, Tensor]) -> LGTPreTrainedModel:
    load_strictly(model, state)
    return model.eval()


def _curvature(given: float | None, metadata: Mapping[str, Any]) -> float:
    if given is not None:
        return float(given)
    preset = metadata.get("config")
    if isinstance(preset, str) and preset in LGT_PRESETS:
        return float(LGT_PRESETS[preset]["curvature"])
    got = f"none, and a preset {preset!r} that is not known" if preset else "none"
    raise ValueError(
        f"curvature: expected that of the attention heads, which a checkpoint without the name of "
        f"a preset does not tell, got {got}. Give what the model was built with (published "
        "default: 0.15)"
    )


def command(
    source: Annotated[Path, typer.Argument(help="Published checkpoint: .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="New folder for the model.")],
    curvature: Annotated[
        float | None,
        typer.Option(help="Of the attention heads. Needed unless the file names its preset."),
    ] = None,
    event_horizon: Annotated[float, typer.Option(help="Floor of distances.")] = 1e-6,
    max_force: Annotated[float, typer.Option(help="Ceiling of forces; 0: none.")] = 50.0,
    dropout: Annotated[float, typer.Option(help="For training on.")] = 0.1,
    causal: Annotated[
        bool, typer.Option(help="Let tokens see what stands before them only. Published: no.")
    ] = False,
    softening: Annotated[
        float,
        typer.Option(
            help="Added to distances. 0: the published law, whose attention is the identity. "
            "0.2: attention mixes tokens, but the weights were not made for it: train on."
        ),
    ] = 0.0,
) -> None:
    """Convert a published Lightweight Gravitational Transformer.

    The folder loads with AutoModel and AutoModelForCausalLM after `import gravity_hf`, and computes
    what the published model computes. Example:

        python -m gravity_hf.models.lgt.convert_lgt lgt_edge_150k.pt edge-150k
    """
    try:
        folder = convert_lgt_checkpoint(
            source,
            target,
            curvature=curvature,
            event_horizon=event_horizon,
            max_force=max_force or None,
            dropout=dropout,
            is_causal=causal,
            softening=softening,
        )
    except ValueError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{folder}: written. Load it with AutoModel.from_pretrained after import gravity_hf")


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
