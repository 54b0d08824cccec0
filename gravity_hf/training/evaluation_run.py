"""Measuring a model that lies on disk or on the Hub: the work behind scripts and command line."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..integration.calibration import measure_attention
from ..integration.hosts import gravity_modules
from .any_model import DTYPES, load_any_model, load_any_tokenizer
from .evaluation import (
    Evaluation,
    evaluate_language_model,
    model_conditions,
    require_fitting_ids,
)
from .files import write_json
from .measures import embedding_likeness, pooled_embeddings
from .text import prose_paragraphs, read_texts

_TEXTS_AT_ONCE = 16


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True)
class EvaluationArguments:
    """What to measure, on which text."""

    model: str = field(
        metadata=_help("Gravity checkpoint, adapter folder or plain model; folder or Hub name.")
    )
    against: str | None = field(
        default=None, metadata=_help("Second model, the host say: prints the difference to it.")
    )
    text: list[str] | None = field(
        default=None,
        metadata=_help("Text files to measure on. Default: the help text that Python carries."),
    )
    length: int = field(default=1024, metadata=_help("Tokens that the model sees at once."))
    stride: int | None = field(
        default=None,
        metadata=_help(
            "Tokens from one window to the next. Smaller: more context for each token, more work. "
            "Default: half of length."
        ),
    )
    max_tokens: int = field(
        default=65536, metadata=_help("Read at most so many tokens of the text.")
    )
    prompts: list[str] | None = field(
        default=None, metadata=_help("Let the model continue these; repeatable or a list.")
    )
    max_new_tokens: int = field(default=64, metadata=_help("Tokens of a continuation."))
    temperature: float = field(
        default=0.7, metadata=_help("Of continuations; 0 takes the likeliest token.")
    )
    attention: bool = field(
        default=True, metadata=_help("Measure contrast and KL of gravity attention.")
    )
    paragraphs: int = field(
        default=128, metadata=_help("Models that only read: paragraphs to compare embeddings on.")
    )
    batch_size: int | None = field(
        default=None, metadata=_help("Windows at once. Default: what fits a fixed memory.")
    )
    dtype: str = field(default="auto", metadata=_help("auto, float32, bfloat16 or float16."))
    device: str | None = field(
        default=None,
        metadata=_help("cpu, cuda, cuda:1, mps, ... Default: cuda where there is one."),
    )
    seed: int = field(default=0, metadata=_help("Of the continuations."))
    out: str | None = field(default=None, metadata=_help("JSON file to write."))

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        least = {"length": 2, "max_tokens": 2, "max_new_tokens": 1, "paragraphs": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: expected at least {bound}, got {getattr(self, name)!r}")
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise ValueError(f"stride: expected 1 to length ({self.length}), got {self.stride!r}")


class EvaluationRun(NamedTuple):
    """The model's evaluation, and that of the model it is compared with."""

    evaluation: Evaluation
    against: Evaluation | None

    def table(self) -> str:
        return self.evaluation.table(self.against)

    def to_dict(self) -> dict[str, Any]:
        """`Evaluation.to_dict`; with a second model, `against` like it, and the `difference`."""
        content = self.evaluation.to_dict()
        if self.against is None:
            return content
        content["against"] = self.against.to_dict()
        if self.evaluation.loss is not None and self.against.loss is not None:
            content["difference"] = {
                name: mine - theirs
                for name, mine in self.evaluation.loss._asdict().items()
                if name != "tokens"
                and mine is not None
                and (theirs := getattr(self.against.loss, name)) is not None
            }
        return content


def run_evaluation(arguments: EvaluationArguments) -> EvaluationRun:
    """Load, measure and, with `arguments.out`, write JSON. One model is in memory at a time.

    Models that only read (encoders) are measured by the likeness of their embeddings to those of
    `against`, which they need.

    Raises:
        ValueError: models that cannot be loaded or compared, or too little text.
    """
    if arguments.out and Path(arguments.out).is_dir():
        raise ValueError(f"out: expected the name of a JSON file, {arguments.out!r} is a folder")
    text = read_texts([Path(file) for file in arguments.text] if arguments.text else None)
    model = load_any_model(arguments.model, arguments.dtype, arguments.device)
    tokenizer = load_any_tokenizer(arguments.model)
    if not model.can_generate():
        run = EvaluationRun(_likened(model, tokenizer, text, arguments), None)
    else:
        evaluation = _measured(model, tokenizer, text, arguments, arguments.model)
        # Freed before the second one is loaded.
        del model, tokenizer
        against = None
        if arguments.against:
            other = load_any_model(arguments.against, arguments.dtype, arguments.device)
            own = load_any_tokenizer(arguments.against)
            against = _measured(other, own, text, arguments, arguments.against)
        run = EvaluationRun(evaluation, against)
    if arguments.out:
        write_json(Path(arguments.out), run.to_dict())
    return run


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    arguments: EvaluationArguments,
    name: str,
) -> Evaluation:
    evaluation = evaluate_language_model(
        model,
        tokenizer,
        text,
        length=arguments.length,
        stride=arguments.stride,
        prompts=arguments.prompts or (),
        seed=arguments.seed,
        attention=arguments.attention,
        max_tokens=arguments.max_tokens,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        name=name,
    )
    return replace(evaluation, conditions=evaluation.conditions | _source(arguments, text))


def _likened(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    arguments: EvaluationArguments,
) -> Evaluation:
    """An encoder: its embeddings of paragraphs beside those of `against`."""
    if not arguments.against:
        raise ValueError(
            f"against: expected the host to compare embeddings with, because "
            f"{type(model).__name__} writes no text and has no loss here, got none. Name the model "
            "that it was made from"
        )
    if arguments.prompts:
        raise ValueError(
            f"prompts: expected a model that writes text, got {type(model).__name__}. Leave them "
            "out"
        )
    batches = _paragraphs(model, tokenizer, text, arguments)
    own = pooled_embeddings(model, batches)
    report = None
    if arguments.attention and gravity_modules(model):
        report = measure_attention(model, batches)
    conditions = model_conditions(model) | _source(arguments, text)
    name = type(model).__name__
    del model
    other = load_any_model(arguments.against, arguments.dtype, arguments.device)
    likeness = embedding_likeness(pooled_embeddings(other, batches), own)
    return Evaluation(
        model=f"{arguments.model} ({name})",
        loss=None,
        samples=(),
        attention=report,
        conditions=conditions | {"paragraphs": sum(len(b["input_ids"]) for b in batches)},
        likeness=likeness,
    )


def _paragraphs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    arguments: EvaluationArguments,
) -> list[dict[str, Tensor]]:
    """Batches of paragraphs, those of like length together: less padding to compute."""
    texts = sorted(prose_paragraphs(text)[: arguments.paragraphs], key=len)
    if len(texts) < 2:
        raise ValueError(
            f"text: expected at least 2 paragraphs of prose, got {len(texts)}. Give more text"
        )
    known = getattr(model.config, "max_position_embeddings", None) or arguments.length
    options = {
        "padding": True,
        "truncation": True,
        "max_length": min(arguments.length, known),
        "return_tensors": "pt",
    }
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    batches = [dict(tokenizer(texts[i : i + _TEXTS_AT_ONCE], **options)) for i in starts]
    for batch in batches:
        require_fitting_ids(model, batch["input_ids"])
    return batches


def _source(arguments: EvaluationArguments, text: str) -> dict[str, Any]:
    files = ", ".join(arguments.text or ["Python's help text"])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"text": files, "text_sha256": digest}
