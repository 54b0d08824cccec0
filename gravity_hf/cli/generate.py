"""`gravity-hf generate`: let a gravity model write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import make_console, quiet_libraries
from .hosts import load_tokenizer, require_causal
from .terminal import terminal_safe

_ADAPTER = "adapter_config.json"


def generate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a gravity model.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens to write at most.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
) -> None:
    """Continue PROMPT with the model in DIR. Only the text goes to standard output; control
    characters that the model writes are shown, not sent to the terminal.

    Example:

        gravity-hf generate out "Gravity is" --max-new-tokens 50 --temperature 0
    """
    from ..integration.loading import load_gravity_model
    from ..training.samples import generation_samples

    require_model_folder(directory)
    require_causal(directory, "generate")
    quiet_libraries()
    model = load_gravity_model(directory)
    if not hasattr(model, "generate") or not model.can_generate():
        raise ValueError(
            f"generate: expected a model that writes text, got {type(model).__name__}. "
            + _instead(directory)
        )
    tokenizer = load_tokenizer(_tokenizer_home(directory))
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    (sample,) = generation_samples(model, tokenizer, [prompt], **how)
    console = make_console()
    text = sample["prompt"] + sample["text"]
    console.out(terminal_safe(text, console.encoding), highlight=False)


def _instead(directory: Path) -> str:
    from ..hub.own_models import is_own_folder

    if is_own_folder(directory):
        return "Use it in Python: load it with its transformers Auto class"
    return "An encoder gives embeddings: load it with gravity_hf.load_gravity_model"


def require_model_folder(directory: Path) -> None:
    if not any((directory / name).is_file() for name in ("config.json", _ADAPTER)):
        raise ValueError(
            f"generate: expected a folder with config.json, got {str(directory)!r}. "
            "Make one with: gravity-hf convert MODEL OUT"
        )


def _tokenizer_home(directory: Path) -> str:
    """An adapter folder may leave the tokenizer with its base model."""
    if (directory / _ADAPTER).is_file() and not (directory / "tokenizer_config.json").is_file():
        adapter = json.loads((directory / _ADAPTER).read_text(encoding="utf-8"))
        return adapter.get("base_model_name_or_path") or str(directory)
    return str(directory)
