"""Masks in compiled and exported models: no graph breaks, and the operator is told the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from torch import Tensor
from transformers import CompileConfig

from gravity_hf import GravityConfig, calibrate, patch_with_gravity

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def gravity_host(family: str, config: GravityConfig | None = None) -> torch.nn.Module:
    model = patch_with_gravity(tiny_host(family), config)
    calibrate(model, [tiny_inputs(family)])
    return model


def recording() -> tuple[Any, list[dict[str, Any]]]:
    """A backend that runs graphs as they are, and a list of what the operator gets in them."""
    calls: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        calls.extend(operator_calls(graph))
        return graph.forward

    return backend, calls


def operator_calls(graph: torch.fx.GraphModule) -> list[dict[str, Any]]:
    calls = []
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "gravity_hf" in str(node.target) and "attention" in str(node.target):
                names = [
                    a.name for a in getattr(node.target, "default", node.target)._schema.arguments
                ]
                calls.append({**dict(zip(names, node.args, strict=False)), **node.kwargs})
    return calls


def shape(argument: Any) -> tuple[int, ...] | None:
    if argument is None:
        return None
    value = argument.meta.get("example_value", argument.meta.get("val"))
    return tuple(value.shape)


def inputs_of(name: str, family: str) -> dict[str, Tensor]:
    inputs = tiny_inputs(family)
    if name == "left":
        inputs["attention_mask"][0, :4] = 0
    if name in ("none", "packed"):
        del inputs["attention_mask"]
    if name == "packed":
        inputs["use_cache"] = False
    return inputs


@pytest.mark.parametrize("family, name, mask, ranges", [
    ("qwen2", "full", (2, 1, 1, 11), (2, 1, 2)),
    ("qwen2", "left", (2, 1, 1, 11), (2, 1, 2)),
    ("bert", "left", (2, 1, 1, 11), (2, 1, 2)),
    ("bert", "none", None, None),
    ("qwen2", "none", None, None),
    # Closures cannot be opened in a graph: packed sequences and windows are dense there.
    ("qwen2", "packed", (2, 1, 11, 11), (2, 11, 2)),
    ("mistral", "left", (2, 1, 11, 11), (2, 11, 2)),
])  # fmt: skip
def test_a_compiled_model_tells_the_operator_what_it_can(family, name, mask, ranges):
    model, inputs = gravity_host(family), inputs_of(name, family)
    backend, calls = recording()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs), **TOLERANCE)
    assert len(calls) == 3
    for call in calls:
        assert (shape(call["mask"]), shape(call["key_ranges"])) == (mask, ranges)
        assert call["causal"] == (family == "qwen2" and name != "packed")


def test_the_gradients_of_a_compiled_model_are_the_eager_ones():
    model, inputs = gravity_host("qwen2"), inputs_of("left", "qwen2")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for runner in (model, compiled):
        model.zero_grad()
        runner(**inputs, labels=inputs["input_ids"]).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_layers_compiled_one_by_one_are_told_what_a_mask_from_outside_says(family):
    """A deferred mask enters a compiled region as a subclass of Tensor, without its values."""
    model, inputs = gravity_host(family), inputs_of("left", family)
    expected = logits(model, inputs)
    backend, calls = recording()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(logits(model, inputs), expected, **TOLERANCE)
    assert calls
    for call in calls:
        assert call["mask"] is None and shape(call["key_ranges"]) == (2, 1, 2) and call["causal"]


def test_layers_compiled_one_by_one_use_the_values_of_a_mask_that_has_them():
    model, inputs = gravity_host("qwen2"), inputs_of("left", "qwen2")
    expected = logits(model, inputs)
    backend, calls = recording()
    for layer in model.model.layers[1:]:
        layer.compile(fullgraph=True, backend=backend)
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["attention_mask"].sum() and None, with_kwargs=True
    )
    torch.testing.assert_close(logits(model, inputs), expected, **TOLERANCE)
    hook.remove()
    assert {shape(call["mask"]) for call in calls} == {(2, 1, 11, 11)}


@pytest.mark.slow
def test_a_graph_break_between_mask_and_layers_changes_nothing():
    model, inputs = gravity_host("qwen2"), inputs_of("left", "qwen2")
    expected = logits(model, inputs)
    layer = model.model.layers[1]
    layer.forward = torch.compiler.disable(layer.forward)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, inputs), expected, **TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_compiled_step_of_generation_reads_the_filled_part_of_a_static_cache(family):
    """`generate` makes the masks outside, and hands them to the compiled forward."""
    model, inputs = gravity_host(family), inputs_of("left", family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    backend, calls = recording()
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(model.generate(**inputs, **options, **static), expected)
    assert calls
    # The window's cache is full: it holds what is seen and nothing else.
    expected = (2, 1, 2) if family == "qwen2" else None
    for call in calls:
        assert call["mask"] is None and shape(call["key_ranges"]) == expected


def test_an_exported_operator_is_told_what_a_compiled_one_is():
    """Unless an implementation is named, what is exported is plain arithmetic: test_export.py."""
    model = gravity_host("qwen2", GravityConfig(implementation="chunked"))
    inputs = inputs_of("left", "qwen2")
    expected = logits(model, inputs)
    model.config.use_cache = False
    exported = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(exported.module()(**inputs).logits, expected, **TOLERANCE)
    calls = operator_calls(exported.graph_module)
    assert [shape(call["mask"]) for call in calls] == [(2, 1, 1, 11)] * 3


def test_checkpointing_inside_a_graph():
    model, inputs = gravity_host("qwen2").train(), inputs_of("left", "qwen2")
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **TOLERANCE)
