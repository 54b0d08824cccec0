"""Published NGT checkpoints as model folders that transformers load, and model folders as such.

python -m gravity_hf.models.ngt.convert_ngt checkpoints/shakespeare.pt_best.pt ngt-shakespeare
python -m gravity_hf.models.ngt.convert_ngt ngt-shakespeare for-published-code.pt
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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..converting import (
    check_target,
    check_weights,
    load_strictly,
    read_content,
    weights_in,
    write_folder,
)
from .causal_ngt import NGTForCausalLM
from .configuration_ngt import NGTConfig
from .modeling_ngt import MASS_OF_ONE
from .published import EMBEDDING, HEAD, config_of, kind_of, our_state
from .published_tokenizers import gpt2_tokenizer, kind_of_tokenizer, tokenizer_of
from .published_writer import write_reference_checkpoint

_logger = logging.getLogger(__name__)

_STATE = "model_state"
_OF_BIAS, _OF_MASS = ".attn.gravity_bias", "mass_emb.weight"


def convert_ngt_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Path:
    """Write a published checkpoint, `*_best.pt`, `*_last.pt` or an older one, as a folder.

    `AutoModelForCausalLM` and `AutoTokenizer` load it after `import gravity_hf`. The optimizer's
    state is not converted.

    Args:
        source: the file, read without running code in it; of a published NGT, or of the vanilla
            transformer published beside it. A bare state dict will do, too.
        target: a new or empty folder.
        tokenizer: a folder or a name on the Hub, for a checkpoint that does not hold its tokenizer:
            a bare state dict, or one made with tiktoken. GPT-2's is looked for by itself.
        settings: as in `convert_reference_state_dict`, where the file does not say them.

    Returns:
        The folder. Where no tokenizer can be had it holds the model alone, and a warning says so.

    Raises:
        ValueError: what cannot be converted, or settings that the file contradicts; nothing is
            written then.
    """
    check_target(target)
    file = Path(source)
    if not file.is_file():
        _name_others(file)
    content = read_content(file)
    said: Any = {}
    vocabulary = None
    if isinstance(content, Mapping) and _STATE in content:
        said, vocabulary = content.get("config") or {}, content.get("vocab")
        content = content[_STATE]
    if not isinstance(said, Mapping):
        raise ValueError(f"{file}: config: expected settings by name, got {said!r}")
    state = weights_in(content, file, _STATE)
    model = convert_reference_state_dict(state, **_agreed(said, settings, file))
    text = _tokenizer(vocabulary, tokenizer, file)
    if text is not None and len(text) > model.config.vocab_size:
        raise ValueError(
            f"{file}: expected a tokenizer of at most {model.config.vocab_size} tokens, as the "
            f"model has, got {len(text)}. They do not belong together"
        )
    return write_folder(model, target, text)


def convert_reference_state_dict(
    state_dict: Mapping[str, Tensor], **published: Any
) -> NGTForCausalLM:
    """The model of a published state dict, in evaluation; every weight is used.

    Sizes are read from the weights. What older files lack is filled in as published: without masses
    all of them are 1, without biases they are 0. A file without biases whose head is not tied to
    the embedding is of the first published version, and loads as such: untied, and coordinates
    moved by what attention reads (`coordinate_source="pre_attention"`). That version differed in
    roundings, too, which are not reproduced.

    Args:
        state_dict: published names and float tensors, of an NGT or of the vanilla transformer
            published beside it.
        published: arguments of the published class and entries of a published checkpoint's
            `config`: `use_radius_cutoff`, True unless given; `use_soft_cutoff`, `use_rsqrt`,
            `mass_in_value`, False unless given; `dropout`, 0.1 unless given; `num_heads`, needed
            for a vanilla transformer. Sizes are only compared.

    Raises:
        ValueError: unknown settings, or settings that the weights contradict; missing, unknown or
            misshapen weights.
    """
    check_weights(state_dict)
    state = dict(state_dict)
    config = config_of(state, published, **_version(state))
    if not config.is_twin:
        _refuse_square_motion(state, config)
        _complete(state, config)
    model = NGTForCausalLM(config)
    load_strictly(model, our_state(state, config))
    return model.eval()


def _version(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights say about the version of the code, as settings of `NGTConfig`."""
    if HEAD not in state or EMBEDDING not in state or torch.equal(state[HEAD], state[EMBEDDING]):
        return {}
    if kind_of(state) == "ngt" and not _has_bias(state):
        return {"tie_word_embeddings": False, "coordinate_source": "pre_attention"}
    raise ValueError(
        f"{HEAD}: expected the same values as {EMBEDDING}, as published models of this kind share "
        "them, got others. The checkpoint is damaged, or not of such a model"
    )


