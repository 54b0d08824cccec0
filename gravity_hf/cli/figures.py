"""`gravity-hf figures`: draw what a gravity model does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..hub.file_names import CALIBRATION_FILE
from .console import make_console, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPT = "The cat sat on the mat because it was tired."
_TEXTS, _TOKENS = 12, 256
_PIECE = 1200
# The first that is there has the training curves.
_HISTORIES = ("results.json", "trainer_state.json")


def figures(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of a gravity model or adapter.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="Folder to fill (default: DIR/figures)"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="The host: its attention is shown beside gravity's."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on; repeatable (default: Python's help text)"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text of the attention maps, of which 24 tokens are shown (default: a sentence)"
        ),
    ] = None,
    theme: Annotated[
        Literal["light", "dark", "both"], typer.Option(help="Paper of the figures.")
    ] = "light",
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Layer that is shown alone (default: highest contrast)"),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(min=0, help="Head that is shown alone (default: highest contrast)"),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Also a page to turn, zoom and point at.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the pieces of text.")] = 0,
) -> None:
    """Draw what DIR holds: masses, contrast, score against distance, attention, training.

    Writes PNG and SVG files and figures.json, which a model card takes its figures from. Earlier
    figures in OUT are replaced. Models of other inputs than text get the figures that need none;
    Python draws them all: gravity_hf.viz.export.write_figures with batches of their inputs.

    Of an NGT the coordinates of 256 tokens of the text, or of --prompt, are drawn: as a picture
    after one layer (default: the last), and always as a page to turn with all layers.

    Of a geolip or a companion spectra, alphas, deviations and reconstructions are drawn, of the
    inputs that its training left in DIR: it needs neither a text nor its host.

    Examples:

        gravity-hf figures out

        gravity-hf figures out -o pictures --against Qwen/Qwen2.5-0.5B --theme both --interactive
    """
    from ..hub.own_models import is_own_folder
    from ..integration.loading import load_gravity_model
    from ..training.any_model import load_any_tokenizer
    from ..viz.coordinates import has_coordinates
    from ..viz.export import write_figures
    from ..viz.style import require_matplotlib, require_plotly
    from .hosts import load_host
    from .own_figures import (
        draw_coordinates,
        draw_geolip,
        is_geolip_folder,
        require_coordinates,
        stretch_of_text,
    )

    require_matplotlib()
    if interactive:
        require_plotly()
    if not directory.is_dir():
        raise ValueError(
            f"DIR: expected a folder of a gravity model or adapter, there is none at "
            f"{str(directory)!r}. Make one with: gravity-hf convert MODEL OUT"
        )
    target = out or directory / "figures"
    if is_geolip_folder(directory):
        quiet_libraries()
        given = {"--against": against, "--text": text, "--prompt": prompt, "--layer": layer}
        given |= {"--head": head, "--interactive": interactive or None}
        _show(
            make_console(),
            draw_geolip(directory, target, given, theme=theme, device=device),
            target,
        )
        return
    if is_own_folder(directory):
        require_coordinates(directory, {"--against": against, "--head": head})
    quiet_libraries()
    console = make_console()
    model = load_gravity_model(directory, dtype="auto").to(device).eval()
    if has_coordinates(model):
        shown = stretch_of_text(text, seed) if prompt is None else prompt
        how = {"theme": theme, "layer": layer}
        _show(console, draw_coordinates(model, directory, target, shown, **how), target)
        return
    inputs: dict[str, Any] = {}
    if _reads_text(model):
        tokenizer = load_any_tokenizer(str(directory))
        inputs = _inputs(model, tokenizer, text, prompt or _PROMPT, seed)
        if against is not None:
            inputs["host"] = load_host(against, device=device, argument="--against")
    else:
        console.print(
            f"{type(model).__name__} reads no plain text: only the figures that need none",
            markup=False,
        )
    entries = write_figures(
        model,
        target,
        results=_history(directory),
        calibration=(_read(directory / CALIBRATION_FILE) or {}).get("rows"),
        theme=theme,
        layer=layer,
        head=head,
        interactive=interactive,
        **inputs,
    )
    _show(console, entries, target)


def _reads_text(model: PreTrainedModel) -> bool:
    return model.main_input_name == "input_ids" and not model.config.is_encoder_decoder


def _inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: list[Path] | None,
    prompt: str,
    seed: int,
) -> dict[str, Any]:
    """Batches of one text each, so that nothing is padded, and the prompt."""
    from ..training.evaluation import require_fitting_ids
    from ..training.text import prose_paragraphs, read_texts

    whole = read_texts(files)
    pieces = prose_paragraphs(whole)
    if len(pieces) < _TEXTS:
        pieces = [whole[i : i + _PIECE] for i in range(0, len(whole), _PIECE)]
    chosen = random.Random(seed).sample(pieces, min(_TEXTS, len(pieces)))
    most = min(_TOKENS, getattr(model.config, "max_position_embeddings", None) or _TOKENS)
    options = {"truncation": True, "max_length": most, "return_tensors": "pt"}
    encoded = [dict(tokenizer(piece, **options)) for piece in chosen]
    batches = [batch for batch in encoded if batch["input_ids"].shape[1] > 1]
    example = dict(tokenizer(prompt, **options))
    if not batches or example["input_ids"].shape[1] < 2:
        what = "--prompt" if batches else "--text"
        raise ValueError(f"{what}: expected text of at least 2 tokens, got less. Give more text")
    for batch in (*batches, example):
        require_fitting_ids(model, batch["input_ids"])
    return {"batches": batches, "example": example, "tokenizer": tokenizer}


def _history(directory: Path) -> dict[str, Any] | None:
    return next((found for name in _HISTORIES if (found := _read(directory / name))), None)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
    return content if isinstance(content, dict) else None


def _show(console: Console, entries: list[dict[str, Any]], target: Path) -> None:
    from rich.table import Table

    from ..viz.export import LIST_NAME, PAGE_NAME

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("file", no_wrap=True)
    table.add_column("shows")
    for entry in entries:
        table.add_row(entry["file"], entry["title"])
    if any("interactive" in entry for entry in entries):
        table.add_row(f"{PAGE_NAME}.html", "Some of them to turn, zoom and point at")
    console.print(table)
    dark = ", and of each a dark one" if any("dark" in entry for entry in entries) else ""
    console.print(
        f"Written to {target}, as PNG and as SVG{dark}; {LIST_NAME} lists them", markup=False
    )
