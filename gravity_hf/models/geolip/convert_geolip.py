"""Checkpoint files of geolips as model folders that transformers loads, and folders as such files.

python -m gravity_hf.models.geolip.convert_geolip checkpoints/best_geolip.pt geolip
python -m gravity_hf.models.geolip.convert_geolip geolip for-others.pt
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModel

from ..converting import (
    check_target,
    load_strictly,
    read_content,
    some_of,
    weights_in,
    write_folder,
)
from .lens import check_isometry
from .modeling_geolip import GeolipForReconstruction, GeolipModel
from .published import (
    exported_config,
    is_exported,
    is_two_reconstruction,
    published_settings,
    shapes_of,
    two_reconstruction_config,
    two_reconstruction_state,
)

_logger = logging.getLogger(__name__)

_EXPORTED, _TWO_RECONSTRUCTION = "model_state_dict", "model_state"
# What the layouts hold beside weights; the second part is about the run and is not kept.
_PARTS = {
    _EXPORTED: (("geo_config", "bert_config", "verdict"), ()),
    _TWO_RECONSTRUCTION: (
        ("cfg",),
        ("epoch", "preset", "internal_recovery", "external_recovery"),
    ),
}


def import_pt(
    file: str | os.PathLike[str], *, shell_only: bool = False, **settings: Any
) -> GeolipForReconstruction:
    """The model of a checkpoint file, in evaluation; every weight is used, code is never run.

    Args:
        file: what `export_pt` wrote; or a published two-reconstruction checkpoint, a dict with
            `model_state` and `cfg`; or the state dict of one, in a `.safetensors` file, say.
        shell_only: of a two-reconstruction file whose battery is a whole autoencoder, leave out how
            that decodes by itself: readout, spectral layers and decoder of its own. Everything
            behind the lens computes the same without; but the encoder then learns from it.
        settings: published ones, `n_heads=8`, of what a file without `cfg` does not say: `ps`,
            `channels`, `n_heads`, `max_alpha`, `lens_sign`, `use_spectral`; `img_size`,
            `alpha_init`, `cc_temp` and `seed` where they are known.

    Raises:
        ValueError: another layout, whose names and shapes are listed; unknown, missing or misshapen
            weights; settings that the file contradicts.
    """
    path = Path(file)
    content = read_content(path)
    kind = next((key for key in _PARTS if isinstance(content, Mapping) and key in content), None)
    if kind is None:
        return _two_reconstruction(_bare_state(content, path), settings, path, shell_only)
    known, of_run = _PARTS[kind]
    strange = [str(x) for x in content if x not in (kind, *known, *of_run)]
    if strange:
        _logger.warning("%s: left out, as they are not weights: %s", path, some_of(strange))
    state = weights_in(content[kind], path, kind)
    parts = {name: _part(content, name, path) for name in known}
    if kind == _TWO_RECONSTRUCTION:
        return _two_reconstruction(state, _agreed(parts["cfg"], settings, path), path, shell_only)
    return _exported(state, parts, settings, path)


def export_pt(model: GeolipModel, file: str | os.PathLike[str]) -> Path:
    """Write `{model_state_dict, geo_config, bert_config, verdict}` with `torch.save`.

    Weights have our names, float32; settings published names where there are any. `bert_config` is
    the config's `host_config`. `save_pretrained` is what keeps a model; this is for code that reads
    such files.

    Args:
        model: a `GeolipModel` or a `GeolipForReconstruction`.
        file: a new file.

    Returns:
        The file.

    Raises:
        ValueError: another model, or a file that is there already.
    """
    path = Path(file)
    if not isinstance(model, GeolipModel):
        raise ValueError(
            f"model: expected a GeolipModel, got a {type(model).__name__}. Of a companion, give "
            "its geolip"
        )
    if path.exists():
        raise ValueError(f"{path}: expected a new file, got one that exists. Choose another name")
    state = {key: x.detach().cpu().float().contiguous() for key, x in model.state_dict().items()}
    content = {
        _EXPORTED: state,
        "geo_config": published_settings(model.config),
        "bert_config": model.config.host_config or {},
        "verdict": model.config.verdict or {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    torch.save(content, unfinished)
    unfinished.replace(path)
    return path


def convert_geolip_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    shell_only: bool = False,
    **settings: Any,
) -> Path:
    """Write a checkpoint file as a folder, whole or not at all; `AutoModel` loads it.

    Args:
        source: as `import_pt` reads it.
        target: a new or empty folder.
        shell_only, settings: as in `import_pt`.

    Raises:
        ValueError: as in `import_pt`; nothing is written then.
    """
    check_target(target)
    return write_folder(import_pt(source, shell_only=shell_only, **settings), target)


def _exported(
    state: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    file: Path,
) -> GeolipForReconstruction:
    if not is_exported(state):
        raise _unknown_layout(state, file)
    said = _agreed(parts["geo_config"], settings, file)
    apart = {"host_config": parts["bert_config"], "verdict": parts["verdict"]}
    config = exported_config(said, **{name: dict(x) or None for name, x in apart.items()})
    return _loaded(config, state)


def _two_reconstruction(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], file: Path, shell_only: bool
) -> GeolipForReconstruction:
    if not is_two_reconstruction(state):
        raise _unknown_layout(state, file)
    config = two_reconstruction_config(state, settings)
    return _loaded(config, two_reconstruction_state(state, config, shell_only=shell_only))


def _loaded(config: Any, state: Mapping[str, Tensor]) -> GeolipForReconstruction:
    model = GeolipForReconstruction(config)
    load_strictly(model, state)
    check_isometry(model.lens)
    return model.eval()


def _bare_state(content: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and any(not isinstance(x, Tensor) for x in content.values()):
        found = ", ".join(f"{name} ({type(x).__name__})" for name, x in content.items())
        raise ValueError(
            f"{file}: expected weights under {_EXPORTED!r} or {_TWO_RECONSTRUCTION!r}, or tensors "
            f"alone, got {found}. Save the state dict by itself"
        )
    return weights_in(content, file, _TWO_RECONSTRUCTION)


def _part(content: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    part = content.get(name)
    if part is None:
        part = {}
    if not isinstance(part, Mapping):
        raise ValueError(f"{file}: {name}: expected values by name, got {part!r}")
    return part


def _agreed(said: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    for name, value in given.items():
        if name in said and said[name] != value:
            raise ValueError(
                f"{name}: expected {said[name]!r}, which {file} says, got {value!r}. Leave it out"
            )
    return {**said, **given}


def _unknown_layout(state: Mapping[str, Tensor], file: Path) -> ValueError:
    return ValueError(
        f"{file}: expected weights as export_pt names them (encoder.proj_in.weight, lens.basis, "
        "...), or those of a two-reconstruction model (lens.E, decoder.dec_in.weight, ...) under "
        f"{_TWO_RECONSTRUCTION!r} or alone, got {shapes_of(state, state)}. What these are for is "
        "not known, and nothing is guessed"
    )


def _given(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {pair!r}. Say --set n_heads=8")
        try:
            settings[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def command(
    source: Annotated[Path, typer.Argument(help="Checkpoint file, or a model folder.")],
    target: Annotated[Path, typer.Argument(help="New folder for the model, or new .pt file.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of what a file without cfg does not say, by its published name: ps=2, "
            "channels=3, n_heads=8, max_alpha=0.2, lens_sign=signed, use_spectral=true.",
        ),
    ] = None,
    shell_only: Annotated[
        bool,
        typer.Option(help="Leave out how a whole autoencoder as battery decodes by itself."),
    ] = False,
) -> None:
    """Convert a geolip checkpoint file into a folder, or a folder into such a file.

    The folder loads with AutoModel after `import gravity_hf`, and computes what the published model
    computes. Code in a file is never run. Given a folder, a file is written instead:
    {model_state_dict, geo_config, bert_config, verdict}. Example:

        python -m gravity_hf.models.geolip.convert_geolip best_geolip_svae_v2.pt geolip
    """
    try:
        if source.is_dir():
            written = export_pt(AutoModel.from_pretrained(source), target)
            typer.echo(f"{written}: written. import_pt reads it")
            return
        written = convert_geolip_checkpoint(
            source, target, shell_only=shell_only, **_given(setting or [])
        )
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{written}: written. Load it with AutoModel.from_pretrained after import gravity_hf"
    )


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
