"""The model card of a conversion, from its results.json and nothing else: a number that was not
measured has no place in it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..training.files import write_text
from .card_tables import measured
from .card_text import conditions, constants, contrast, law_text, limits, loading, recipe

_CARDS_PACKAGE = "gravity_hf._cards"
_TEMPLATE = "template.md"


def write_card(results_file: Path, target: Path) -> None:
    """Write the card of the conversion that `results_file` describes: whole, or not at all."""
    text = str(model_card(json.loads(results_file.read_text(encoding="utf-8")), target.parent.name))
    write_text(target, text)


def model_card(results: dict[str, Any], name: str) -> ModelCard:
    """The card.

    Args:
        results: as `gravity-hf convert` writes them to results.json.
        name: of the model; the title.
    """
    host, patch = results["host"], results["patch"]
    template = resources.files(_CARDS_PACKAGE).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    evaluation = results["evaluation"] or {}
    return ModelCard.from_template(
        _metadata(results),
        template_str=template,
        title=name,
        host={**host, "parameters": f"{host['parameters']:,}"},
        layers=len(patch["layers"]),
        kept=len(patch["skipped"]),
        version=__version__,
        law_text=law_text(results),
        constants=constants(results),
        contrast=contrast(results),
        recipe=recipe(results),
        measured=measured(results),
        samples=evaluation.get("samples", []),
        conditions=conditions(results),
        command=results["conditions"]["command"],
        loading=loading(results, name),
        limits=limits(results),
    )


def _metadata(results: dict[str, Any]) -> ModelCardData:
    host = results["host"]
    more: dict[str, Any] = {}
    if not Path(host["name"]).expanduser().exists():
        # A folder is no name on the Hub.
        more["base_model"] = host["name"]
    if host["writes"]:
        more["pipeline_tag"] = "text-generation"
    return ModelCardData(
        library_name="peft" if results["saved"] == "adapter" else "transformers",
        tags=["gravity-attention", f"gravity-{results['law']}"],
        **more,
    )
