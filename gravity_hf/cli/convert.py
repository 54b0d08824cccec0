"""`gravity-hf convert`: patch a pretrained model, calibrate it on text, save it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..training.text import read_texts
from .console import make_console, quiet_libraries
from .folders import require_free, whole_folder
from .status import CALIBRATION_FILE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..integration.calibration_report import CalibrationReport

CALIBRATION_TABLE = "calibration.txt"


def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model folder or Hub name.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    softness: Annotated[
        float,
        typer.Option(min=0.0, help="0: bare gravity. Large: near the original, hardly gravity."),
    ] = 1.0,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate and measure on; repeatable [default: Python's]"),
    ] = None,
    law: Annotated[str, typer.Option(help="force or power.")] = "force",
    distance: Annotated[str, typer.Option(help="lifted or euclidean.")] = "lifted",
    mass_per: Annotated[str, typer.Option(help="query_head, kv_head or layer.")] = "query_head",
    layers: Annotated[
        str | None, typer.Option(help="Which attention layers, such as 0,1,5-8. Default: all.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Pieces of text to calibrate on, and as many to measure on.")
    ] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a piece.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the pieces of text.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
) -> None:
    """Convert MODEL to gravity attention without training, and save it to OUT.

    Masses, softenings and key radii come from MODEL's own queries and keys on the text. What the
    conversion cost is measured on other text and printed.

    Examples:

        gravity-hf convert Qwen/Qwen2.5-0.5B out --text notes.txt

        gravity-hf convert ./my-bert out --softness 4 --samples 64 --length 128

        gravity-hf convert ./my-llama out --law power --softness 0 --layers 0,2-5
    """
    from ..config import GravityConfig
    from ..integration.calibration import calibrate
    from ..integration.patching import gravity_status, patch_with_gravity
    from .hosts import load_host, load_tokenizer, require_text_model
    from .pieces import pieces_of_text

    console = make_console()
    require_free(out, force)
    # The distance is set by the calibration: lifted radii exist only once keys were seen.
    settings = GravityConfig(law=law, mass_per=mass_per, layers=parse_layers(layers))
    corpus = read_texts(text)
    quiet_libraries()
    console.print(f"Loading {model}", markup=False)
    host = load_host(model, dtype, device)
    writes = require_text_model(host)
    tokenizer = load_tokenizer(model)
    data = pieces_of_text(host, tokenizer, corpus, writes, samples, length, seed)
    before = _measure(host, data[1], writes)
    patch_with_gravity(host, settings)
    report = calibrate(host, data[0], softness=softness, distance=distance)
    console.print(str(gravity_status(host)), markup=False)
    _say_cost(console, before, _measure(host, data[1], writes), writes, report)
    with whole_folder(out) as folder:
        host.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CALIBRATION_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        (folder / CALIBRATION_TABLE).write_text(report.table() + "\n", encoding="utf-8")
    console.print(f"Saved to {out}. Next: gravity-hf status {out}", markup=False)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`"0,2-4"` is `(0, 2, 3, 4)`; None stays None."""
    if text is None:
        return None
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            chosen += range(int(first), int(last or first) + 1)
    except ValueError:
        chosen = []
    if not chosen:
        raise ValueError(f"--layers: expected indices such as 0,2-4, got {text!r}")
    return tuple(chosen)


def _measure(model: PreTrainedModel, batches: list[dict[str, Tensor]], writes: bool) -> object:
    from ..training.measures import mean_loss, pooled_embeddings

    if writes:
        return mean_loss(model, (batch["input_ids"] for batch in batches))
    return pooled_embeddings(model, batches)


def _say_cost(
    console: Console, before: object, after: object, writes: bool, report: CalibrationReport
) -> None:
    from ..training.measures import embedding_likeness

    if writes:
        console.print(
            f"Loss on held-out text: {before:.4f} nats per token with dot-product attention, "
            f"{after:.4f} with gravity ({after - before:+.4f})"
        )
    else:
        likeness = embedding_likeness(before, after)
        console.print(
            f"Held-out text, embeddings against the original's: mean cosine "
            f"{likeness['cosine_mean']:.4f}, lowest {likeness['cosine_min']:.4f}, same nearest "
            f"neighbour {likeness['same_neighbour']:.0%}"
        )
    summary = report.summary()
    console.print(
        f"How gravitational: softness {summary['softness']:g}, median contrast of the scores "
        f"{summary['contrast_median']:.3g} (1 = distance makes no difference)"
    )
