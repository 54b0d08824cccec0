"""Published LeanFormer checkpoints as model folders that transformers loads.

python -m gravity_hf.models.leanformer.convert_leanformer checkpoints/best leanformer
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..converting import (
    check_target,
    check_weights,
    load_strictly,
    read_content,
    weights_in,
    write_folder,
)
from .causal_leanformer import LeanFormerForCausalLM
from .published import config_of, is_buffer, our_state

_logger = logging.getLogger(__name__)

# Beside the weights in a published folder; the first that is there is read.
_WEIGHTS = ("pytorch_model.bin", "model.safetensors")
_CONFIG = "leanformer_config.json"
_STATE = "model_state_dict"


def convert_leanformer_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Path:
    """Write a published checkpoint as a folder, whole or not at all.

    `AutoModelForCausalLM` loads it after `import gravity_hf`. The state of the training run is not
    converted.

    Args:
        source: the folder, with `pytorch_model.bin` and `leanformer_config.json`; or a file of
            weights, `.bin`, `.pt` or `.safetensors`, whose config is read from its folder if it is
            there. Code in a file is never run.
        target: a new or empty folder.
        tokenizer: a folder or a name on the Hub: published folders hold none.
        settings: published ones that no config says, as in `convert_reference_state_dict`.

    Raises:
        ValueError: what cannot be converted, or settings that the config contradicts; nothing is
            written then.
    """
    check_target(target)
    file, said = _found(Path(source))
    content = read_content(file)
    if isinstance(content, Mapping) and _STATE in content:
        content = content[_STATE]
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if not is_buffer(str(key))}
    state = weights_in(content, file, _STATE)
    model = convert_reference_state_dict(state, **_agreed(said, settings, file))
    return write_folder(model, target, _tokenizer(tokenizer, model.config.vocab_size))


def convert_reference_state_dict(
    state_dict: Mapping[str, Tensor], **published: Any
) -> LeanFormerForCausalLM:
    """The model of a published state dict, in evaluation; every weight is used.

    It computes what is published, made causal: published code lets the first tokens see later ones.
    All layers are computed, and neurons are masked, as published models do it outside training.

    Args:
        state_dict: published names (`layers.0.attn.q_proj.A`, ...) and float tensors. The buffer
            `causal_mask` is left out.
        published: settings as in `leanformer_config.json`. `n_heads`, `attention_top_k` and
            `ff_sparsity_target` are needed; sizes are only compared; `exit_threshold` and those of
            deltas are not used.

    Raises:
        ValueError: unknown settings, or settings that the weights contradict; missing, unknown or
            misshapen weights.
    """
    state = {key: value for key, value in state_dict.items() if not is_buffer(str(key))}
    check_weights(state)
    config = config_of(state, published)
    named = our_state(state)
    model = LeanFormerForCausalLM(config)
    if model.model.exit_head is None:
        # Of one layer, before the last of which nobody can leave.
        named = {key: x for key, x in named.items() if not key.startswith("model.exit_head.")}
    load_strictly(model, named)
    return model.eval()


def _found(source: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and what the config beside it says."""
    if source.is_dir():
        file = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
        if file is None:
            files = sorted(x.name for x in source.iterdir() if x.suffix in (".pt", ".bin"))
            raise ValueError(
                f"{source}: expected {' or '.join(_WEIGHTS)} in the folder, got "
                f"{files or 'no weights'}. Give the file itself"
            )
    else:
        file = source
    config = file.with_name(_CONFIG)
    return file, _read(config) if config.is_file() else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got what cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file}: expected settings by name, got a {type(said).__name__}")
    return said


def _agreed(said: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    for name, value in given.items():
        if name in said and said[name] != value:
            raise ValueError(
                f"{name}: expected {said[name]!r}, which the config beside {file} says, got "
                f"{value!r}. Leave it out"
            )
    return {**said, **given}


def _tokenizer(
    given: str | os.PathLike[str] | None, vocabulary: int
) -> PreTrainedTokenizerBase | None:
    if given is None:
        _logger.warning("no tokenizer was given: the folder will hold the model alone")
        return None
    tokenizer = AutoTokenizer.from_pretrained(os.fspath(given))
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"tokenizer: expected one of at most {vocabulary} tokens, as the model has, got "
            f"{len(tokenizer)}. They do not belong together"
        )
    return tokenizer


def _given(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {pair!r}. Say --set n_heads=8")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def command(
    source: Annotated[
        Path, typer.Argument(help="Published folder, or a file of weights (.bin, .pt).")
    ],
    target: Annotated[Path, typer.Argument(help="New folder for the model.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of its tokenizer, which published folders lack."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of what no leanformer_config.json says: n_heads=8, "
            "attention_top_k=64, ff_sparsity_target=0.8.",
        ),
    ] = None,
) -> None:
    """Convert a published LeanFormer into a folder that AutoModelForCausalLM loads.

    It computes what the published model computes, made causal: published code lets the first
    tokens of a text see the ones that follow. Example:

        python -m gravity_hf.models.leanformer.convert_leanformer checkpoints/best leanformer \
--tokenizer gpt2
    """
    try:
        folder = convert_leanformer_checkpoint(
            source, target, tokenizer=tokenizer, **_given(setting or [])
        )
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{folder}: written. Load it with AutoModelForCausalLM.from_pretrained after import "
        "gravity_hf. It is causal, which published code is not: measure its loss anew"
    )
    if tokenizer is None:
        typer.echo("It holds no tokenizer: convert again with --tokenizer, or save one into it")


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
