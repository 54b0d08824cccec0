"""The sentences of a card of a LeanFormer, each said only where the facts hold what it says."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from ..integration.own_lean import leanformer_in_words
from ..models.leanformer import LeanFormerConfig
from .card_law import NOT_MEASURED
from .card_lean import COLUMNS, MODEL_TYPE
from .card_lgt_text import comparison, eval_results
from .card_own_text import (
    causal_loading,
    class_of,
    constants_table,
    own_metadata,
    own_parts,
    training_text,
)
from .card_pretrained import validation_text
from .card_words import counted

_LEGEND = (
    "All others were trained by the same recipe on the same windows in the same order, each with "
    "the best of the same learning rates"
)
_UNKNOWN_WEIGHTS = "Whose weights these are is not recorded; a factorised model has its host's."
_DOT_PRODUCT = "weight(i, j) = softmax of q_i.k_j / sqrt(d) over the keys j that i looks at"
_LAWS = {
    "power": "weight(i, j) ~ 1 / (d2(i, j) + e)^g, normalised over the keys j that i looks at",
    "force": "weight(i, j) = softmax of g / (d2(i, j) + e) over the keys j that i looks at",
}


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings: LeanFormerConfig = facts["settings"]
    said = {
        "introduction": introduction(facts),
        "law_text": law_text(settings),
        "constants": constants(settings),
        "layers": layer_table(facts),
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": comparison(facts, _LEGEND),
        "loading": causal_loading(facts, name, "LeanFormerModel", "a LeanFormer"),
        "limits": limits(facts),
    }
    return own_parts(facts, MODEL_TYPE, said, _UNKNOWN_WEIGHTS)


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, and what was measured of this model alone."""
    gravity = ["gravity-attention"] if facts["settings"].attention == "gravity" else []
    tags = [*gravity, MODEL_TYPE]
    return own_metadata(facts, name, tags, eval_results(facts))


def introduction(facts: dict[str, Any]) -> str:
    """What it is. Without a training the folder cannot tell where its weights came from."""
    settings: LeanFormerConfig = facts["settings"]
    how = "by how near keys are" if settings.attention == "gravity" else "by dot products"
    origin = " It was not converted from another model." if facts["training"] else ""
    return (
        f"{_class(facts)}: a decoder with factorised maps, which chooses for each token the keys "
        f"it looks at, the neurons it uses and the layers it goes through. It attends {how}."
        f"{origin}"
    )


def law_text(settings: LeanFormerConfig) -> str:
    """The formula of its attention."""
    if settings.attention != "gravity":
        return _DOT_PRODUCT
    return f"d2(i, j) = |q_i - k_j|^2\n{_LAWS[settings.gravity_law]}"


def constants(settings: LeanFormerConfig) -> str:
    """What the letters are, and what is chosen."""
    chosen = [f"{line[0].upper()}{line[1:]}." for line in leanformer_in_words(settings)[1:]]
    if settings.attention != "gravity":
        return " ".join(["There is no gravity in it.", *chosen])
    softening = f"fixed, {settings.softening_start:g}"
    if settings.learn_softening:
        softening = f"learned per head and layer, {settings.softening_start:g} at the start"
    letters = (
        "g: strength, the softplus of a learned number, one per head and layer. e: softening, a "
        f"squared distance, {softening}."
    )
    return " ".join([letters, *chosen])


def layer_table(facts: dict[str, Any]) -> str:
    """Markdown: the learned constants of every layer."""
    if facts["settings"].attention != "gravity":
        return "It has no constants of gravity."
    return constants_table(facts["layers"], COLUMNS, "g has no unit, e is a squared distance.")


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings: LeanFormerConfig = facts["settings"]
    count = facts["parameters"]
    heads = f"{settings.num_attention_heads}, {settings.num_key_value_heads}"
    return [
        (
            "class, weights",
            ", ".join(filter(None, (_class(facts), facts["host"]["dtype"]))),
        ),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("layers", str(settings.num_hidden_layers)),
        ("query heads, KV heads", heads),
        ("width, of the network inside", f"{settings.hidden_size}, {settings.intermediate_size}"),
        ("rank of attention's maps", _rank(settings.attention_rank)),
        ("rank of the network's maps", _rank(settings.feed_forward_rank)),
        ("tokens it knows", f"{settings.vocab_size:,}"),
        ("longest text", _longest(settings)),
        ("reads", "forwards only (causal)"),
    ]


def recipe(facts: dict[str, Any]) -> list[str]:
    """How it was trained, where that is recorded."""
    return training_text(facts)


def limits(facts: dict[str, Any]) -> list[str]:
    """Markdown sentences, from what it leaves out to what was tried with it."""
    settings: LeanFormerConfig = facts["settings"]
    said = []
    if settings.screening != "none":
        said.append(
            "What its screening does not choose is not read: of a long text a token sees a part."
        )
    if settings.feed_forward_policy == "dense":
        said.append("All neurons are computed unless a policy says otherwise: nothing is saved.")
    elif settings.feed_forward_policy == "masked":
        said.append("Neurons that are left out are computed all the same: nothing is saved.")
    if settings.exit_threshold is None:
        said.append("No token leaves early: no threshold is set.")
    said.append(f"Longest text: {_longest(settings)}.")
    if facts["evaluation"] is None:
        known = validation_text(facts["training"])
        return [*said, f"{'Beside that loss its' if known else 'Its'} quality was not measured."]
    return [*said, "The numbers above hold for that text; other text was not measured."]


def _rank(rank: int) -> str:
    return "dense" if rank == 0 else str(rank)


def _longest(settings: LeanFormerConfig) -> str:
    limit = counted(settings.max_position_embeddings, "token")
    return limit if settings.position == "learned" else f"any; meant for {limit}"


def _class(facts: dict[str, Any]) -> str:
    return class_of(facts, "LeanFormerModel")
