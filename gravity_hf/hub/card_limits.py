"""What a model cannot do: each sentence stands exactly where its fact holds."""

from __future__ import annotations

from typing import Any

from ..config import GravityConfig
from .card_law import NOT_MEASURED, finished_attention
from .card_software import software_lines
from .card_words import counted

# Below this median contrast near keys hardly differ from far ones.
BARELY = 1.2
_MASSES = {
    "query_head": "One mass per query head",
    "kv_head": "One mass per KV head, shared by the query heads that read it",
    "layer": "One mass per layer, shared by all of its heads",
}


def limits(facts: dict[str, Any]) -> list[str]:
    """Markdown sentences, from what the model is to what was tried with it."""
    return [
        _normalisation(facts),
        _granularity(facts),
        *_clamping(facts),
        _softness(facts),
        *_lengths(facts),
        _quality(facts),
        "Attention runs in code of this project, not in fused dot-product attention.",
        *_inherited(facts),
    ]


def software(facts: dict[str, Any]) -> list[str]:
    """What other software does with it."""
    model_type = facts["host"].get("model_type")
    return software_lines(
        facts["saved"],
        f"gravity_{model_type}" if model_type else "gravity_*",
        ordinary_lora=(facts["lora"] or {}).get("type") == "LORA",
    )


def _normalisation(facts: dict[str, Any]) -> str:
    if facts["gravity"]["law"] == "force":
        return (
            "The scores of the force law go through a softmax; it is not literal gravity: weights "
            "grow with the exponential of the pull."
        )
    return (
        "Its weights are inverse powers of distance, without an exponential, but still divided by "
        "their sum over the keys: pulls are shares and do not add up as forces do."
    )


def _granularity(facts: dict[str, Any]) -> str:
    text = f"{_MASSES[facts['gravity']['mass_per']]}; tokens have no mass of their own."
    skipped = facts["patch"]["skipped"]
    if skipped:
        keep = "keeps" if len(skipped) == 1 else "keep"
        text += f" {counted(len(skipped), 'attention module')} {keep} dot-product attention."
    elif skipped is None and facts["gravity"]["layers"] is not None:
        text += " Attention modules that were not converted keep dot-product attention."
    return text


def _clamping(facts: dict[str, Any]) -> list[str]:
    if facts["gravity"]["distance"] != "lifted":
        return []
    return [
        "Squared distances are clamped at 0, which keys longer than any seen in calibration can "
        "reach."
    ]


def _softness(facts: dict[str, Any]) -> str:
    settings = GravityConfig.from_dict(facts["gravity"])
    if settings.softness is None:
        return "It was not calibrated on its host's queries and keys."
    words = settings.softness_in_words
    text = (
        f"{words[0].upper()}{words[1:]}; the larger the softness, the closer a model is to its "
        "host."
    )
    summary = finished_attention(facts)
    if summary is not None and summary["contrast_median"] < BARELY:
        text += (
            f" At a median contrast of {summary['contrast_median']:.3g} distance hardly matters: "
            "this is the host again, and its quality says little about gravity."
        )
    return text


def _lengths(facts: dict[str, Any]) -> list[str]:
    most = facts["host"]["max_positions"]
    calibrated = (facts["settings"] or {}).get("length") if facts["calibration"] else None
    evaluation = facts["evaluation"]
    if facts["settings"] is None and facts["gravity"]["softness"] is None:
        text = f"Behaviour over length: {NOT_MEASURED}."
        return [text if most is None else f"{text} Its host takes up to {most} tokens."]
    if facts["settings"] is None:
        text = "The length of the texts that it was calibrated and measured on is not recorded."
        return [text if most is None else f"{text} Its host takes up to {most} tokens."]
    parts = [] if calibrated is None else [f"calibrated on texts of at most {calibrated} tokens"]
    if evaluation is not None:
        parts.append(f"measured on texts of at most {evaluation['length']}")
    tested = max((calibrated or 0, (evaluation or {}).get("length", 0)))
    if not parts:
        return [f"Behaviour over length: {NOT_MEASURED}."]
    said = " and ".join(parts)
    said = said[0].upper() + said[1:]
    if most is None:
        return [f"{said}; longer ones: {NOT_MEASURED}."]
    if tested >= most:
        return []
    return [f"{said}; its host takes up to {most}, the lengths between: {NOT_MEASURED}."]


def _quality(facts: dict[str, Any]) -> str:
    if facts["evaluation"] is None:
        return "Its quality was not measured."
    return "The numbers above hold for the text above; other text was not measured."


def _inherited(facts: dict[str, Any]) -> list[str]:
    if facts["host"]["name"] is None:
        return []
    return ["It knows what its host knows, wrongs included; the host's licence applies."]
