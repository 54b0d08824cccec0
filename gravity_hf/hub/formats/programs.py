"""The computation of a model as a function of tensors alone, and its torch.export program."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .source import Source, forward_arguments

KeysAndValues = list[tuple[Tensor, Tensor]]
Inputs = dict[str, Any]

CACHE = "past_key_values"
# Sizes by which a traced graph can tell its axes apart, none of them 0 or 1.
_BATCH, _LENGTH, _PAST = 3, 5, 7


class WholePass(nn.Module):
    """One pass of a model without a cache; its output tensors by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if "use_cache" in forward_arguments(model) else {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        # By name, not as `**inputs`: torch.export has no dynamic shapes for those.
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
        }
        given = {name: value for name, value in named.items() if value is not None}
        output = self.model(**given, **self.options, return_dict=True)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}


class DecoderStep(nn.Module):
    """A decoder over new tokens and a cache given as tensors: prefill, and every step after it.

    Inputs: `input_ids` and `position_ids` `[B, T]`, `attention_mask` `[B, P + T]` (1 = real token),
    `past_key_values`: for each layer keys `[B, Hkv, P, D]` and values `[B, Hkv, P, Dv]`. `P = 0` is
    the prefill. Outputs: logits `[B, T, vocabulary]` and the cache, longer by T.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # The newer name of the same argument; the older one still works, with a warning.
        self.cache_name = "cache" if "cache" in forward_arguments(model) else CACHE

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: KeysAndValues | None = None,
    ) -> tuple[Tensor, KeysAndValues]:
        cache = DynamicCache(past_key_values)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **positions,
            **{self.cache_name: cache},
        )
        return output.logits, [(layer.keys, layer.values) for layer in cache.layers]


def empty_cache(model: PreTrainedModel, batch: int, length: int = 0) -> KeysAndValues:
    """Keys and values `[batch, Hkv, length, D]` of every layer that keeps any, random.

    ValueError for a model whose layers keep anything else, such as a recurrent state.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 2, dtype=torch.long)
    step = DecoderStep(model)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **{step.cache_name: cache})
    others = {type(x).__name__ for x in cache.layers if type(x) not in _LAYERS}
    if others:
        raise ValueError(
            f"export: expected a decoder whose layers all keep keys and values, got "
            f"{type(model).__name__}, which keeps {', '.join(sorted(others))}. Use it in "
            "transformers, or a format of weights: fp16, bf16, int8"
        )

    def like(x: Tensor) -> Tensor:
        return torch.randn(batch, x.shape[1], length, x.shape[3], dtype=x.dtype)

    return [(like(layer.keys), like(layer.values)) for layer in cache.layers]


_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in forward_arguments(model)


def trace(source: Source, example: Inputs) -> tuple[torch.export.ExportedProgram, Inputs]:
    """The program, and the names of its dynamic axes in the structure of its inputs.

    Args:
        source: a decoder, an encoder or a vision model.
        example: inputs of one pass; decoders make their own, with a cache.
    """
    if source.kind == "encoder-decoder":
        raise ValueError(
            f"export: expected a decoder, an encoder or a vision model, got "
            f"{type(source.model).__name__}, an encoder-decoder, whose two caches no program here "
            "carries. Use transformers, or a format of weights: fp16, bf16, int8"
        )
    if source.model._can_set_experts_implementation():
        # The loop over experts asks which were chosen, which a graph cannot know.
        source.model.set_experts_implementation("batched_mm")
    module: nn.Module
    if source.kind == "decoder":
        module, inputs = DecoderStep(source.model), _decoder_example(source.model)
        axes = _decoder_axes(inputs)
    else:
        module, inputs = WholePass(source.model), _with_rows(example, _BATCH)
        names = {0: "batch"} if source.kind == "vision" else {0: "batch", 1: "length"}
        axes = dict.fromkeys(inputs, names)
    # AUTO lets the tracer relate axes, and fix them; that none was is checked below.
    free = torch.utils._pytree.tree_map_only(str, lambda _: torch.export.Dim.AUTO, axes)
    with torch.no_grad(), quiet_exporters(), plain_errors(source, "torch.export cannot trace"):
        program = torch.export.export(module, (), inputs, dynamic_shapes=free, strict=False)
    _require_dynamic(source, program, inputs, axes)
    strip(program)
    return program, axes


def _decoder_example(model: PreTrainedModel) -> Inputs:
    ids = torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) % model.config.vocab_size
    mask = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long)
    inputs: Inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions(model):
        positions = torch.arange(_PAST, _PAST + _LENGTH)
        inputs["position_ids"] = positions.expand(_BATCH, -1).contiguous()
    return inputs | {CACHE: empty_cache(model, _BATCH, _PAST)}


def _decoder_axes(inputs: Inputs) -> Inputs:
    axes: Inputs = {name: {0: "batch", 1: "length"} for name in inputs if name != CACHE}
    axes["attention_mask"] = {0: "batch", 1: "past_and_length"}
    kept = {0: "batch", 2: "past"}
    return axes | {CACHE: [(kept, kept) for _ in inputs[CACHE]]}


def _with_rows(example: Inputs, rows: int) -> Inputs:
    """The example with so many rows, its first one repeated; not 1, which would become fixed."""
    return {name: x[:1].repeat_interleave(rows, 0) for name, x in example.items()}


def _require_dynamic(
    source: Source, program: torch.export.ExportedProgram, inputs: Inputs, axes: Inputs
) -> None:
    """ValueError where the trace fixed an axis that must stay free."""
    wanted = [x for x in torch.utils._pytree.tree_leaves(axes, is_leaf=_is_axes) if _is_axes(x)]
    names = program.graph_signature.user_inputs
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for name, axis_names in zip(names, wanted, strict=True):
        for axis, meaning in axis_names.items():
            if not isinstance(nodes[name].meta["val"].shape[axis], torch.SymInt):
                raise ValueError(
                    f"export: expected a program for every {meaning}, but "
                    f"{type(source.model).__name__} computes with a fixed one (axis {axis} of "
                    f"{name}). Use transformers, or a format of weights: fp16, bf16, int8"
                )


def _is_axes(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(key, int) for key in x)


def strip(program: torch.export.ExportedProgram) -> None:
    """Take out what refuses valid inputs, is no arithmetic, or is nobody's business.

    Sums of lengths are bounded from below by the smallest example sizes, which would refuse prompts
    of one token; every cast asserts its input's dtype, with an operator that is not core; every
    node remembers the folders of the machine that traced it; and the example is saved as a pickle.
    """
    program.example_inputs = None
    for symbol in [s for s in program.range_constraints if not s.is_Symbol]:
        del program.range_constraints[symbol]
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()


@contextmanager
def plain_errors(source: Source, what: str) -> Iterator[None]:
    """What an exporter throws, of whatever kind, as a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        lines = [line.strip() for line in str(first).splitlines() if line.strip()]
        raise ValueError(
            f"export: {what} {type(source.model).__name__}: {type(first).__name__}, "
            f"{lines[0] if lines else 'no reason given'}. Use another format, or transformers"
        ) from error


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Exporters warn of their own internals, and of packages that a model does not use."""
    import logging

    names = ("torch.onnx", "torch.export", "torch._export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