def _complete(state: dict[str, Tensor], config: NGTConfig) -> None:
    """Fill in what older files lack."""
    heads, dtype = config.num_attention_heads, state[EMBEDDING].dtype
    if not _has_bias(state):
        for index in range(config.num_hidden_layers):
            state[f"layers.{index}{_OF_BIAS}"] = torch.zeros(1, heads, 1, 1, dtype=dtype)
    if _OF_MASS not in state:
        state[_OF_MASS] = torch.full((config.vocab_size, 1), MASS_OF_ONE, dtype=dtype)


def _has_bias(state: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(_OF_BIAS) for key in state)


def _refuse_square_motion(state: Mapping[str, Tensor], config: NGTConfig) -> None:
    width, hidden = config.coord_dim, config.hidden_size
    for index in range(config.num_hidden_layers):
        name = f"layers.{index}.attn.coord_proj_next.weight"
        if width != hidden and name in state and state[name].shape == (width, width):
            raise ValueError(
                f"{name}: expected [{width}, {hidden}], a map from the hidden state to "
                f"coordinates, got [{width}, {width}]. Published code loads such a file as a "
                "legacy one but fails when it is run: what the map was meant to read is not known"
            )


def _agreed(said: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> dict[str, Any]:
    for name, value in given.items():
        if name in said and said[name] != value:
            raise ValueError(
                f"{name}: expected {said[name]!r}, which {file} says, got {value!r}. Leave it out"
            )
    return {**said, **given}


def _tokenizer(
    vocabulary: Any, given: str | os.PathLike[str] | None, file: Path
) -> PreTrainedTokenizerBase | None:
    if vocabulary is None:
        if given is not None:
            return AutoTokenizer.from_pretrained(os.fspath(given))
        _logger.warning("%s holds no tokenizer: the folder will hold the model alone", file)
        return None
    if not isinstance(vocabulary, Mapping) or kind_of_tokenizer(vocabulary) != "tiktoken":
        if given is None:
            return tokenizer_of(vocabulary)
        raise ValueError(
            f"tokenizer: expected none, as {file} holds its own, got {given}. Leave it out"
        )
    encoding = vocabulary["encoding_name"]
    if encoding != "gpt2":
        raise ValueError(
            f"{file}: expected the tiktoken encoding 'gpt2', the one that was published, got "
            f"{encoding!r}. Save its model_state alone, and convert that with its tokenizer"
        )
    try:
        return gpt2_tokenizer(given)
    except ValueError as error:
        if given is not None:
            raise
        _logger.warning("%s. The folder will hold the model alone", error)
        return None


def _name_others(file: Path) -> None:
    """Published training writes two files, whose names begin with the one that it is given."""
    others = [x for x in (f"{file}_best.pt", f"{file}_last.pt") if Path(x).is_file()]
    if others:
        raise ValueError(
            f"{file}: expected a checkpoint file, got none of that name, but {' and '.join(others)}"
        )


def _given(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {pair!r}. Say --set num_heads=8")
        try:
            settings[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def command(
    source: Annotated[Path, typer.Argument(help="Published checkpoint (.pt), or a model folder.")],
    target: Annotated[Path, typer.Argument(help="New folder for the model, or new .pt file.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name, for a file without its tokenizer, or one made with tiktoken."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of what the file does not say, by its published name: num_heads=8, "
            "use_rsqrt=true, mass_in_value=true, use_radius_cutoff=false.",
        ),
    ] = None,
) -> None:
    """Convert a published Newton Gravity Transformer, or write one of ours as published.

    The folder loads with AutoModelForCausalLM after `import gravity_hf`, and computes what the
    published model computes. Given a folder, a file that published code reads is written instead,
    if the model is one that the published layout can hold. Example:

        python -m gravity_hf.models.ngt.convert_ngt shakespeare.pt_best.pt ngt-shakespeare
    """
    try:
        if source.is_dir():
            _write_back(source, target, tokenizer)
            typer.echo(f"{target}: written, for published code")
            return
        folder = convert_ngt_checkpoint(
            source, target, tokenizer=tokenizer, **_given(setting or [])
        )
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{folder}: written. Load it with AutoModelForCausalLM.from_pretrained after import "
        "gravity_hf"
    )


def _write_back(source: Path, target: Path, tokenizer: str | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    text = AutoTokenizer.from_pretrained(tokenizer if tokenizer is not None else source)
    write_reference_checkpoint(model, text, target)


def main() -> None:
    typer.run(command)


if __name__ == "__main__":
    main()
