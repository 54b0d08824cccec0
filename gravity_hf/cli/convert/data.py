"""Text for every step: some to calibrate and to train on, other text to measure on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...training.data import prepare_data
from ..steps.batches import batches_of
from .settings import ConversionSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConversionData:
    """`calibration`, `held_out`: batches of model inputs, with labels where there are some in
    `held_out`. `train`, `collator`: for a trainer. `rows`: held-out examples, one after the other.
    """

    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    rows: list[Tensor]
    train: Dataset
    collator: Any
    description: str
    digest: str


def conversion_data(
    settings: ConversionSettings, tokenizer: PreTrainedTokenizerBase, host: dict[str, Any]
) -> ConversionData:
    """Examples for the host that the step `load` described.

    Raises:
        ValueError: not enough text, or text that does not fit the host.
    """
    arguments = settings.data
    length, samples = arguments.length, settings.gravity.samples
    limits: dict[str, Any] = {}
    if not settings.trains and arguments.max_train_tokens is None:
        # The rest of a long book need not be tokenized.
        limits["max_train_tokens"] = samples * length
    if arguments.max_validation_tokens is None:
        limits["max_validation_tokens"] = settings.evaluation.evaluation_samples * length
    if not host["writes"]:
        # Encoders read whole texts, each on its own.
        limits |= {"packing": "none", "text_unit": "paragraph"}
    prepared = prepare_data(
        tokenizer,
        replace(arguments, **limits),
        max_positions=host["max_positions"],
        vocabulary=host["vocabulary"],
        labels=host["writes"],
    )
    if len(prepared.train) < samples:
        raise ValueError(
            f"samples: expected at least {samples} pieces of {length} tokens to calibrate on, got "
            f"{len(prepared.train)} ({prepared.description}). Give more text, or lower samples or "
            "length"
        )
    most = settings.evaluation.evaluation_samples
    held_out = prepared.validation
    count = 0 if held_out is None else min(len(held_out), most)
    return ConversionData(
        calibration=batches_of(prepared.train, prepared.collator, samples, labels=False),
        held_out=batches_of(held_out, prepared.collator, count),
        rows=[held_out[i]["input_ids"] for i in range(count)] if held_out is not None else [],
        train=prepared.train,
        collator=prepared.collator,
        description=prepared.description,
        digest=prepared.digest,
    )
