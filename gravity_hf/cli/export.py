"""`gravity-hf export`: a gravity model in another format, and what that cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import make_console, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..hub.formats.export import ExportReport


def export(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder of a gravity model.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="onnx, torch, fp16, bf16 or int8.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on; repeatable (default: Python's help text)"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of text that are measured.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a piece, at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Which pieces of the text.")] = 0,
    opset: Annotated[
        int | None,
        typer.Option(help="Of the ONNX operators, 18 or newer (default: the exporter's)"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
) -> None:
    """Write the gravity model in FOLDER to OUT in another format, and measure what it lost.

    onnx: for onnxruntime; a decoder's cache goes in and out, so that one file serves the prompt
    and every step after it. torch: a torch.export program that needs torch alone. fp16, bf16, int8:
    folders like FOLDER with smaller weights; masses stay float32.

    What was measured lies in OUT/export.json. GGUF is refused: its runtimes have no gravity.

    Examples:

        gravity-hf export out out-onnx --format onnx

        gravity-hf export out out-int8 --format int8 --text notes.txt --length 128
    """
    from ..hub.formats.names import require_format

    # Before anything is read, and before the imports that take seconds.
    format = require_format(format)
    from ..hub.formats.export import export_gravity_model

    quiet_libraries()
    console = make_console()
    with progress_bar(console, f"export to {format}", total=4) as advance:
        report = export_gravity_model(
            folder,
            out,
            format=format,
            text=text,
            samples=samples,
            length=length,
            seed=seed,
            opset=opset,
            force=force,
            command=_command(folder, out, format, text, samples, length, seed, opset),
            advance=advance,
        )
    console.print(_table(report))
    console.print(f"Against the float32 torch model, on {report.measured_on}.", markup=False)
    console.print(f"Saved to {out}, the numbers in {out / 'export.json'}", markup=False)


def _table(report: ExportReport) -> Table:
    from ..hub.formats.measuring import in_words

    table = Table(box=None, padding=(0, 2), header_style="bold")
    cells = {
        "format": report.format,
        "before": _megabytes(report.bytes_before),
        "after": _megabytes(report.bytes_after),
        **in_words(report.measured),
    }
    if report.quantised:
        cells["8-bit layers"] = f"{report.quantised['layers']} of {report.quantised['of']}"
    for name in cells:
        table.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _command(
    folder: Path,
    out: Path,
    format: str,
    text: list[Path] | None,
    samples: int,
    length: int,
    seed: int,
    opset: int | None,
) -> str:
    """The call that makes the same again."""
    parts = ["gravity-hf", "export", str(folder), str(out), "--format", format]
    for file in text or ():
        parts += ["--text", str(file)]
    parts += ["--samples", str(samples), "--length", str(length), "--seed", str(seed)]
    return shlex.join(parts if opset is None else [*parts, "--opset", str(opset)])
