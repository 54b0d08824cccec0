"""What `gravity-hf export` shows of several formats side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .console import make_console, progress_bar, quiet_libraries
from .export import repeat_command

if TYPE_CHECKING:
    from ..hub.edge import EdgeExport, EdgeReport

# Less is within what two calls of the same model differ.
_SLOWER = 1.05
_ERRORS = ("max error", "mean KL, nats", "1 - mean cosine", "greedy")


def export_preset(
    preset: str,
    out: Path,
    formats: list[str] | None,
    vocab_size: int | None,
    max_positions: int | None,
    measuring: dict[str, Any],
    opset: int | None,
) -> None:
    """An untrained model of that size, in every format."""
    from ..hub.edge import DEFAULT_VOCABULARY, EDGE_FORMATS, preset_model, require_edge_formats

    _refuse_opset(opset)
    wanted = require_edge_formats(formats or EDGE_FORMATS)
    quiet_libraries()
    sizes = {"vocab_size": vocab_size or DEFAULT_VOCABULARY, "max_positions": max_positions or 512}
    model = preset_model(preset, seed=measuring["seed"], **sizes)
    places = ["--preset", preset, str(out), "--vocab-size", str(sizes["vocab_size"])]
    places += ["--max-positions", str(sizes["max_positions"])]
    command = repeat_command(places, list(wanted), measuring, None)
    _export(model, out, wanted, measuring, command, preset)


def export_trained(
    folder: Path,
    out: Path,
    formats: list[str] | None,
    measuring: dict[str, Any],
    opset: int | None,
) -> None:
    """The model in `folder` in several formats."""
    from ..hub.edge import EDGE_FORMATS, require_edge_formats

    _refuse_opset(opset)
    wanted = require_edge_formats(formats or EDGE_FORMATS)
    quiet_libraries()
    command = repeat_command([str(folder), str(out)], list(wanted), measuring, None)
    _export(folder, out, wanted, measuring, command, None)


def _refuse_opset(opset: int | None) -> None:
    if opset is not None:
        raise ValueError(
            f"--opset: expected with --format onnx alone, got {opset} with several formats. Leave "
            "it out"
        )


def _export(
    model: Any,
    out: Path,
    formats: tuple[str, ...],
    measuring: dict[str, Any],
    command: str,
    preset: str | None,
) -> None:
    from ..hub.edge import export_edge_model

    console = make_console()
    with progress_bar(console, "edge export", total=len(formats) + 2) as advance:
        report = export_edge_model(
            model,
            out,
            formats=formats,
            preset=preset,
            command=command,
            advance=advance,
            **measuring,
        )
    show(console, report)
    console.print(
        f"Saved to {out}, a folder for each format; the numbers in {out / 'edge.json'}",
        markup=False,
    )


def show(console: Console, report: EdgeReport) -> None:
    """The tables of an edge export."""
    console.print(_sizes(report))
    console.print(_formats(report))
    errors = (
        f"Errors against the float32 model, on {report.measured_on}. " if _others(report) else ""
    )
    console.print(
        f"{errors}Times: batch 1, least of {report.exports[0].prefill.calls} calls in turns, "
        f"{report.threads} threads, {report.conditions['device']}.",
        markup=False,
    )
    for line in slower(report):
        console.print(line, markup=False)
    if not report.trained:
        console.print("The weights are random: a preset is a size, not a trained model.")


def slower(report: EdgeReport) -> list[str]:
    """Which formats take longer than the float32 model did here, in sentences."""
    base = report.exports[0].prefill.least_ms
    found = [(x.format, x.prefill.least_ms / base) for x in _others(report)]
    slow = [f"{name} ({ratio:.1f} times as long)" for name, ratio in found if ratio > _SLOWER]
    return [f"Slower than fp32 here, over a whole pass: {', '.join(slow)}."] if slow else []


def _others(report: EdgeReport) -> tuple[EdgeExport, ...]:
    return report.exports[1:]


def _sizes(report: EdgeReport) -> Table:
    parts = report.parameters
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column(report.preset or report.architecture, no_wrap=True)
    for title in ("parameters", "embedding", "head", "others", "float32"):
        table.add_column(title, justify="right", no_wrap=True)
    if report.published is not None:
        table.add_row("published", report.published.parameters, "", "", "", report.published.size)
    name = f"vocabulary {report.vocab_size}, {report.max_positions} positions"
    numbers = [f"{parts[part]:,}" for part in ("total", "embedding", "head", "others")]
    table.add_row(name, *numbers, _megabytes(report.exports[0].bytes))
    return table


def _formats(report: EdgeReport) -> Table:
    from ..hub.formats.measuring import in_words

    base = report.exports[0]
    rows = [_row(export, base, report.timed_tokens) for export in report.exports]
    words = [{} if x.measured is None else in_words(x.measured) for x in report.exports]
    # The rest is in edge.json: more would not fit a terminal.
    words = [{t: cell for t, cell in cells.items() if t in _ERRORS} for cells in words]
    titles = list(dict.fromkeys(title for cells in (*rows, *words) for title in cells))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == "format" else "right", no_wrap=True)
    for cells, more in zip(rows, words, strict=True):
        both = {**cells, **more}
        table.add_row(*(both.get(title, "–") for title in titles))
    return table


def _row(export: EdgeExport, base: EdgeExport, tokens: int) -> dict[str, str]:
    cells = {
        "format": export.format,
        "size": _megabytes(export.bytes),
        f"{tokens} tokens": f"{export.prefill.least_ms:.2f} ms",
        "of fp32": f"{export.prefill.least_ms / base.prefill.least_ms:.2f}",
    }
    if export.step is not None:
        cells["one more"] = f"{export.step.least_ms:.2f} ms"
    return cells


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
