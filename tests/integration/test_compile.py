"""`torch.compile` of a patched model: the same numbers, in one graph, for all lengths."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from integration.running import TOLERANCE, generate, gravity_host, host, inputs_of, left_padded
from torch import Tensor, nn
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def training_step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and the gradient of every parameter that has one."""
    model.zero_grad()
    output = model(**inputs)[0]
    # A sum of squares, since not every model has a loss of its own.
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}


def assert_same_step(compiled: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    actual, expected = training_step(compiled, inputs), training_step(model, inputs)
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    assert actual[1].keys() == expected[1].keys()
    assert max(g.abs().max() for name, g in expected[1].items() if "mass_log" in name) > 0
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


# One layer of each kind: a second one compiles the same again.
ONE_LAYER: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "vit": {"num_hidden_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", ONE_LAYER)
def test_a_compiled_training_step_is_the_eager_one_without_a_break_in_its_graph(family):
    model, inputs = gravity_host(family, **ONE_LAYER[family]), inputs_of(family)
    if family != "vit":
        inputs["attention_mask"][0, -3:] = 0
    counters.clear()
    assert_same_step(torch.compile(model, backend="aot_eager"), model, inputs)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_attention_compiled_to_machine_code_is_the_eager_one():
    """Only the attention: the rest is the host's own, and takes the compiler half a minute more."""
    attention = gravity_host("bert", **ONE_LAYER["bert"]).bert.encoder.layer[0].attention
    inputs = {"hidden_states": torch.randn(2, 11, 48)}
    assert_same_step(torch.compile(attention, fullgraph=True), attention, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_compiled_to_machine_code_for_a_gpu_is_the_eager_one(dtype):
    model = gravity_host("qwen2").to("cuda", dtype)
    compiled = torch.compile(model, fullgraph=True)
    inputs = {name: tensor.cuda() for name, tensor in left_padded("qwen2").items()}
    inputs["use_cache"] = False
    error = 1e-3 if dtype == torch.float32 else 0.1
    actual, expected = training_step(compiled, inputs), training_step(model, inputs)
    assert (actual[0] - expected[0]).abs().max() <= error * expected[0].abs().max()
    gradients = (torch.cat([g.flatten() for g in step[1].values()]) for step in (actual, expected))
    compiled_gradient, gradient = gradients
    assert (compiled_gradient - gradient).norm() <= error * gradient.norm()


def refuses_new_graphs(refuses: bool) -> AbstractContextManager[None]:
    return torch._dynamo.config.patch(error_on_recompile=refuses)


def sizes_of(family: str, masked: bool, device: str) -> list[dict[str, Tensor]]:
    """Two sizes, by which torch learns that lengths vary, then shorter and longer ones."""
    batches = []
    for batch, length in ((2, 11), (3, 17), (2, 23), (4, 5), (3, 40)):
        inputs = left_padded(family, batch=batch, length=length)
        if not masked:
            del inputs["attention_mask"]
        batches.append({name: tensor.to(device) for name, tensor in inputs.items()})
    return batches


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "family, masked",
    [("bert", True), ("qwen2", False), ("mistral", True)],
    ids=["bert-padded", "qwen2-unmasked", "mistral-padded"],
)
def test_two_lengths_compile_a_model_for_all(family, masked, device):
    """Words for an error that never came once bound every graph to its lengths."""
    model = gravity_host(family, num_hidden_layers=1).to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the kernels' own
    model.to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    error = 1e-4 if device == "cpu" else 0.05
    for number, inputs in enumerate(sizes_of(family, masked, device)):
        with torch.no_grad(), refuses_new_graphs(number >= 2):
            actual, expected = compiled(**inputs)[0], model(**inputs)[0]
        assert (actual - expected).abs().max() <= error * expected.abs().max()


def test_two_lengths_compile_a_training_step_for_all():
    model = gravity_host("qwen2", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, inputs in enumerate(sizes_of("qwen2", True, "cpu")):
        with refuses_new_graphs(number >= 2):
            assert_same_step(compiled, model, {**inputs, "use_cache": False})


def test_generation_through_a_compiled_forward_gives_the_same_text():
    inputs = left_padded("qwen2")
    model = gravity_host("qwen2", num_hidden_layers=1)
    expected = generate(model, inputs)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    run = generate(model, inputs)
    assert torch.equal(run.text, expected.text) and run.calls == 0 < expected.calls
    torch.testing.assert_close(run.logits, expected.logits, **TOLERANCE)
    of_host = generate(host("qwen2", num_hidden_layers=1), inputs)
    assert (run.logits[:, 0] - of_host.logits[:, 0]).abs().max() > 1e-2
    # The graphs that are there serve a text of another length.
    with refuses_new_graphs(True):
        generate(model, left_padded("qwen2", length=17), max_new_tokens=20)
