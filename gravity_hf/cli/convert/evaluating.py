"""The step that measures: every stage of the conversion on the same held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...integration.calibration import measure_attention
from ...training.files import write_json
from ...training.measures import embedding_likeness, pooled_embeddings
from ...training.samples import generation_samples
from ...training.strided import strided_loss
from ..console import progress_bar
from ..steps.batches import held_out_loss, measured_tokens
from ..steps.work import read_record
from .context import Context

# Key of each row and what it is, in the order of the table.
TITLES = {
    "host": "the host, dot-product attention",
    "control": "the host with the same LoRA: the control",
    "constants": "gravity, Gravity-2's constants",
    "calibrated": "gravity, calibrated",
    "transferred": "gravity, after attention transfer",
    "healed": "gravity, after LoRA",
}
_ROWS = "rows.json"
# Contrast and KL are means over every pair of tokens: a few windows say them well enough.
_ATTENTION_BATCHES = 4


def evaluate(context: Context, folder: Path) -> dict[str, Any]:
    """Loss (or, for encoders, likeness of embeddings to the host's) and attention of every stage.

    A row that is measured is kept, so that a killed evaluation goes on with the next one.
    """
    if not context.data.held_out:
        raise ValueError(
            "evaluate: expected text that is held out, got none. Set validation_share above 0 or "
            "validation_files, or skip evaluate"
        )
    rows: dict[str, dict[str, Any]] = read_record(folder, _ROWS) or {}
    original = None if context.writes else pooled_embeddings(context.host(), context.data.held_out)
    stages = list(_stages(context))
    with progress_bar(context.console, "Measuring", len(stages)) as advance:
        for key, make in stages:
            if key not in rows:
                rows[key] = {"key": key, "title": TITLES[key], **_row(context, make(), original)}
                write_json(folder / _ROWS, rows)
            advance(TITLES[key])
    arguments = context.settings.evaluation
    samples: tuple[dict[str, str], ...] = ()
    if context.writes and arguments.prompts:
        options = {"max_new_tokens": arguments.prompt_tokens, "temperature": 0.0}
        samples = generation_samples(
            context.final(), context.tokenizer, arguments.prompts, **options
        )
    return {
        "measure": "loss" if context.writes else "embeddings",
        "text": context.data.description,
        "digest": context.data.digest,
        "tokens": sum(measured_tokens(batch) for batch in context.data.held_out),
        "attention_batches": min(_ATTENTION_BATCHES, len(context.data.held_out)),
        "length": context.settings.data.length,
        "stride": arguments.stride,
        "rows": list(rows.values()),
        "samples": list(samples),
    }


def _stages(context: Context) -> Iterator[tuple[str, Any]]:
    skipped = context.work.skipped
    yield "host", context.host
    control = context.result("control")
    if control is not None and "left_out" not in control:
        from .training import controlled

        yield "control", lambda: controlled(context)
    if "calibrate" in skipped:
        yield "constants", lambda: context.gravity_at("patch")
    else:
        yield "calibrated", lambda: context.gravity_at("calibrate")
    if "transfer" not in skipped:
        yield "transferred", lambda: context.gravity_at("transfer")
    if "lora" not in skipped:
        yield "healed", context.final


def _row(context: Context, model: Any, original: Tensor | None) -> dict[str, Any]:
    data, row = context.data, {}
    if original is None:
        row["loss"] = _loss(context, model)
    else:
        row |= embedding_likeness(original, pooled_embeddings(model, data.held_out))
    if any(hasattr(module, "gravity") for module in model.modules()):
        batches = data.held_out[:_ATTENTION_BATCHES]
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        row["attention"] = measure_attention(model, inputs, progress=False).summary()
    return row


def _loss(context: Context, model: nn.Module) -> float:
    stride = context.settings.evaluation.stride
    if stride is None:
        return held_out_loss(model, context.data.held_out)
    ids = torch.cat(context.data.rows)
    length = context.settings.data.length
    return strided_loss(model, ids, length, stride, progress=False).nats_per_token
