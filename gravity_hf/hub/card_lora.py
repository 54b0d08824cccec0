"""The results of scripts/train_lora.py in the words of a conversion's: one card for both."""

from __future__ import annotations

from typing import Any

_TITLES = (
    ("before", "loss_before", "gravity, before LoRA"),
    ("healed", "loss_after", "gravity, after LoRA"),
)


def is_lora_run(results: dict[str, Any]) -> bool:
    """Whether results.json describes a LoRA run, which has no `host`, and no conversion."""
    return "host" not in results and "model" in results


def facts_of_lora(results: dict[str, Any]) -> dict[str, Any]:
    """What such results say, under the keys of a conversion's; the rest is in the adapter's files.

    There is no control, and attention was not measured: both stay None.
    """
    run, training = results["settings"], results["training"]
    settings = {
        **{key: run[key] for key in ("seed", "length", "samples", "batch_size", "accumulation")},
        **{f"lora_{key}": run[key] for key in ("steps", "rank", "alpha", "learning_rate")},
        **{"dataset": run.get("dataset"), "anneal_to": None, "fit": False},
    }
    return {
        "settings": settings,
        "calibration": results["model"]["calibration"],
        "training": {"transfer": None, "lora": {**training, "objective": None}, "control": None},
        "evaluation": _evaluation(results["evaluation"], training, run),
        "conditions": results["conditions"],
    }


def _evaluation(
    measured: dict[str, Any] | None, training: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {
        "measure": "loss",
        "text": training["text"],
        "digest": training["digest"],
        "tokens": None,
        "examples": measured["examples"],
        "length": run["length"],
        "stride": None,
        "attention_batches": None,
        "rows": [{"key": k, "title": title, "loss": measured[name]} for k, name, title in _TITLES],
        "samples": [],
    }
