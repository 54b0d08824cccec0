"""The metadata block of a card: what the Hub filters, links and ranks models by."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .card_attribution import base_model, licence_link
from .card_public import is_hub_name
from .card_tables import COLUMNS, NO_GRAVITY

# The Hub's names of what was measured.
_TASKS = {"loss": "text-generation", "embeddings": "feature-extraction"}
_DERIVED = ("gap", "control_gap")


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Licence and sources of the host, tags, and what was measured of the finished model."""
    card = facts["host"].get("card") or {}
    is_adapter = facts["saved"] == "adapter"
    results = eval_results(facts)
    return ModelCardData(
        base_model=base_model(facts),
        license=card.get("license"),
        license_name=card.get("license_name"),
        license_link=licence_link(card),
        language=card.get("language") or None,
        datasets=_datasets(facts, card) or None,
        # Under "peft" the Hub shows code that puts an adapter onto an unpatched host.
        library_name="gravity_hf" if is_adapter else "transformers",
        pipeline_tag="text-generation" if facts["host"]["writes"] else None,
        tags=[
            *("gravity-attention", f"gravity-{facts['law']}"),
            *(["lora"] if is_adapter else []),
        ],
        model_name=name if results else None,
        eval_results=results or None,
    )


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """One result per quantity, of the last row that has gravity: what was saved. The host, the
    control and the stages before are other models."""
    evaluation = facts["evaluation"]
    rows = [row for row in (evaluation or {}).get("rows", ()) if row["key"] not in NO_GRAVITY]
    if evaluation is None or not rows:
        return []
    row = rows[-1]
    measure = evaluation["measure"]
    return [
        EvalResult(
            task_type=_TASKS[measure],
            dataset_type=_dataset(facts) or "text",
            dataset_name=evaluation["text"],
            dataset_split="held out",
            dataset_args=_conditions(evaluation),
            metric_type="loss" if key == "loss" else key,
            metric_name=f"{title}: {row['title']}",
            metric_value=row[key],
            metric_args={"row": row["key"], **_attention(row)},
        )
        for title, key, _ in COLUMNS[measure]
        if key in row and key not in _DERIVED
    ]


def _conditions(evaluation: dict[str, Any]) -> dict[str, Any]:
    names = ("digest", "tokens", "length", "stride")
    found = {name: evaluation.get(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _attention(row: dict[str, Any]) -> dict[str, Any]:
    """A quality never stands without how gravitational its attention was."""
    summary = row.get("attention") or {}
    names = ("softness_median", "contrast_median")
    return {name: summary[name] for name in names if name in summary}


def _datasets(facts: dict[str, Any], card: dict[str, Any]) -> list[str]:
    """The host's, then the one that it was converted on, if it is one of the Hub's."""
    own, names = _dataset(facts), [*card.get("datasets", ())]
    if own and own not in names:
        names.append(own)
    return names


def _dataset(facts: dict[str, Any]) -> str | None:
    """The dataset of the conversion, where it is one of the Hub's."""
    own = (facts["settings"] or {}).get("dataset")
    return own if own and not facts.get("dataset_local") and is_hub_name(own) else None
