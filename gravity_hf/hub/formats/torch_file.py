"""A model as a torch.export program: core operators only, so that other runtimes can take it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .programs import Inputs, empty_cache, quiet_exporters, strip, takes_positions, trace
from .running import Runner, runner_of_module
from .source import Source

FILE = "model.pt2"
METADATA = "gravity.json"


def write_program(source: Source, folder: Path, example: Inputs) -> Runner:
    """Write `model.pt2`, the gravity settings in its extra file `gravity.json`; ready to run.

    `torch.export.load(file).module()` runs it where neither this library nor transformers is
    installed. Encoders take their inputs by name and give a dict; decoders take `input_ids`,
    `attention_mask`, `position_ids` (where the model has them) and `past_key_values`, a list of
    (keys, values), and give logits and that list, longer.
    """
    program, _ = trace(source, example)
    with quiet_exporters():
        program = program.run_decompositions()
        strip(program)
        others = operators_beyond_core(program)
        if others:
            raise ValueError(
                f"export: expected core ATen operators only, {type(source.model).__name__} needs "
                f"{', '.join(others)}, which other runtimes do not have. Use transformers, or a "
                "format of weights: fp16, bf16, int8"
            )
        more = {METADATA: json.dumps(source.metadata)}
        torch.export.save(program, folder / FILE, extra_files=more)
    return run_program(source, folder / FILE)


def run_program(source: Source, file: Path) -> Runner:
    """The program in that file, in torch."""
    with quiet_exporters():
        module = torch.export.load(file).module()
    positions = source.kind == "decoder" and takes_positions(source.model)
    return runner_of_module(
        module, source.kind, lambda rows: empty_cache(source.model, rows), positions
    )


def operators_beyond_core(program: torch.export.ExportedProgram) -> list[str]:
    """Operators of a program that torch does not tag as core ATen. Arithmetic on sizes is plain
    Python there, and no operator."""
    called = {n.target for n in program.graph.nodes if n.op == "call_function"}
    return sorted(
        str(target)
        for target in called
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.core not in target.tags
    )
