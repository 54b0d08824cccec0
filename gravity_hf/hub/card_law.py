"""The law of a model with its own constants, and how gravitational they make it."""

from __future__ import annotations

from typing import Any

NOT_MEASURED = "not measured"

_LAWS = {
    "force": "score(i, j) = M^2 / ({distance} + eps), then softmax over j",
    "power": "weight(i, j) ~ ({distance} + eps)^(-M^2), normalised over j",
}
_DISTANCES = {"euclidean": "|q_i - k_j|^2", "lifted": "(|q_i|^2 + R^2 - 2 q_i.k_j)"}
# Title of a column, key of a row.
_COLUMNS = (("mass M", "mass"), ("softening eps", "softening"), ("key radius R", "key_radius"))


def law_text(facts: dict[str, Any]) -> str:
    """The formula of this model's law and distance."""
    gravity = facts["gravity"]
    return _LAWS[gravity["law"]].format(distance=_DISTANCES[gravity["distance"]])


def constants(facts: dict[str, Any]) -> str:
    """Where M, eps and R come from."""
    gravity, calibration = facts["gravity"], facts["calibration"]
    per = gravity["mass_per"].replace("_", " ")
    if calibration is None and gravity["softness"] is None:
        return (
            f"Not calibrated: one mass M per {per}, started at Gravity-2's constants, eps = "
            f"{gravity['epsilon']:g}."
        )
    way = "closed forms" if facts["settings"] else "calibration"
    if gravity["max_kl"] is not None:
        way = f"a budget of {gravity['max_kl']:g} nats of KL to the host's attention per head"
    elif (facts["settings"] or {}).get("fit"):
        way = "a fit of every head to the host's attention"
    text = f"One mass M per {per} and a softening eps per head, set by {way}"
    if gravity["distance"] == "lifted":
        text += "; R is the length of the longest key seen, per KV head"
    trained = facts["training"] or {}
    if trained.get("transfer") or trained.get("lora"):
        text += "; M and eps were trained after that"
    softness = gravity["softness"] if calibration is None else calibration["softness"]
    return (
        f"{text}. Softness at calibration {softness:g}: eps in units of the squared lengths of "
        "queries and keys."
    )


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
        "unit, eps is a squared distance, R a distance."
    )
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
    summary = last_attention(facts) or facts["calibration"]
    if summary is None:
        softness = facts["gravity"]["softness"]
        known = "" if softness is None else f"softness {softness:g}; "
        return f"{known}contrast of the scores {NOT_MEASURED}"
    return (
        f"median softness {summary['softness_median']:.3g}, median contrast of the scores "
        f"{summary['contrast_median']:.3g} (from {summary['contrast_min']:.3g} to "
        f"{summary['contrast_max']:.3g} over {summary['heads']} heads). Contrast 1 = distance "
        "makes no difference; at a large softness the model is its host again"
    )


def last_attention(facts: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of the attention of the finished model."""
    rows = (facts["evaluation"] or {}).get("rows", [])
    found = [row["attention"] for row in rows if row.get("attention")]
    return found[-1] if found else None
