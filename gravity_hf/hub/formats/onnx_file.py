"""A model as an ONNX file, written by torch's exporter and run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .programs import (
    CACHE,
    Inputs,
    KeysAndValues,
    empty_cache,
    plain_errors,
    quiet_exporters,
    takes_positions,
    trace,
)
from .running import Outputs, Runner
from .source import Source

FILE = "model.onnx"
# A protobuf holds 2 GB; weights beyond this go to a file of their own.
IN_ONE_FILE = 1_500_000_000
PRESENT = "present"
# What torch's exporter writes operators of; an older one is a conversion that it may skip unsaid.
OLDEST_OPSET = 18


def write_onnx(source: Source, folder: Path, example: Inputs, opset: int | None) -> Runner:
    """Write `model.onnx`, with the gravity settings in its metadata; the file, ready to run.

    Decoders have the inputs `input_ids`, `attention_mask`, `position_ids` (where the model takes
    them) and `past_key_values.N.key`, `.value`, the outputs `logits` and `present.N.key`,
    `.value`. One file serves the prefill (past of length 0) and every step.
    """
    program, axes = trace(source, example)
    inputs = _names(program.graph_signature.user_inputs, source, CACHE)
    with quiet_exporters(), plain_errors(source, "torch.onnx cannot translate"):
        exported: Any = torch.onnx.export(
            program,
            dynamic_shapes=axes,
            input_names=inputs,
            output_names=_output_names(source, program),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    for node in exported.model.graph:
        # What the exporter notes of its own doings is longer than a small model.
        node.metadata_props.clear()
    exported.model.metadata_props.update(source.metadata)
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    exported.save(folder / FILE, external_data=size > IN_ONE_FILE)
    if opset is not None:
        require_opset_of(folder / FILE, opset)
    return run_onnx(source, folder / FILE)


def run_onnx(source: Source, file: Path) -> Runner:
    """The file on onnxruntime's CPU provider; `source` says what kind of model it is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its warnings are of its own optimiser.
    options.log_severity_level = 3
    # As many as torch takes, so that times beside each other are of equal means.
    options.intra_op_num_threads = torch.get_num_threads()
    with plain_errors(source, "onnxruntime cannot run the file of"):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def compute(inputs: Inputs) -> tuple[Outputs, KeysAndValues]:
        arrays = {name: x.numpy() for name, x in _flat(inputs).items()}
        found = [torch.from_numpy(array) for array in session.run(None, arrays)]
        kept = [x for name, x in zip(names, found, strict=True) if name.startswith(PRESENT)]
        outputs = {n: x for n, x in zip(names, found, strict=True) if not n.startswith(PRESENT)}
        return outputs, list(zip(kept[::2], kept[1::2], strict=True))

    positions = source.kind == "decoder" and takes_positions(source.model)
    return Runner(compute, lambda rows: empty_cache(source.model, rows), positions)


def require_opset(opset: int) -> None:
    """ValueError for operators that the exporter does not write or `onnx` does not know."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset: expected {OLDEST_OPSET} to {newest}, which torch's exporter writes and the "
            f"installed onnx knows, got {opset}. Leave it out for the exporter's choice"
        )


def require_opset_of(file: Path, asked: int) -> None:
    """ValueError where the exporter wrote another opset than it was asked for."""
    found = opset_of(file)
    if found != asked:
        raise ValueError(
            f"opset: expected {asked}, the exporter could not convert this model to it and gave "
            f"{found}. Nothing was written; ask for {found}, or leave it out"
        )


def opset_of(file: Path) -> int:
    """The version of ONNX's own operators in that file."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    return next(x.version for x in model.opset_import if x.domain in ("", "ai.onnx"))


def _flat(inputs: Inputs) -> dict[str, Tensor]:
    found = {name: x for name, x in inputs.items() if name != CACHE}
    for i, (key, value) in enumerate(inputs.get(CACHE) or ()):
        found |= {f"{CACHE}.{i}.key": key, f"{CACHE}.{i}.value": value}
    return found


def _names(found: Any, source: Source, cache: str) -> list[str]:
    """The placeholders' names, those of the cache as other tools call them."""
    if source.kind != "decoder":
        return list(found)
    named = [name for name in found if not name.startswith(CACHE)]
    return named + _cache_names(cache, (len(found) - len(named)) // 2)


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{i}.{what}" for i in range(layers) for what in ("key", "value")]


def _output_names(source: Source, program: torch.export.ExportedProgram) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    if source.kind == "decoder":
        return ["logits", *_cache_names(PRESENT, (count - 1) // 2)]
    spec = program.call_spec.out_spec
    return list(spec.context)
