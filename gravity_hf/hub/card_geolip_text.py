"""The sentences of a card of a geolip, each said only where the facts hold what it says."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from ..integration.own_geolip import without_gravity
from ..models.geolip import GeolipConfig
from .card_attribution import citation
from .card_geolip import MODEL_TYPE
from .card_geolip_code import loading
from .card_geolip_law import constants, law_text, limits
from .card_geolip_training import host_of, recipe
from .card_geolip_verdict import eval_results, measured
from .card_law import NOT_MEASURED, spread
from .card_text import command, conditions

SOFTWARE = "llama.cpp, vLLM, TGI: not tried."
UNKNOWN = "transformers without this library: does not know the model type `{}`."


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings: GeolipConfig = facts["settings"]
    return {
        "introduction": introduction(facts),
        "version": facts["gravity_hf"],
        "law_title": "What it computes",
        "law_text": law_text(settings),
        "constants": constants(settings),
        "layers": layer_table(facts["layers"], facts["lens_error"]),
        "changes_title": "What it is",
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": measured(facts),
        "samples": [],
        "conditions": conditions(facts),
        "command": command(facts),
        "loading": loading(facts, name),
        "limits_title": "What is not claimed, and what it cannot do",
        "limits": limits(facts),
        "software_title": "Other software",
        "software": [UNKNOWN.format(MODEL_TYPE), SOFTWARE],
        "licence": [
            "Licence: not stated.",
            "It was trained from nothing: there are no weights of others in it."
            if facts["training"]
            else "Whose weights these are is not recorded.",
        ],
        "citation": citation(facts),
    }


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, and what was measured of this model."""
    results = eval_results(facts)
    return ModelCardData(
        # Under "transformers" the Hub shows code that does not know the model type.
        library_name="gravity_hf",
        pipeline_tag="feature-extraction" if facts["settings"].patch_size is None else None,
        tags=tags(facts["settings"], MODEL_TYPE),
        model_name=name if results else None,
        eval_results=results or None,
    )


def tags(settings: GeolipConfig, model_type: str) -> list[str]:
    """Of such a model; gravity is a tag of those that have it."""
    return [*([] if without_gravity(settings) else ["gravity-attention"]), model_type]


def introduction(facts: dict[str, Any]) -> str:
    """What it is, and of what."""
    settings: GeolipConfig = facts["settings"]
    tokens, whole = "feature vectors of a host", "of a text"
    if settings.patch_size is not None:
        tokens, whole = "patches", "of an image"
    between = "Tokens do not see each other"
    if settings.use_spectral:
        between = f"The spectra of the tokens {whole} attend to each other"
    kept = " of their lines" if settings.lens_sign == "canon" else ""
    return (
        f"{class_of(facts, 'GeolipModel')}: a spectral autoencoder of {tokens}. Each token becomes "
        f"a frame of {settings.num_rows} points on a sphere in {settings.base_dim} dimensions, "
        f"which a lens lifts into {settings.lens_dim} without changing an angle{kept}. {between}, "
        "and from the lifted frame the token is made again."
    )


def layer_table(layers: list[dict[str, Any]] | None, error: float | None) -> str:
    """Markdown: alpha of every layer over its modes, and the error of the lens."""
    lens = (
        f"The lens: {NOT_MEASURED}."
        if error is None
        else f"The lens in the file: the largest entry of E^T E - 1 is {error:.1e}."
    )
    if not layers:
        return lens
    lines = ["| layer | modes | alpha |", "| --- | ---: | ---: |"]
    lines += [
        f"| `{row['layer']}` | {row['alpha']['count']} | {spread(row['alpha'])} |" for row in layers
    ]
    legend = "Lowest / median / highest over the modes of a layer, read from the tensors."
    return "\n".join([*lines, "", f"{legend} {lens}"])


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings: GeolipConfig = facts["settings"]
    count = facts["parameters"]
    reads = f"feature vectors of width {settings.patch_dim}"
    if settings.patch_size is not None:
        reads = f"patches of {settings.patch_size} x {settings.patch_size}, "
        reads += f"{settings.num_channels} channels"
    spectral = "none"
    if settings.use_spectral:
        kind = "gravity" if settings.spectral_attention == "gravity" else "dot product"
        spectral = f"{settings.num_spectral_layers}, {settings.num_attention_heads} ({kind})"
    dtype, host = facts["host"]["dtype"], host_of(settings.host_config)
    return [
        ("class, weights", ", ".join(filter(None, (class_of(facts, "GeolipModel"), dtype)))),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("reads", reads),
        *([] if host is None else [("features of", host)]),
        ("frame of a token", f"{settings.num_rows} rows, {settings.base_dim} dimensions"),
        ("numbers that a frame can vary in", f"{settings.num_rows * (settings.base_dim - 1)}"),
        ("lens", f"{settings.lens_dim} x {settings.base_dim}, {settings.lens_mode}"),
        ("spectral layers, heads", spectral),
        ("width of encoder, decoder", f"{settings.hidden_size}, {settings.decoder_width}"),
        ("inputs are normalised by", settings.feature_norm),
        ("loss of its training", settings.reconstruction_loss),
    ]


def class_of(facts: dict[str, Any], default: str) -> str:
    """The class that wrote the model."""
    return str((facts["config"].get("architectures") or [default])[0])
