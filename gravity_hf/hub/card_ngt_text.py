"""The sentences of a card of NGT, each said only where the facts hold what it says."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from ..models.ngt import NGTConfig
from .card_law import NOT_MEASURED
from .card_lgt_text import comparison, eval_results
from .card_ngt import COLUMNS, MODEL_TYPE
from .card_ngt_law import constants, law_text, limits
from .card_own_text import (
    causal_loading,
    class_of,
    constants_table,
    own_metadata,
    own_parts,
    training_text,
)
from .card_words import counted

_LEGEND = (
    "All others were trained by the same recipe on the same windows in the same order, each with "
    "the best of the same learning rates"
)


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings: NGTConfig = facts["settings"]
    said = {
        "introduction": introduction(facts),
        "law_text": law_text(settings),
        "constants": constants(settings),
        "layers": layer_table(facts),
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": comparison(facts, _LEGEND),
        "loading": causal_loading(facts, name, "NGTModel", "an NGT"),
        "limits": limits(facts),
    }
    return own_parts(facts, MODEL_TYPE, said)


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, and what was measured of this model alone."""
    tags = [*([] if facts["settings"].is_twin else ["gravity-attention"]), MODEL_TYPE]
    return own_metadata(facts, name, tags, eval_results(facts))


def introduction(facts: dict[str, Any]) -> str:
    """What it is. Without a training the folder cannot tell where its weights came from."""
    origin = " It was not converted from another model." if facts["training"] else ""
    if facts["settings"].is_twin:
        return (
            f"{_class(facts)} with dot-product attention: the twin that a Newton Gravity "
            f"Transformer of the same shape is compared with. It has no gravity.{origin}"
        )
    return (
        f"{_class(facts)}: a Newton Gravity Transformer. Tokens are particles: each has a mass, "
        "and coordinates that move from layer to layer; a token attends to others by their masses "
        "and by how near they are, and there is no dot product of queries and keys."
        f"{origin}"
    )


def layer_table(facts: dict[str, Any]) -> str:
    """Markdown: the learned constants of every layer."""
    if facts["settings"].is_twin:
        return "It has no constants of gravity."
    legend = (
        "g, mu and beta have no unit, e is a squared distance, r a distance, l, of the heads that "
        "have it, is in nats for each token."
    )
    return constants_table(facts["layers"], COLUMNS, legend)


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings: NGTConfig = facts["settings"]
    count = facts["parameters"]
    rows = [
        (
            "class, weights",
            ", ".join(filter(None, (_class(facts), facts["host"]["dtype"]))),
        ),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("layers, heads", f"{settings.num_hidden_layers}, {settings.num_attention_heads}"),
        ("width, of the network inside", f"{settings.hidden_size}, {settings.intermediate_size}"),
        ("tokens it knows", f"{settings.vocab_size:,}"),
        ("longest text", _longest(settings)),
        ("reads", "forwards only (causal)"),
    ]
    if settings.is_twin:
        return [*rows, ("positions", settings.positions)]
    widths = f"{settings.coord_dim}, {settings.head_coord_dim}"
    return [
        *rows[:4],
        ("coordinates, in a head", widths),
        *rows[4:],
        ("cutoff", "none" if settings.cutoff == "none" else settings.cutoff),
    ]


def recipe(facts: dict[str, Any]) -> list[str]:
    """How it was trained, where that is recorded."""
    dropout = f"; dropout {facts['settings'].dropout:g}"
    return training_text(facts, dropout=dropout, more=_repulsion(facts["training"] or {}))


def _repulsion(training: dict[str, Any]) -> str:
    weight = training.get("repulsion_weight")
    return f" Its coordinates repelled each other in training, weight {weight:g}." if weight else ""


def _longest(settings: NGTConfig) -> str:
    limit = counted(settings.max_position_embeddings, "token")
    if settings.crop_long_inputs:
        return f"any, of which it reads the last {limit}"
    return limit if settings.has_position_table else f"any; meant for {limit}"


def _class(facts: dict[str, Any]) -> str:
    return class_of(facts, "NGTModel")
