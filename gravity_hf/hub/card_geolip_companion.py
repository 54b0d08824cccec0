"""The card of a companion: a geolip beside a host, which is named and lies elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..models.geolip import GeolipCompanionConfig
from .card_attribution import citation
from .card_geolip import (
    PROCESSOR_FILE,
    alphas_of_geolip,
    count_parameters,
    inner_settings,
    lens_error_of,
    tensor_of,
)
from .card_geolip_code import loading_of_companion
from .card_geolip_law import constants, law_text, limits
from .card_geolip_text import SOFTWARE, UNKNOWN, class_of, layer_table, tags
from .card_geolip_text import shape as shape_of_geolip
from .card_geolip_training import recipe
from .card_geolip_verdict import eval_results, measured
from .card_own import CONFIG, complete_own, results_of_own
from .card_public import is_hub_name, is_local, last_name, public
from .card_text import command, conditions
from .tensor_files import read_json, shapes_of_export

MODEL_TYPE = GeolipCompanionConfig.model_type
_INNER = "geolip."
_GATE = "writer.gate"
_READERS = ("tokenizer_config.json", PROCESSOR_FILE)


def complete_companion(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads: `settings` are those of the geolip inside,
    `companion` its own."""
    found = complete_own(results, GeolipCompanionConfig, "a companion")
    found.setdefault("lens_error", None)
    settings = inner_settings(found["config"])
    own = found["settings"]
    return {**found, "companion": own, "settings": settings, "verdict": settings.verdict}


def results_of_companion(folder: Path) -> dict[str, Any]:
    """As `results_of_geolip`; the host's weights count where they lie in the folder, too;
    `has_reader`: whether a tokenizer or an image processor lies there."""
    config = read_json(folder / CONFIG)
    settings = inner_settings(config)
    shapes = shapes_of_export(folder, "model")
    others = sum(math.prod(s) for name, s in shapes.items() if not name.startswith(_INNER))
    found = {
        **results_of_own(folder, MODEL_TYPE, alphas_of_geolip(folder, settings)),
        "parameters": count_parameters(settings) + others,
        "lens_error": lens_error_of(folder, settings),
        "gate": _gate_of(folder),
        "has_reader": any((folder / file).is_file() for file in _READERS),
        # Of a path nothing but the last name is said.
        "host_on_hub": _is_on_hub(config.get("host_name_or_path")),
    }
    return public(found)


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings, own = facts["settings"], facts["companion"]
    return {
        "introduction": introduction(facts),
        "version": facts["gravity_hf"],
        "law_title": "What it computes",
        "law_text": f"{_read(own)}\n{law_text(settings)}{_written(own)}",
        "constants": constants(settings),
        "layers": layer_table(facts["layers"], facts["lens_error"]),
        "changes_title": "What it is",
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": measured(facts),
        "samples": [],
        "conditions": conditions(facts),
        "command": command(facts),
        "loading": loading_of_companion(facts, name),
        "limits_title": "What is not claimed, and what it cannot do",
        "limits": [*_limits(facts), *limits(facts)],
        "software_title": "Other software",
        "software": [UNKNOWN.format(MODEL_TYPE), SOFTWARE],
        "licence": ["Licence: not stated.", _whose(facts)],
        "citation": citation(facts),
    }


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, the host where others can find it, and what was measured of the geolip."""
    host = facts["companion"].host_name_or_path if facts.get("host_on_hub") else None
    results = eval_results(facts)
    return ModelCardData(
        base_model=host,
        library_name="gravity_hf",
        pipeline_tag="feature-extraction",
        tags=tags(facts["settings"], MODEL_TYPE),
        model_name=name if results else None,
        eval_results=results or None,
    )


def introduction(facts: dict[str, Any]) -> str:
    """What it is, and beside which host."""
    own, settings = facts["companion"], facts["settings"]
    back = {
        "none": "It changes nothing in the host.",
        "residual": "It writes back into the host through a gate that is closed in a new one.",
        "omega_tokens": "It also gives the spectra as tokens, for a cross-attention that follows.",
    }[own.write]
    attend = ", lets their spectra attend to each other" if settings.use_spectral else ""
    return (
        f"{class_of(facts, 'GeolipCompanion')}: a geolip beside {_the_host(facts)}. It reads the "
        f"host's hidden states of {_layer(own.read_layer)}, makes of each token a frame of "
        f"{settings.num_rows} points on a sphere{attend}, and makes the hidden states again. {back}"
    )


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    own = facts["companion"]
    kept = "in this folder, trained with it" if own.train_host else "elsewhere; not in this folder"
    rows, gate = dict(shape_of_geolip(facts)), facts.get("gate")
    rows["class, weights"] = ", ".join(
        filter(None, (class_of(facts, "GeolipCompanion"), facts["host"]["dtype"]))
    )
    return [
        ("host", host_shown(facts) or "not recorded"),
        ("type of the host", own.host_model_type or "not recorded"),
        ("weights of the host", kept),
        ("reads layer", str(own.read_layer)),
        ("writes back", own.write if gate is None else f"{own.write}; tanh(gate) is {gate:.3g}"),
        *rows.items(),
    ]


def host_shown(facts: dict[str, Any]) -> str | None:
    """The host's name as others may read it; None where it has none."""
    named = facts["companion"].host_name_or_path
    return f"`{last_or_whole(named)}`" if named else None


def _the_host(facts: dict[str, Any]) -> str:
    shown = host_shown(facts)
    return "a host whose name is not recorded" if shown is None else f"the host {shown}"


def last_or_whole(named: str) -> str:
    """A name of the Hub as it is, of a path the last part."""
    return named if is_hub_name(named) else last_name(named)


def _limits(facts: dict[str, Any]) -> list[str]:
    own = facts["companion"]
    said = ["What it does for a task of the host was not measured."]
    if own.causal:
        said.append("No token sees a later one, as in its host; a cache of keys is not kept.")
    return said


def _read(own: GeolipCompanionConfig) -> str:
    normalised = "" if own.geolip.feature_norm == "none" else ", normalised"
    return f"x      = h, hidden state of {_layer(own.read_layer)} of the host{normalised}"


def _written(own: GeolipCompanionConfig) -> str:
    return {
        "none": "",
        "residual": "\nh'     = h + tanh(gate) W(S)                       the gate starts at 0",
        "omega_tokens": "\nt      = W(S)                                      a token beside h",
    }[own.write]


def _layer(number: int) -> str:
    return "the last layer" if number == -1 else f"layer {number}"


def _whose(facts: dict[str, Any]) -> str:
    own = facts["companion"]
    if own.train_host:
        return f"Among its weights are those of {_the_host(facts)}, trained further."
    return f"It holds no weights of {_the_host(facts)}; the host's licence is its own."


def _is_on_hub(named: str | None) -> bool:
    return bool(named) and is_hub_name(str(named)) and not is_local(str(named))


def _gate_of(folder: Path) -> float | None:
    """What the written states are multiplied by, `tanh(gate)`; None without a gate."""
    gate = tensor_of(folder, _GATE)
    return None if gate is None else float(gate.tanh())
