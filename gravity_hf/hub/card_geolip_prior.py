"""The card of a prior over the codes of a geolip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..models.geolip import GeolipPriorConfig
from .card_attribution import citation
from .card_geolip_companion import last_or_whole
from .card_geolip_text import SOFTWARE, UNKNOWN, class_of
from .card_geolip_training import recipe
from .card_law import NOT_MEASURED
from .card_own import complete_own, results_of_own
from .card_public import public
from .card_text import command, conditions

MODEL_TYPE = GeolipPriorConfig.model_type
CONSTANTS = (
    "z: a normalised frame per token; u: what the transformer makes of them and of the time; m, s: "
    "mean and deviation of each coordinate of the frames that it learned."
)


def complete_prior(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads; see `complete_own`."""
    return complete_own(results, GeolipPriorConfig, "a prior")


def results_of_prior(folder: Path) -> dict[str, Any]:
    """See `results_of_own`."""
    return public(results_of_own(folder, MODEL_TYPE, []))


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings: GeolipPriorConfig = facts["settings"]
    return {
        "introduction": introduction(facts),
        "version": facts["gravity_hf"],
        "law_title": "What it computes",
        "law_text": law_text(settings),
        "constants": CONSTANTS,
        "layers": f"Whose codes: {geolip_shown(settings)}.",
        "changes_title": "What it is",
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": "Nothing was measured: how good the samples are is not recorded here.",
        "samples": [],
        "conditions": conditions(facts),
        "command": command(facts),
        "loading": loading(settings, name),
        "limits_title": "What is not claimed, and what it cannot do",
        "limits": limits(settings),
        "software_title": "Other software",
        "software": [UNKNOWN.format(MODEL_TYPE), SOFTWARE],
        "licence": ["Licence: not stated.", "It holds no weights of the geolip."],
        "citation": citation(facts),
    }


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags; nothing was measured."""
    return ModelCardData(library_name="gravity_hf", tags=[MODEL_TYPE])


def introduction(facts: dict[str, Any]) -> str:
    """What it is, and of whose codes."""
    settings: GeolipPriorConfig = facts["settings"]
    return (
        f"{class_of(facts, 'GeolipPrior')}: a small prior over codes. It draws frames of "
        f"{settings.num_rows} points on a sphere in {settings.base_dim} dimensions for "
        f"{settings.num_tokens} tokens at once; the decoder of {geolip_shown(settings)} makes "
        "something of them."
    )


def law_text(settings: GeolipPriorConfig) -> str:
    """The formulas, with the sizes of this model in them."""
    size = f"[{settings.num_tokens}, {settings.num_rows}, {settings.base_dim}]"
    return (
        f"z_0 ~ normal noise                                 {size}\n"
        "z_t = (1 - t) z_0 + t z_1,  dz/dt = u(z, t)        straight ways from noise to frames\n"
        "frame = rows of s z_1 + m, each divided by its length"
    )


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings: GeolipPriorConfig = facts["settings"]
    count = facts["parameters"]
    dtype = facts["host"]["dtype"]
    return [
        ("class, weights", ", ".join(filter(None, (class_of(facts, "GeolipPrior"), dtype)))),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("geolip", geolip_shown(settings)),
        ("layers, heads", f"{settings.num_hidden_layers}, {settings.num_attention_heads}"),
        ("width", f"{settings.hidden_size}"),
    ]


def loading(settings: GeolipPriorConfig, name: str) -> str:
    """Code that runs with the library."""
    shape_shown = f"[2, {settings.num_tokens}, {settings.num_rows}, {settings.base_dim}]"
    return (
        "```python\nfrom gravity_hf import GeolipPrior\n\n"
        f'prior = GeolipPrior.from_pretrained("{name}").eval()\n'
        f"frames = prior.sample(2, seed=0)  # {shape_shown}\n```\n\n"
        f"`GeolipModel.decode` of {geolip_shown(settings)} makes patches of them, and "
        "`gravity_hf.models.geolip.prior_decoding` images. It needs the library."
    )


def limits(settings: GeolipPriorConfig) -> list[str]:
    """Markdown sentences: what was not measured, and what it cannot be used for."""
    return [
        "That its samples are good, or like those of larger generators, is not claimed.",
        "Whether it repeats what it was trained on is not recorded here.",
        f"It draws codes of at most {settings.num_tokens} tokens, and has no prompt.",
        "Its codes mean something to one decoder only.",
    ]


def geolip_shown(settings: GeolipPriorConfig) -> str:
    """The geolip's name as others may read it."""
    named = settings.geolip_name_or_path
    return f"`{last_or_whole(named)}`" if named else "a geolip that is not named"
