"""Converts a published tri-model checkpoint into a folder for `from_pretrained`.

python -m gravity_hf.models.trimodel.convert_trimodel tri.pt tri-model
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ...layers.fusion import STREAMS
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
from .configuration_trimodel import DEFAULT_STREAMS, TriModelConfig
from .modeling_trimodel import TriModel

# Sizes of the parts that the published class builds alike.
_MUST_AGREE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("dim_position", "ff_expansion", "position_type"),
)


def convert_trimodel_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    target: str | os.PathLike[str],
    *,
    curvature: Mapping[str, float] | None = None,
    event_horizon: float = 1e-6,
    max_force: float | None = 50.0,
    dropout: float = 0.1,
) -> Path:
    """Write a published tri-model as a folder that `AutoModel.from_pretrained` loads.

    The result computes what the published code computes: `softening=0.0`, zero-padding attended to
    (`mask_padding=False`), the fusion's gate unused. `token_mass`, which is never read, is left
    out; every other weight must be there, and no other.

    Args:
        source: a file for `read_published`, or a state dict of `TriModelTransformer`.
        target: new or empty folder.
        curvature: of the attention of `"world"`, `"self"`, `"env"`. No checkpoint stores it; what
            is left out is what the published class always has: 0.25, 0.15, 0.10.
        event_horizon, max_force, dropout: not stored either; published defaults.

    Returns:
        The folder.

    Raises:
        ValueError: the checkpoint is no tri-model, or does not fit, or a setting is outside its
            range; nothing is written then.
    """
    folder = check_target(target)
    state = dict(source) if isinstance(source, Mapping) else read_published(source)[0]
    check_weights(state)
    config = _config(
        state,
        _streams(curvature),
        event_horizon=event_horizon,
        max_force=max_force,
        dropout=dropout,
    )
    model = TriModel(config).eval()
    load_strictly(model, _renamed(state))
    return write_folder(model, folder)


def _config(
    state: Mapping[str, Tensor], streams: dict[str, dict[str, float]], **given: Any
) -> TriModelConfig:
    sizes = {name: core_sizes(state, f"{name}_model.") for name in STREAMS}
    first = sizes["world"]
    for name in STREAMS:
        wrong = [key for key in _MUST_AGREE if sizes[name][key] != first[key]]
        if wrong:
            raise ValueError(
                f"checkpoint: expected {wrong[0]} {first[wrong[0]]} in {name}_model, that of "
                f"world_model, got {sizes[name][wrong[0]]}. It is no published tri-model"
            )
    output, vocabulary = rows_of(state, "output_proj.weight"), rows_of(state, "embedding.weight")
    if output is None:
        raise ValueError(
            "checkpoint: expected output_proj.weight, got none. It is no published tri-model"
        )
    with plain_config_errors():
        return TriModelConfig(
            **first,
            **given,
            streams=streams,
            vocab_size=vocabulary,
            output_dim=output,
            softening=0.0,
            mask_padding=False,
        )


def _streams(curvature: Mapping[str, float] | None) -> dict[str, dict[str, float]]:
    given = dict(curvature or {})
    unknown = sorted(set(given) - set(STREAMS))
    if unknown:
        raise ValueError(f"curvature: expected only {list(STREAMS)}, got {unknown}")
    return {
        name: {"curvature": given.get(name, DEFAULT_STREAMS[name]["curvature"])} for name in STREAMS
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under `TriModel`'s names; unknown ones are kept, for the strict load to name."""
    prefixes = tuple(f"{name}_model." for name in STREAMS)
    renamed = {key: x for key, x in state.items() if not key.startswith(prefixes)}
    if "embedding.weight" in renamed:
        renamed["embed_tokens.weight"] = renamed.pop("embedding.weight")
    for prefix in prefixes:
        core = core_state(state, prefix)
        renamed |= {f"{prefix}{key}": tensor for key, tensor in core.items()}
    return renamed


def command(
    source: Annotated[Path, typer.Argument(help="Published checkpoint: .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="New folder for the model.")],
    world_curvature: Annotated[float, typer.Option(help="Of the world's attention.")] = 0.25,
    self_curvature: Annotated[float, typer.Option(help="Of the self's attention.")] = 0.15,
    env_curvature: Annotated[float, typer.Option(help="Of the environment's attention.")] = 0.10,
    event_horizon: Annotated[float, typer.Option(help="Floor of distances.")] = 1e-6,
    max_force: Annotated[float, typer.Option(help="Ceiling of forces; 0: none.")] = 50.0,
    dropout: Annotated[float, typer.Option(help="For training on.")] = 0.1,
) -> None:
    """Convert a published tri-model.

    The folder loads with AutoModel after `import gravity_hf`, and computes what the published model
    computes. Sizes come from the weights; what weights do not say has the published value unless it
    is given. Code in the file is never run. Example:

        python -m gravity_hf.models.trimodel.convert_trimodel tri.pt tri-model --world-curvature 0.3
    """
    curvature = {"world": world_curvature, "self": self_curvature, "env": env_curvature}
    try:
        folder = convert_trimodel_checkpoint(
            source,
            target,
            curvature=curvature,
            event_horizon=event_horizon,
            max_force=max_force or None,
            dropout=dropout,
        )
    except ValueError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{folder}: written. Load it with AutoModel.from_pretrained after import gravity_hf")


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
