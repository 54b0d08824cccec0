"""What was measured of a geolip, beside random frames: the verdict as a card shows it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult

from ..integration.own_geolip import DRIFT, MECHANISMS, number_in_words
from .card_law import NOT_MEASURED

_NONE = "–"
# What deviations are measured from.
_EXPECTED = {"frame_deviation": "0, expected"}
# Title, key in the verdict, its format, and the key of random frames.
_ROWS: tuple[tuple[str, str, str, str | None], ...] = (
    ("cosine of reconstruction, mean over tokens", "recon_cosine", ".4f", None),
    ("squared error, mean", "recon_mse", ".4g", None),
    ("deviation of the frames, mean, radians", "frame_deviation", "+.4f", None),
    (
        *("deviation, farthest from 0", "frame_deviation_absmax", ".4f"),
        "random_deviation_absmax",
    ),
    ("frames inside the envelope", "frac_in_envelope", ".2%", "random_frac_in_envelope"),
    ("lens, largest entry of E^T E - 1", "lens_orthogonality_error", ".1e", None),
    ("deviation changed by the lens, at most", "lens_angle_error", ".1e", None),
    ("sum of squares of omega off V, at most", "omega_energy_error", ".1e", None),
    ("alpha, mean", "mean_alpha", ".4f", None),
    ("alpha, smallest", "alpha_min", ".4f", None),
    ("alpha, largest", "alpha_max", ".4f", None),
    ("alpha at the start", "alpha_init", ".4f", None),
    ("gain of attention", "coordination_gain", ".4f", None),
    ("mechanism", "mechanism", "", None),
)
_OF_ATTENTION = {"mean_alpha", "alpha_min", "alpha_max", "alpha_init", "coordination_gain"}
_GAIN = (
    "Gain of attention: by what share the loss rises if every spectral layer sees, in the place of "
    "the other tokens of a sample, those of another sample"
)


def measured(facts: dict[str, Any]) -> str:
    """Markdown: the verdict with random frames beside it; says so where there is none."""
    verdict = facts["verdict"]
    if not verdict:
        return "Nothing was measured: the config holds no verdict."
    used = facts["settings"].use_spectral
    lines = ["| | this model | as many random frames |", "| --- | ---: | ---: |"]
    for title, key, form, other in _ROWS:
        if key in _OF_ATTENTION and not used:
            continue
        beside = _EXPECTED.get(key, _NONE) if other is None else _number(verdict, other, form)
        lines.append(f"| {title} | {_number(verdict, key, form)} | {beside} |")
    return "\n".join([*lines, "", _legend(facts, verdict)])


def mechanism_text(facts: dict[str, Any]) -> str | None:
    """A sentence, what attention does in this model; None where it was not measured."""
    verdict, settings = facts["verdict"] or {}, facts["settings"]
    named = verdict.get("mechanism")
    if named not in MECHANISMS:
        return None
    if not settings.use_spectral:
        return "It has no attention between tokens, which counts as mechanism B."
    bounds = (
        f"{settings.engage_gain:g} or more, and a mean alpha of {settings.engage_alpha_ratio:g} "
        "times its start or more"
    )
    text = f"Mechanism {named}: {MECHANISMS[named]}. A asks for a gain of {bounds}."
    return f"{text} Here {DRIFT}." if verdict.get("alpha_drift") else text


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """The cosine of reconstruction, with what it was measured on where that is recorded."""
    verdict = facts["verdict"] or {}
    data = data_of(facts)
    if verdict.get("recon_cosine") is None or data is None:
        return []
    tokens = verdict.get("tokens")
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="text" if facts["settings"].patch_size is None else "image",
            dataset_name=data,
            dataset_split="held out",
            dataset_args=None if tokens is None else {"tokens": tokens},
            metric_type="recon_cosine",
            metric_name="mean cosine of reconstructed tokens",
            metric_value=verdict["recon_cosine"],
        )
    ]


def data_of(facts: dict[str, Any]) -> str | None:
    """What was trained and measured on, in words; None where that is not recorded."""
    found = (facts["training"] or {}).get("data")
    return found if isinstance(found, str) and found else None


def _legend(facts: dict[str, Any], verdict: dict[str, Any]) -> str:
    settings, tokens = facts["settings"], verdict.get("tokens")
    count = "An unrecorded number of tokens" if tokens is None else f"{tokens:,} tokens"
    data = data_of(facts)
    space = (
        []
        if settings.feature_norm == "none"
        else ["Cosine and squared error are of normalised tokens"]
    )
    parts = [
        f"{count}{'' if data is None else f', held out of: {data}'}",
        *space,
        "Deviation: mean angle between the rows of a frame, as directions, less that of uniform "
        f"directions in {settings.base_dim} dimensions",
        f"The envelope reaches {_number(verdict, 'dev_critical', '.3g')} to either side of 0",
    ]
    if settings.use_spectral:
        parts.append(_GAIN)
    text = f"{'. '.join(parts)}. A dash: does not apply. One run."
    if facts["training"] is None:
        text += " The numbers are those of the config; who measured them, and on what, is not said."
    mechanism = mechanism_text(facts)
    return text if mechanism is None else f"{text}\n\n{mechanism}"


def _number(verdict: dict[str, Any], key: str, form: str) -> str:
    value = verdict.get(key)
    return NOT_MEASURED if value is None else number_in_words(value, form)
