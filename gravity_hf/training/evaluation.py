"""What a language model is worth: loss with a stride, samples, and how gravitational it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..integration.calibration import measure_attention
from ..integration.calibration_report import CalibrationReport
from ..integration.hosts import gravity_modules
from .conditions import run_conditions
from .evaluation_table import evaluation_table
from .samples import generation_samples
from .strided import LossResult, strided_loss
from .tokenizing import text_pieces

__all__ = [
    "Evaluation",
    "LossResult",
    "evaluate_language_model",
    "generation_samples",
    "model_conditions",
    "require_fitting_ids",
    "strided_loss",
]

_ATTENTION_WINDOWS = 4


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model, and under which conditions.

    `loss`: None for models that only read. `likeness`: of their embeddings to another model's, see
    `embedding_likeness`. `attention`: present contrast and KL, None where nothing is gravitational
    or nobody asked. `samples`: dicts with `prompt` and `text`. `conditions`: device, dtype,
    versions, date, text.
    """

    model: str
    loss: LossResult | None
    samples: tuple[dict[str, str], ...]
    attention: CalibrationReport | None
    conditions: dict[str, Any]
    likeness: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. `attention` has `settings`, `summary` and `rows`, one per head."""
        report = self.attention
        return {
            "model": self.model,
            "loss": None if self.loss is None else self.loss._asdict(),
            "likeness": self.likeness,
            "attention": None
            if report is None
            else {
                "settings": report.settings.to_dict(),
                "summary": report.summary(),
                "rows": list(report.rows),
            },
            "samples": list(self.samples),
            "conditions": self.conditions,
        }

    def table(self, against: Evaluation | None = None) -> str:
        """Fixed-width text, a measure a line; with `against`, that model's and the difference."""
        return evaluation_table(self.to_dict(), None if against is None else against.to_dict())


def evaluate_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_or_ids: str | Tensor | Sequence[int],
    *,
    length: int = 1024,
    stride: int | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    attention: bool = True,
    max_tokens: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    batch_size: int | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Loss, samples and, for gravity models, present contrast and KL to dot product.

    Args:
        model: causal, patched or not, under LoRA or not.
        tokenizer: the model's.
        text_or_ids: text, or its ids `[tokens]`, for which there are no bits per byte.
        length, stride: see `strided_loss`; a stride of None is half the length. `length` is
            lowered to what the model takes and to the text.
        prompts, seed, max_new_tokens, temperature: see `generation_samples`.
        attention: measure gravity on a few windows of the text; costs little beside the loss.
        max_tokens: read at most so many tokens from the beginning.
        batch_size: windows at once; None takes what fits a fixed amount of memory.
        name: of the model in table and JSON; its class if None.
        progress: True or False; None shows bars on terminals only.

    Raises:
        ValueError: too little text, ids outside the model's vocabulary, numbers out of range.
    """
    ids, text_bytes = _ids(tokenizer, text_or_ids, max_tokens)
    require_fitting_ids(model, ids)
    length = min(length, _positions(model) or length, len(ids))
    stride = max(length // 2, 1) if stride is None else min(stride, length)
    bars = {"progress": progress}
    loss = strided_loss(
        model, ids, length, stride, text_bytes=text_bytes, batch_size=batch_size, **bars
    )
    report = None
    if attention and gravity_modules(model):
        report = measure_attention(model, _spread(ids, length), **bars)
    samples = generation_samples(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    settings = {"length": length, "stride": stride, "tokens_read": len(ids), "seed": seed}
    return Evaluation(
        model=name or type(model).__name__,
        loss=loss,
        samples=samples,
        attention=report,
        conditions=model_conditions(model) | settings,
    )


def model_conditions(model: nn.Module) -> dict[str, Any]:
    """Conditions of this run with the model's dtype and size."""
    first = next(model.parameters())
    return {
        **run_conditions(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def require_fitting_ids(model: PreTrainedModel, ids: Tensor) -> None:
    known = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= known:
        raise ValueError(
            f"evaluate: expected token ids below {known}, the model's vocabulary, got "
            f"{int(ids.max())}. Use the model's own tokenizer"
        )


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    text_or_ids: str | Tensor | Sequence[int],
    most: int | None,
) -> tuple[Tensor, int | None]:
    """At most `most` ids, and the bytes that they stand for where that is known."""
    if not isinstance(text_or_ids, str):
        return torch.as_tensor(text_or_ids).long().flatten()[:most], None
    ids: list[int] = []
    read = 0
    for piece in text_pieces(text_or_ids):
        left = None if most is None else most - len(ids)
        if left == 0:
            break
        options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        encoded = tokenizer(piece, add_special_tokens=False, verbose=False, **options)
        found = encoded["input_ids"]
        ids += found[:left]
        if left is not None and len(found) > left:
            if not tokenizer.is_fast:
                return torch.tensor(ids), None
            piece = piece[: encoded["offset_mapping"][left - 1][1]]
        read += len(piece.encode())
    return torch.tensor(ids, dtype=torch.long), read


def _spread(ids: Tensor, length: int) -> list[dict[str, Tensor]]:
    """A few windows from evenly spaced places, as batches."""
    count = min(_ATTENTION_WINDOWS, max(1, len(ids) // length))
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [{"input_ids": ids[start : start + length][None]} for start in starts]


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)
