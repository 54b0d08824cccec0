"""Programs exported from a patched encoder: the same numbers, also for other sizes and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = [(2, 11), (3, 7), (1, 30)]


def gravity_bert(layers: int = 2, **settings: Any) -> PreTrainedModel:
    model = tiny_host("bert", num_hidden_layers=layers)
    patch_with_gravity(model, GravityConfig(**settings))
    calibrate(model, [tiny_inputs("bert")], softness=0.25)
    return model


def padded(batch: int, length: int) -> dict[str, Tensor]:
    """Rows padded on the right, on the left, and not at all."""
    inputs = tiny_inputs("bert", batch=batch, length=length, seed=length)
    inputs["attention_mask"][0, length // 2 :] = 0
    inputs["attention_mask"][1:2, :3] = 0
    return inputs


def any_size() -> dict[str, dict[int, Any]]:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=128)
    return {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}


def export(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (), padded(2, 11), dynamic_shapes=any_size())


def assert_unlike_the_host(actual: Tensor, layers: int, inputs: dict[str, Tensor]) -> None:
    of_host = logits(tiny_host("bert", num_hidden_layers=layers), inputs)
    assert (actual - of_host).abs().max() > 1e-2


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return gravity_bert()


@pytest.fixture(scope="module")
def program(model) -> torch.export.ExportedProgram:
    return export(model)


def test_an_exported_encoder_gives_the_same_for_every_size_and_padding(model, program):
    for size in SIZES:
        inputs = padded(*size)
        actual = logits(program.module(), inputs)
        torch.testing.assert_close(actual, logits(model, inputs), **TOLERANCE)
        assert_unlike_the_host(actual, 2, inputs)


def test_padding_changes_nothing_in_an_exported_encoder(program):
    inputs = padded(3, 12)
    before = logits(program.module(), inputs)
    hidden = inputs["attention_mask"] == 0
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, 96)
    torch.testing.assert_close(logits(program.module(), inputs)[~hidden], before[~hidden])


def test_an_exported_program_is_torch_alone(program):
    """So that it runs where this library is not installed, and other formats can translate it."""
    assert "gravity_hf" not in operators(program)


def test_a_named_implementation_is_exported_as_it_is():
    model = gravity_bert(1, implementation="chunked")
    program, inputs = export(model), padded(3, 7)
    assert "gravity_hf" in operators(program)
    torch.testing.assert_close(logits(program.module(), inputs), logits(model, inputs), **TOLERANCE)


def run_onnx(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(session.run(None, arrays)[0])


@pytest.mark.parametrize("law", ["force", "power"])
def test_an_onnx_file_gives_the_same_for_every_size_and_padding(law, tmp_path):
    pytest.importorskip("onnxscript")
    model, file = gravity_bert(1, law=law), tmp_path / "model.onnx"
    torch.onnx.export(
        model, kwargs=padded(2, 11), f=file, dynamo=True, dynamic_shapes=any_size(), verbose=False
    )
    for size in SIZES:
        inputs = padded(*size)
        actual = run_onnx(file, inputs)
        torch.testing.assert_close(actual, logits(model, inputs), **TOLERANCE)
        assert_unlike_the_host(actual, 1, inputs)


def test_the_exporter_of_transformers_writes_the_same_model(tmp_path):
    pytest.importorskip("onnxscript")
    model = gravity_bert(1)
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, padded(2, 11), config=OnnxConfig(dynamic=True))
    program, inputs = getattr(exported, "program", exported), padded(3, 7)
    file = tmp_path / "model.onnx"
    if hasattr(program, "save"):  # transformers 5.17
        program.save(file)
    else:
        pytest.importorskip("onnx_ir").save(program, file)
    torch.testing.assert_close(run_onnx(file, inputs), logits(model, inputs), **TOLERANCE)
