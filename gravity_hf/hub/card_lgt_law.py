"""The law of an LGT with its own numbers, and what follows from it that the model cannot do."""

from __future__ import annotations

from typing import Any

from ..models.lgt import LGTConfig
from .card_pretrained import validation_text

_SPREAD = 32
_LEARNED = "G is learned, one per head and layer"


def law_text(settings: LGTConfig) -> str:
    """The formulas, with the numbers of this model in them."""
    positions = "p" if settings.length_unit == 1.0 else f"{settings.length_unit:.4g} p"
    lines = [f"s = |{positions}_i - {positions}_j|^2", f"D(i, j) = {_distance(settings)}"]
    others = ", j not i" if settings.exclude_self else ""
    if settings.force_law == "power":
        lines.append(f"weight(i, j) ~ (m_j / D(i, j))^|G|, normalised over j{others}")
        return "\n".join(lines)
    force = "|G| m_i m_j / D(i, j)"
    if settings.max_force is not None and settings.force_cap == "tanh":
        force = f"{settings.max_force:g} tanh({force} / {settings.max_force:g})"
    elif settings.max_force is not None:
        force = f"min({force}, {settings.max_force:g})"
    lines += [f"force(i, j) = {force}", f"weight(i, j) = softmax of force(i, j) over j{others}"]
    return "\n".join(lines)


def constants(settings: LGTConfig) -> str:
    """What the letters are."""
    text = (
        "p: the position of a token, a point in "
        f"{settings.dim_position} dimensions, the same for all layers and heads. m: its mass, "
        "softplus of a learned projection of the token's channels in that head. "
        f"{_LEARNED}."
    )
    if settings.softening == 0:
        return f"{text} Softening 0 is the published law."
    needed = settings.force_law != "power" and not settings.exclude_self and _is_spread(settings)
    does = "is what lets a token see others" if needed else "is added to every distance"
    return f"{text} The softening {settings.softening:g} {does}; the published law has none."


def limits(facts: dict[str, Any]) -> list[str]:
    """Markdown sentences, from what the law is to what was tried with it."""
    settings: LGTConfig = facts["settings"]
    return [
        *_identity(settings),
        _reach(settings),
        _values(settings),
        "A token's place enters only through distances between positions, which are absolute; "
        f"texts of more than {settings.max_position_embeddings:,} tokens are refused.",
        *_causal(settings),
        *_normalisation(settings),
        *_quality(facts),
    ]


def _distance(settings: LGTConfig) -> str:
    horizon, curvature = settings.event_horizon, settings.curvature
    if curvature == 0:
        text = f"s + {horizon:g}"
    else:
        sign = "+" if curvature > 0 else "-"
        wave = f"1 {sign} {abs(curvature):g} cos sqrt(s + {horizon:g})"
        text = f"max(s ({wave}), {horizon:g})"
    return text if settings.softening == 0 else f"{text} + {settings.softening:g}"


def _identity(settings: LGTConfig) -> list[str]:
    if settings.softening > 0 or settings.exclude_self or not _is_spread(settings):
        return []
    return [
        "Without softening a token's force on itself is so much larger than any other that "
        "attention is all but the identity: each token is treated nearly by itself."
    ]


def _is_spread(settings: LGTConfig) -> bool:
    """Whether new positions lie so far apart that tokens hardly feel each other; in fewer
    dimensions they do."""
    return settings.dim_position >= _SPREAD or settings.position_type == "fractal"


def _reach(settings: LGTConfig) -> str:
    if settings.force_law == "power":
        return (
            "What a token attends to does not depend on what it is: in one head the weights of a "
            "row come from the masses of the others and their distances alone."
        )
    return (
        "The force is symmetric, and a product of one number per token with a fixed table of "
        "distances: what a token attends to depends on what it is only through its own mass, "
        "which acts as a temperature."
    )


def _values(settings: LGTConfig) -> str:
    if settings.value_projection:
        return "Queries and keys do not exist; values are a projection of all channels."
    return (
        "Queries, keys and value projections do not exist: what a head passes on are its own "
        "channels of the tokens."
    )


def _causal(settings: LGTConfig) -> list[str]:
    if settings.is_causal:
        return []
    return ["It reads in both directions: as a language model it would see what it has to predict."]


def _normalisation(settings: LGTConfig) -> list[str]:
    if settings.force_law == "power":
        return []
    return [
        "Weights grow with the exponential of the force, not with the force: it is not literal "
        "gravity."
    ]


def _quality(facts: dict[str, Any]) -> list[str]:
    if facts["evaluation"] is None:
        known = validation_text(facts["training"])
        return [f"{'Beside that loss its' if known else 'Its'} quality was not measured."]
    return [
        "It knows the text above and nothing else: it continues text of that kind, and follows no "
        "instructions.",
        "The numbers above hold for that text; other text was not measured.",
    ]
