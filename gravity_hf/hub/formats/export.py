"""`export_gravity_model`: checks, the writer of one format, and what that cost."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ... import __version__
from ...training.files import write_json
from ...training.folders import EXPORT_FILE, WEIGHTS, require_apart, require_free, whole_folder
from ..card_public import public
from .folders import bytes_of, copy_companions
from .measuring import measure, require_same_model
from .modules import known_module_files, module_files
from .names import NEEDS, PROGRAMS, require_format
from .onnx_file import FILE as ONNX_FILE
from .onnx_file import opset_of, require_opset, write_onnx
from .running import Runner
from .samples import Samples, make_samples
from .source import Source, folder_of, load_source
from .torch_file import write_program
from .weights import write_weights


@dataclass(frozen=True)
class ExportReport:
    """What was written, as `export.json` beside it says.

    Attributes:
        format: its name.
        model_type: `gravity_...`.
        gravity: the settings, as in config.json.
        kind: decoder, encoder, vision or encoder-decoder.
        files: names and sizes in bytes of what carries the model.
        bytes_before, bytes_after: of the source's safetensors, and of these files.
        measured: see `gravity_hf.hub.formats.measuring.measure`.
        measured_on: in words.
        opset: of an ONNX file; None for the rest.
        quantised: of `int8`: `layers` with 8-bit weights, `of` so many linear ones; None for the
            rest.
        versions, date, command: how it was made; paths in the command by their last names.
    """

    format: str
    model_type: str
    gravity: dict[str, Any]
    kind: str
    files: dict[str, int]
    bytes_before: int
    bytes_after: int
    measured: dict[str, Any]
    measured_on: str
    opset: int | None
    quantised: dict[str, int] | None
    versions: dict[str, str]
    date: str
    command: str | None


def export_gravity_model(
    model_or_folder: nn.Module | str | os.PathLike,
    out: str | os.PathLike,
    *,
    format: str,
    text: Sequence[Path] | None = None,
    samples: int = 16,
    length: int = 64,
    seed: int = 0,
    opset: int | None = None,
    force: bool = False,
    command: str | None = None,
    advance: Callable[[str], None] = lambda note: None,
) -> ExportReport:
    """Write a gravity model to the folder `out` in another format, and measure what it lost.

    The model is loaded anew in float32 on the CPU; the one given is not changed. What was written
    is loaded again and compared with it. `out` is complete, or untouched.

    Args:
        model_or_folder: a gravity model, or the folder of one.
        out: a new or empty folder, not in the model's nor around it.
        format: `"onnx"`, `"torch"`, `"fp16"`, `"bf16"` or `"int8"`, in any case.
        text: files to measure on; default: Python's help text. Where the folder has no tokenizer,
            random tokens.
        samples: how many rows are measured.
        length: tokens in a row, at most.
        seed: of the choice of text or of the random inputs.
        opset: of the ONNX operators, 18 or newer; None: the exporter's own choice.
        force: replace the model in `out`; refused where `out` holds anything else.
        command: noted in `export.json`.
        advance: called after each of the four steps load, write, measure, finish.

    Returns:
        What `export.json` in `out` holds.

    Raises:
        ValueError: a format, model or folder that does not fit, by name; a program that computes
            something else; numbers that a format cannot hold.
        ImportError: a package that the format needs.
    """
    format = require_format(format)
    target = Path(out).expanduser()
    if not isinstance(model_or_folder, nn.Module):
        require_apart(Path(model_or_folder).expanduser(), target)
    require_free(target, force, known_module_files(target))
    if opset is not None and format != "onnx":
        raise ValueError(f"opset: expected with format 'onnx' only, got {opset} with {format!r}")
    if opset is not None:
        require_opset(opset)
    if samples < 1 or length < 8:
        raise ValueError(
            f"export: expected samples >= 1 and length >= 8, got {samples} and {length}"
        )
    with folder_of(model_or_folder) as folder:
        # Now, not when the export is written: what it refuses is refused before.
        module_files(folder)
        source = load_source(folder)
        inputs = make_samples(source, text, samples, length, seed)
        advance("loaded")
        with whole_folder(target) as building:
            runner, quantised = _write(source, building, format, inputs, opset)
            advance("written")
            measured = measure(source, runner, inputs)
            if format in PROGRAMS:
                require_same_model(source, measured)
            advance("measured")
            copy_companions(folder, building)
            report = _report(source, building, format, inputs, measured, quantised, command)
            write_json(building / EXPORT_FILE, asdict(report))
            # Its file must be closed before the folder is renamed, on some systems.
            del runner
    advance("done")
    return report


def _write(
    source: Source, folder: Path, format: str, samples: Samples, opset: int | None
) -> tuple[Runner, dict[str, int] | None]:
    """The export, ready to run, and how much of it was quantised."""
    if format == "onnx":
        return write_onnx(source, folder, samples.batches[0], opset), None
    if format == "torch":
        return write_program(source, folder, samples.batches[0]), None
    return write_weights(source, folder, format)


def _report(
    source: Source,
    folder: Path,
    format: str,
    samples: Samples,
    measured: dict[str, Any],
    quantised: dict[str, int] | None,
    command: str | None,
) -> ExportReport:
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    return ExportReport(
        format=format,
        model_type=source.model_type,
        gravity=source.settings.to_dict(),
        kind=source.kind,
        files={file.name: file.stat().st_size for file in files},
        bytes_before=bytes_of(source.folder, "*.safetensors"),
        bytes_after=bytes_of(folder, *WEIGHTS),
        measured=measured,
        measured_on=samples.description,
        opset=opset_of(folder / ONNX_FILE) if format == "onnx" else None,
        quantised=quantised,
        versions=_versions(format),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        command=public({"command": command})["command"],
    )


def _versions(format: str) -> dict[str, str]:
    packages = ("torch", "transformers", *NEEDS.get(format, ()))
    return {"gravity_hf": __version__, **{p: importlib.metadata.version(p) for p in packages}}
