"""The law of a model with its own constants, and how gravitational they make it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..config import GravityConfig
from .card_words import counted

NOT_MEASURED = "not measured"

_LAWS = {
    "force": "score(i, j) = M^2 / ({distance} + eps), then softmax over j",
    "power": "weight(i, j) ~ ({distance} + eps)^(-M^2), normalised over j",
}
_DISTANCES = {"euclidean": "|q_i - k_j|^2", "lifted": "(|q_i|^2 + R^2 - 2 q_i.k_j)"}
# Title of a column, key of a row.
_COLUMNS = (("mass M", "mass"), ("softening eps", "softening"), ("key radius R", "key_radius"))
_GRAVITY_2 = GravityConfig()
_CONTRAST_ONE = "Contrast 1 = distance makes no difference"


def law_text(facts: dict[str, Any]) -> str:
    """The formula of this model's law and distance."""
    gravity = facts["gravity"]
    return _LAWS[gravity["law"]].format(distance=_DISTANCES[gravity["distance"]])


def constants(facts: dict[str, Any]) -> str:
    """Where M, eps and R come from."""
    gravity, calibration = facts["gravity"], facts["calibration"]
    if calibration is None and gravity["softness"] is None:
        text = f"Not calibrated: {_per(gravity)}, {_start(gravity)}"
        return f"{text}; {_afterwards(facts)}."
    way = "closed forms" if facts["settings"] else "calibration"
    if gravity["max_kl"] is not None:
        way = f"a budget of {gravity['max_kl']:g} nats of KL to the host's attention per head"
    elif (facts["settings"] or {}).get("fit"):
        way = "a fit of every head to the host's attention"
    said = _per(gravity)
    text = f"{said[0].upper()}{said[1:]}, set by {way}"
    if not gravity["learn_softening"]:
        text += f"; eps = {gravity['epsilon']:g}, fixed"
    if gravity["distance"] == "lifted":
        text += "; R is the length of the longest key seen, per KV head"
    text += f"; {_afterwards(facts)}. At calibration: {_softness_at_calibration(facts)}"
    if gravity["learn_softening"]:
        text += "; softness is eps in units of the squared lengths of queries and keys"
    return text + "."


def is_trained(facts: dict[str, Any]) -> bool | None:
    """Whether anything was trained after calibration; None where that is not recorded."""
    training = facts["training"]
    if training is not None:
        return bool(training.get("transfer") or training.get("lora"))
    return True if facts["saved"] == "adapter" else None


def learnt(facts: dict[str, Any]) -> str:
    """What of gravity a training changes."""
    return "masses and softenings" if facts["gravity"]["learn_softening"] else "masses"


def _per(gravity: dict[str, Any]) -> str:
    text = f"one mass M per {gravity['mass_per'].replace('_', ' ')}"
    return text + (" and a softening eps per head" if gravity["learn_softening"] else "")


def _start(gravity: dict[str, Any]) -> str:
    """What the constants were before any training, where no data set them."""
    names = ("law", "distance", "epsilon", "mass_init")
    if all(gravity[name] == getattr(_GRAVITY_2, name) for name in names):
        where = "started at Gravity-2's constants"
    else:
        where = f"started at M = {math.log1p(math.exp(gravity['mass_init'])):.4g}"
    if gravity["learn_softening"]:
        return f"{where}, eps at {gravity['epsilon']:g}"
    return f"{where}; eps = {gravity['epsilon']:g}, fixed"


def _afterwards(facts: dict[str, Any]) -> str:
    trained = is_trained(facts)
    if trained is None:
        return "whether it was trained after that is not recorded"
    if not trained:
        return "not trained"
    what = "M and eps were" if facts["gravity"]["learn_softening"] else "M was"
    return f"{what} trained after that"


def _softness_at_calibration(facts: dict[str, Any]) -> str:
    settings = GravityConfig.from_dict(facts["gravity"])
    if facts["calibration"] is not None:
        settings = replace(settings, softness=facts["calibration"]["softness"])
    return settings.softness_in_words


def layer_table(facts: dict[str, Any]) -> str:
    """Markdown: constants of every layer, lowest / median / highest of its heads."""
    layers = facts["layers"]
    if layers is None:
        return f"The constants of each layer: {NOT_MEASURED}."
    columns = [(title, key) for title, key in _COLUMNS if any(row[key] for row in layers)]
    lines = [
        f"| layer | masses | {' | '.join(title for title, _ in columns)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
    ]
    for row in layers:
        cells = [spread(row[key]) for _, key in columns]
        lines.append(f"| `{row['layer']}` | {row['mass']['count']} | {' | '.join(cells)} |")
    legend = (
        "Lowest / median / highest over the heads of a layer, read from the tensors. M has no "
        "unit, eps is a squared distance"
    )
    legend += ", R a distance." if any(key == "key_radius" for _, key in columns) else "."
    if not any(key == "softening" for _, key in columns):
        legend += f" Every head has eps = {facts['gravity']['epsilon']:g}."
    return "\n".join([*lines, "", legend])


def spread(values: dict[str, Any] | None) -> str:
    """`lowest / median / highest`; one number where all are equal."""
    if values is None:
        return "–"
    if values["lowest"] == values["highest"]:
        return f"{values['lowest']:.4g}"
    return " / ".join(f"{values[which]:.4g}" for which in ("lowest", "median", "highest"))


def overall(facts: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Lowest and highest of one quantity over all layers."""
    rows = [row[key] for row in facts["layers"] or () if row[key]]
    if not rows:
        return None
    return {
        "count": sum(row["count"] for row in rows),
        "lowest": min(row["lowest"] for row in rows),
        "highest": max(row["highest"] for row in rows),
    }


def contrast(facts: dict[str, Any]) -> str:
    """Softness and contrast of the finished model, as far as they were measured."""
    measured, calibration = finished_attention(facts), facts["calibration"]
    if measured is None and calibration is None:
        words = GravityConfig.from_dict(facts["gravity"]).softness_in_words
        return f"{words}; contrast {NOT_MEASURED}"
    said = _in_numbers(measured or calibration or {})
    if last_attention(facts) is None:
        when = ", before training" if is_trained(facts) else ""
        said = f"at calibration{when}: {said}"
        if measured is None:
            said += f"; of the finished model: {NOT_MEASURED}"
    return f"{said}. {_CONTRAST_ONE}; at a large softness the model is its host again"


def contrast_in_words(law: str) -> str:
    """What the number is: its formula, and what that means."""
    text = (
        "Contrast is ((d2_95 + eps) / (d2_05 + eps))^2, the squared ratio of softened squared "
        "distances, far (95 % quantile) to near (5 %)"
    )
    if law == "force":
        text += ": how much steeper the score falls at a near key than at a far one"
    return f"{text}. {_CONTRAST_ONE}"


def _in_numbers(summary: dict[str, Any]) -> str:
    return (
        f"median softness {summary['softness_median']:.3g}, median contrast "
        f"{summary['contrast_median']:.3g} (from {summary['contrast_min']:.3g} to "
        f"{summary['contrast_max']:.3g} over {counted(summary['heads'], 'head')})"
    )


def finished_attention(facts: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the attention of the finished model: measured on held-out text, or, of one
    that was not trained after it, at calibration."""
    measured = last_attention(facts)
    return facts["calibration"] if measured is None and is_trained(facts) is False else measured


def last_attention(facts: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of the attention of the finished model: the last row is its."""
    rows = (facts["evaluation"] or {}).get("rows", [])
    return rows[-1].get("attention") if rows else None
