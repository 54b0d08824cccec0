"""An export that lies on disk, loaded again and ready to run."""

from __future__ import annotations

from pathlib import Path

from .onnx_file import FILE as ONNX_FILE
from .onnx_file import run_onnx
from .running import Runner, runner_of_model
from .source import Source, load_runnable
from .torch_file import FILE as PROGRAM_FILE
from .torch_file import run_program


def runner_of_export(source: Source, folder: Path) -> Runner:
    """What `export_gravity_model` wrote to `folder`, or the folder of a model.

    Args:
        source: the model that it was made from, which says what inputs it takes.
    """
    if (folder / ONNX_FILE).is_file():
        return run_onnx(source, folder / ONNX_FILE)
    if (folder / PROGRAM_FILE).is_file():
        return run_program(source, folder / PROGRAM_FILE)
    return runner_of_model(load_runnable(folder), source.kind)
