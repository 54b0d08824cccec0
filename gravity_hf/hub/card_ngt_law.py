"""The law of an NGT with its own numbers, and what follows from it that the model cannot do."""

from __future__ import annotations

from typing import Any

from ..models.ngt import NGTConfig
from .card_pretrained import validation_text
from .card_words import counted

_TWIN = "weight(i, j) = softmax of q_i.k_j / sqrt(d){bias} over j <= i"


def law_text(settings: NGTConfig) -> str:
    """The formulas, with the numbers of this model in them; of a twin its ordinary attention."""
    if settings.is_twin:
        bias = " - slope_h (i - j)" if settings.positions == "alibi" else ""
        return _TWIN.format(bias=bias)
    others = "j < i" if settings.exclude_self else "j <= i"
    hidden = ", d2 <= r^2" if settings.cutoff == "hard" else ""
    score = _score(settings)
    if settings.law == "power" and settings.cutoff != "log":
        weight = f"weight(i, j) ~ {score}, normalised over {others}{hidden}"
    else:
        log = f"ln({score})" if settings.law == "power" else score
        weight = f"weight(i, j) = softmax of {log}{_cut(settings)} over {others}{hidden}"
    lines = ["d2(i, j) = |c_i - c_j|^2", weight, *_coordinates(settings)]
    return "\n".join(lines)


def constants(settings: NGTConfig) -> str:
    """What the letters are."""
    if settings.is_twin:
        return (
            "Queries, keys and values are projections of the hidden state: it is an ordinary "
            "transformer, of the shape of an NGT, made to compare with. There is no gravity in it."
        )
    softening = f"fixed, {settings.softening:g}"
    if settings.learn_softening:
        softening = f"learned per head and layer, {settings.softening:g} at the start"
    said = [
        f"c: the {settings.head_coord_dim} coordinates of a token in a head; z: its "
        f"{settings.coord_dim} coordinates in a layer; p: its place, {_place(settings)}; h: its "
        "hidden state; a: what attention gave it.",
        "g: strength, the softplus of a learned number, one per head and layer. e: softening, a "
        f"squared distance, {softening}.",
    ]
    if settings.token_masses:
        where = " It multiplies the values." if settings.mass_in_value else ""
        said.append(f"m: mass, the softplus of one learned number for each token type.{where}")
    if settings.fading_heads:
        said.append(
            "l: how fast what is older fades, in nats for each token, learned in the last "
            f"{counted(settings.fading_heads, 'head')} of a layer and 0 in the others."
        )
    if settings.cutoff != "none":
        said.append("r: the radius, the softplus of a learned number, one per layer.")
    return " ".join(said)


def limits(facts: dict[str, Any]) -> list[str]:
    """Markdown sentences, from what the law is to what was tried with it."""
    settings: NGTConfig = facts["settings"]
    own = [] if settings.is_twin else [*_identity(settings), *_force(settings), *_sight(settings)]
    return [*own, _reach(settings), *_quality(facts)]


def _score(settings: NGTConfig) -> str:
    masses = settings.token_masses and not settings.mass_in_value
    if settings.law == "power":
        mass = f"m_j{'^mu' if settings.has_mass_exponent else ''}" if masses else ""
        faded = "exp(-l (i - j))" if settings.fading_heads else ""
        return f"{' '.join(filter(None, (mass, faded))) or '1'} / (d2(i, j) + e)^g"
    force = f"{'-' if settings.repulsive else ''}g / (d2(i, j) + e)"
    if not masses:
        return f"{force} + beta" if settings.head_bias else force
    return f"({force} + beta) m_i m_j" if settings.head_bias else f"{force} m_i m_j"


def _cut(settings: NGTConfig) -> str:
    if settings.cutoff == "log":
        return f" + ln sigmoid((r^2 - d2) / {settings.cutoff_width:g})"
    return " times max(1 - d2 / r^2, 0)" if settings.cutoff == "soft" else ""


def _coordinates(settings: NGTConfig) -> list[str]:
    own = ["Wc z", *(["Wa p"] if settings.anchor_coordinates else [])]
    own += ["Wu LN(h)"] if settings.hidden_head_coordinates else []
    start = "LN(p + Wcc LN(h))" if settings.content_coordinates else "p"
    moved = {
        "hidden": "z <- LN(z + Wn a + Wh LN(h))",
        "attention": "z <- LN(z + Wn a)",
        "pre_attention": "z <- LN(z + Wn LN(h))",
        "none": "z stays as it is",
    }[settings.coordinate_source]
    maps = f"    ({_key_maps(settings)})" if settings.key_heads else ""
    return [
        f"c = {' + '.join(own)} + b{maps}",
        f"z = {start} before the first layer; after a layer {moved}",
    ]


def _key_maps(settings: NGTConfig) -> str:
    began = ", which began as copies" if settings.shared_start else ""
    shared = settings.num_attention_heads - settings.key_heads
    where = "head" if shared == 1 else counted(shared, "head")
    last = f"; in the last {where}, those of queries" if shared else ""
    return f"keys have maps of their own{began}{last}"


def _place(settings: NGTConfig) -> str:
    if settings.coordinate_positions == "sinusoidal":
        return f"sine waves of its position, of base {settings.position_base:g}"
    start = " that started as sine waves" if "sinus" in settings.coordinate_positions else ""
    return f"a row of a learned table{start}"


def _identity(settings: NGTConfig) -> list[str]:
    content = settings.content_coordinates or settings.hidden_head_coordinates
    source = settings.coordinate_source
    unseen = settings.exclude_self or settings.repulsive
    if not content and (source == "none" or (source == "attention" and unseen)):
        return [
            "What a token is never enters its coordinates, so that what it attends to does not "
            "depend on it, its mass aside: recalling what followed a token is out of its reach."
        ]
    return []


def _force(settings: NGTConfig) -> list[str]:
    if settings.law == "power":
        return []
    said = [
        "Weights grow with the exponential of the force, not with the force: it is not literal "
        "gravity."
    ]
    if settings.repulsive:
        said.append(
            "The force repels, as published: what is near is avoided, and no token can be singled "
            "out for being near."
        )
    if settings.cutoff == "soft":
        said.append("Its soft cutoff hides nothing: beyond the radius scores are 0.")
    return said


def _sight(settings: NGTConfig) -> list[str]:
    said = []
    if settings.exclude_self:
        said.append("A token gives itself no weight, the first one aside, which sees no other.")
    if not settings.key_heads:
        said.append(
            "Distances are symmetric: two tokens are near to each other, or neither is; only "
            "masses and order in the text tell one from the other."
        )
    return said


def _reach(settings: NGTConfig) -> str:
    limit = f"{settings.max_position_embeddings:,}"
    if settings.crop_long_inputs:
        return f"Of a text of more than {limit} tokens it reads the last {limit}."
    if settings.has_position_table:
        return f"Texts of more than {limit} tokens are refused: its positions are a table."
    if settings.is_twin and settings.positions == "none":
        return "It has no positions: what it knows of order is which tokens come before a token."
    return (
        f"Positions are computed for texts of any length; beyond {limit} tokens, what it makes of "
        "them was not measured."
    )


def _quality(facts: dict[str, Any]) -> list[str]:
    if facts["evaluation"] is None:
        known = validation_text(facts["training"])
        return [f"{'Beside that loss its' if known else 'Its'} quality was not measured."]
    return [
        "It knows the text above and nothing else: it continues text of that kind, and follows no "
        "instructions.",
        "The numbers above hold for that text; other text was not measured.",
    ]
