"""`gravity-hf export`: a gravity model in other formats, and what that cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import make_console, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from ..hub.formats.export import ExportReport


def export(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]",
            help="Folder of a gravity model; none with --preset.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="onnx, torch, fp16, bf16 or int8; repeatable. An LGT has a default: "
            "torch, onnx, fp16 and int8."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="An untrained LGT instead of FOLDER: edge_150k, meta_probe, victorcos or "
            "fractal_res."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Of the preset (default: 1000).")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(min=2, help="Of the preset (default: 512).")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on; repeatable (default: Python's help text)"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of text that are measured.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a piece, at most.")] = 64,
    seed: Annotated[
        int, typer.Option(help="Which pieces of the text; of a preset also its weights.")
    ] = 0,
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

    With several formats, with --preset, and for an LGT without --format, OUT gets a folder for
    each, fp32 among them, and edge.json: size, error and time of each, measured side by side.

    Examples:

        gravity-hf export out out-onnx --format onnx

        gravity-hf export out out-int8 --format int8 --text notes.txt --length 128

        gravity-hf export --preset edge_150k edge --vocab-size 1000
    """
    measuring = {"text": text, "samples": samples, "length": length, "seed": seed, "force": force}
    if preset is not None:
        from .edge import export_preset

        if out is not None or folder is None:
            raise ValueError(
                f"--preset: expected OUT alone, the folder to write, got {_given(folder, out)}. "
                "A preset has no FOLDER: gravity-hf export --preset edge_150k OUT"
            )
        export_preset(preset, folder, format, vocab_size, max_positions, measuring, opset)
        return
    if folder is None or out is None:
        raise ValueError(
            f"export: expected FOLDER and OUT, got {_given(folder, out)}. For example: gravity-hf "
            "export out out-onnx --format onnx; or --preset edge_150k OUT"
        )
    if vocab_size is not None or max_positions is not None:
        raise ValueError(
            "--vocab-size, --max-positions: expected with --preset, a model in a folder has its "
            "own. Leave them out"
        )
    _export_folder(folder, out, format, measuring, opset)


def _given(folder: Path | None, out: Path | None) -> str:
    return " and ".join(repr(str(x)) for x in (folder, out) if x is not None) or "neither"


def _export_folder(
    folder: Path, out: Path, formats: list[str] | None, measuring: dict[str, Any], opset: int | None
) -> None:
    from ..hub.formats.names import FORMATS, require_format

    # Before anything is read, and before the imports that take seconds.
    named = list(dict.fromkeys(require_format(name) for name in formats or () if name != "fp32"))
    if not named:
        from ..hub.own_models import is_own_folder

        if not is_own_folder(folder):
            raise ValueError(
                f"--format: expected one of {list(FORMATS)} (repeatable), got none. For example: "
                f"gravity-hf export {folder} {out} --format onnx"
            )
    if len(named) == 1:
        _export_one(folder, out, named[0], measuring, opset)
        return
    from .edge import export_trained

    export_trained(folder, out, named or None, measuring, opset)


def _export_one(
    folder: Path, out: Path, format: str, measuring: dict[str, Any], opset: int | None
) -> None:
    from ..hub.formats.export import export_gravity_model

    quiet_libraries()
    console = make_console()
    with progress_bar(console, f"export to {format}", total=4) as advance:
        report = export_gravity_model(
            folder,
            out,
            format=format,
            opset=opset,
            command=repeat_command([str(folder), str(out)], [format], measuring, opset),
            advance=advance,
            **measuring,
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


def repeat_command(
    places: list[str], formats: list[str], measuring: dict[str, Any], opset: int | None
) -> str:
    """The call that makes the same again."""
    parts = ["gravity-hf", "export", *places]
    for name in formats:
        parts += ["--format", name]
    for file in measuring["text"] or ():
        parts += ["--text", str(file)]
    for name in ("samples", "length", "seed"):
        parts += [f"--{name}", str(measuring[name])]
    return shlex.join(parts if opset is None else [*parts, "--opset", str(opset)])
