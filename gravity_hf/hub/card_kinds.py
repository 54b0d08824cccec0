"""Which of our own models have cards, and what makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from . import (
    card_geolip,
    card_geolip_companion,
    card_geolip_prior,
    card_geolip_text,
    card_lean,
    card_lean_text,
    card_lgt,
    card_lgt_text,
    card_ngt,
    card_ngt_text,
)
from .card_own import model_type_of


class OwnCard(NamedTuple):
    """results_of: of a folder; complete: of these the facts of a card; parts and metadata: of facts
    and a name."""

    results_of: Callable[[Path], dict[str, Any]]
    complete: Callable[[dict[str, Any]], dict[str, Any]]
    parts: Callable[[dict[str, Any], str], dict[str, Any]]
    metadata: Callable[[dict[str, Any], str], ModelCardData]


_KINDS = {
    card_lgt.MODEL_TYPE: OwnCard(
        card_lgt.results_of_lgt,
        card_lgt.complete_lgt,
        card_lgt_text.parts,
        card_lgt_text.metadata,
    ),
    card_ngt.MODEL_TYPE: OwnCard(
        card_ngt.results_of_ngt,
        card_ngt.complete_ngt,
        card_ngt_text.parts,
        card_ngt_text.metadata,
    ),
    card_geolip.MODEL_TYPE: OwnCard(
        card_geolip.results_of_geolip,
        card_geolip.complete_geolip,
        card_geolip_text.parts,
        card_geolip_text.metadata,
    ),
    card_geolip_companion.MODEL_TYPE: OwnCard(
        card_geolip_companion.results_of_companion,
        card_geolip_companion.complete_companion,
        card_geolip_companion.parts,
        card_geolip_companion.metadata,
    ),
    card_geolip_prior.MODEL_TYPE: OwnCard(
        card_geolip_prior.results_of_prior,
        card_geolip_prior.complete_prior,
        card_geolip_prior.parts,
        card_geolip_prior.metadata,
    ),
    card_lean.MODEL_TYPE: OwnCard(
        card_lean.results_of_leanformer,
        card_lean.complete_leanformer,
        card_lean_text.parts,
        card_lean_text.metadata,
    ),
}


def card_kind(results: Mapping[str, Any]) -> OwnCard | None:
    """What makes a card of results of such a model; None for those of a conversion."""
    return _KINDS.get(str(results.get("model_type")))


def kind_of_folder(folder: Path) -> OwnCard | None:
    """What makes a card of a saved model; None for a conversion, and what has no card."""
    return _KINDS.get(str(model_type_of(folder)))
