"""What the record of a training from scratch says to a card, where nobody measured more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .tensor_files import read_json

# What `training.pretraining` writes beside the model as it was last.
RECORD_FILE = "pretrain.json"


def results_of_record(folder: Path, model_type: str) -> dict[str, Any]:
    """`training` and `conditions` as results.json has them; empty without a record of this type."""
    file = folder / RECORD_FILE
    record = read_json(file) if file.is_file() else {}
    arguments = record.get("arguments", {})
    if arguments.get("architecture") != model_type:
        return {}
    given, text = record["training"], record["text"]
    steps, length = given["max_steps"], arguments["length"]
    warmup = given["warmup_steps"]
    training = {
        "seed": record["seed"],
        "steps": steps,
        "rows": record["tokens"] // (steps * length),
        "length": length,
        "tokens": record["tokens"],
        # Below 1 it is a share of the steps.
        "warmup_steps": int(warmup) if warmup >= 1 else math.ceil(warmup * steps),
        "learning_rate": given["learning_rate"],
        # Nobody wrote down which others there were.
        "learning_rates_tried": [],
        "weight_decay": given["weight_decay"],
        "bfloat16": bool(given["bf16"]),
        "schedule": _schedule(given),
        "text": text["description"],
        "digest": text["digest"],
        "repulsion_weight": arguments.get("repulsion_weight", 0.0),
        "validation": {
            "nats_per_token": record["loss"],
            "bits_per_byte": record["loss"] / text["bytes_per_token"] / math.log(2),
        },
    }
    return {"training": training, "conditions": record["conditions"]}


def validation_text(training: dict[str, Any] | None) -> str | None:
    """A sentence, the loss at the end of training; None where it is not recorded."""
    found = (training or {}).get("validation")
    if found is None:
        return None
    return (
        f"Loss on the held-out part of the text at the end of training: "
        f"{found['nats_per_token']:.4f} nats per token, about {found['bits_per_byte']:.4f} bits "
        "per byte."
    )


def rate_text(training: dict[str, Any]) -> str:
    """How the learning rate was chosen, a sentence with a space before it; empty if unknown."""
    tried = ", ".join(f"{rate:g}" for rate in training["learning_rates_tried"])
    return f" The rate is the best of {tried} on another seed." if tried else ""


def _schedule(given: dict[str, Any]) -> str:
    kind, least = given["lr_scheduler_type"], (given["lr_scheduler_kwargs"] or {})
    if kind == "cosine":
        return "a cosine to 0"
    if kind == "cosine_with_min_lr" and "min_lr_rate" in least:
        return f"a cosine to {least['min_lr_rate']:g} of it"
    return f"the schedule {kind!r}"
