"""`gravity-hf serve-model`: transformers' own server, with gravity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Accepts what it does not know: `transformers serve` has many options, and other ones each version.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve_model(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a gravity model.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    continuous_batching: Annotated[
        bool, typer.Option(help="Answer several requests in one forward pass.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Serve the gravity model in DIR over HTTP, as `transformers serve` does: OpenAI's
    /v1/chat/completions, /v1/completions and the rest. Further options are passed on to it
    (transformers serve --help), such as --cb-num-blocks: by itself the cache of continuous
    batching takes most of the memory. An LGT is served without continuous batching. (For a model
    with beliefs, whatever its attention: gravity-hf serve.)

    Example:

        gravity-hf serve-model out --port 8000 --continuous-batching
    """
    from ..integration.serving import servable

    _require_servable(directory, context.args)
    options = ["--host", host, "--port", str(port), "--device", device, "--dtype", dtype]
    if continuous_batching:
        options.append("--continuous-batching")
    server = _transformers_server()
    with servable(directory, continuous_batching=continuous_batching):
        server([str(directory), *options, *context.args], standalone_mode=False)


def _require_servable(directory: Path, options: list[str]) -> None:
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"serve-model: expected a folder with config.json, got {str(directory)!r}. Make one "
            "with: gravity-hf convert MODEL OUT; merge an adapter into its model first"
        )
    # Without one, transformers makes some tokenizers up, with a single token.
    if not (directory / "tokenizer_config.json").is_file():
        raise ValueError(
            f"serve-model: expected a tokenizer beside the model, {str(directory)!r} has no "
            "tokenizer_config.json. Save one there with tokenizer.save_pretrained"
        )
    if any(option.split("=")[0] == "--attn-implementation" for option in options):
        raise ValueError(
            "serve-model: expected no --attn-implementation, the model in the folder names its own "
            "(gravity). Leave the option out"
        )


def _transformers_server() -> typer.Typer:
    """The command behind `transformers serve`, without the other commands and what they need."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "serve-model: expected the packages of a server (fastapi, uvicorn, pydantic, openai), "
            'not all are installed. Install them with: pip install "gravity_hf[serve]"'
        )
    from transformers.cli.serve import Serve

    server = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    server.command(name="serve")(Serve)
    return server
