"""The sentences of a card of NGT, each said only where the facts hold what it says."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from ..models.ngt import NGTConfig
from .card_attribution import citation
from .card_law import NOT_MEASURED, spread
from .card_lgt_text import comparison, eval_results
from .card_ngt import COLUMNS, MODEL_TYPE
from .card_ngt_law import constants, law_text, limits
from .card_pretrained import rate_text
from .card_text import command, conditions, samples
from .card_words import counted

_LEGEND = (
    "All others were trained by the same recipe on the same windows in the same order, each with "
    "the best of the same learning rates"
)


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    settings: NGTConfig = facts["settings"]
    return {
        "introduction": introduction(facts),
        "version": facts["gravity_hf"],
        "law_text": law_text(settings),
        "constants": constants(settings),
        "layers": layer_table(facts),
        "changes_title": "What it is",
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": comparison(facts, _LEGEND),
        "samples": samples(facts),
        "conditions": conditions(facts),
        "command": command(facts),
        "loading": loading(facts, name),
        "limits": limits(facts),
        "software": [
            f"transformers without this library: does not know the model type `{MODEL_TYPE}`.",
            "llama.cpp, vLLM, TGI: not tried.",
        ],
        "licence": [
            "Licence: not stated.",
            "It was trained from nothing: there are no weights of others in it."
            if facts["training"]
            else "Whose weights these are is not recorded.",
        ],
        "citation": citation(facts),
    }


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, and what was measured of this model alone."""
    results = eval_results(facts)
    twin = facts["settings"].is_twin
    return ModelCardData(
        # Under "transformers" the Hub shows code that does not know the model type.
        library_name="gravity_hf",
        pipeline_tag="text-generation" if _class(facts).endswith("ForCausalLM") else None,
        tags=[*([] if twin else ["gravity-attention"]), MODEL_TYPE],
        model_name=name if results else None,
        eval_results=results or None,
    )


def introduction(facts: dict[str, Any]) -> str:
    """What it is. Without a training the folder cannot tell where its weights came from."""
    origin = " It was not converted from another model." if facts["training"] else ""
    if facts["settings"].is_twin:
        return (
            f"{_class(facts)} with dot-product attention: the twin that a Newton Gravity "
            f"Transformer of the same shape is compared with. It has no gravity.{origin}"
        )
    return (
        f"{_class(facts)}: a Newton Gravity Transformer. Tokens are particles: each has a mass, "
        "and coordinates that move from layer to layer; a token attends to others by their masses "
        "and by how near they are, and there is no dot product of queries and keys."
        f"{origin}"
    )


def layer_table(facts: dict[str, Any]) -> str:
    """Markdown: the learned constants of every layer, lowest / median / highest of its heads."""
    layers = facts["layers"]
    if facts["settings"].is_twin:
        return "It has no constants of gravity."
    if not layers:
        return f"The constants of each layer: {NOT_MEASURED}."
    columns = [(title, key) for title, key in COLUMNS if any(row.get(key) for row in layers)]
    lines = [
        f"| layer | heads | {' | '.join(title for title, _ in columns)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
    ]
    for row in layers:
        cells = [spread(row.get(key)) for _, key in columns]
        lines.append(f"| `{row['layer']}` | {row['strength']['count']} | {' | '.join(cells)} |")
    legend = (
        "Lowest / median / highest over the heads of a layer, read from the tensors; one number "
        "where all are equal. g, mu and beta have no unit, e is a squared distance, r a distance, "
        "l, of the heads that have it, is in nats for each token."
    )
    return "\n".join([*lines, "", legend])


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings: NGTConfig = facts["settings"]
    count = facts["parameters"]
    rows = [
        ("class, weights", ", ".join(filter(None, (_class(facts), facts["host"]["dtype"])))),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("layers, heads", f"{settings.num_hidden_layers}, {settings.num_attention_heads}"),
        ("width, of the network inside", f"{settings.hidden_size}, {settings.intermediate_size}"),
        ("tokens it knows", f"{settings.vocab_size:,}"),
        ("longest text", _longest(settings)),
        ("reads", "forwards only (causal)"),
    ]
    if settings.is_twin:
        return [*rows, ("positions", settings.positions)]
    widths = f"{settings.coord_dim}, {settings.head_coord_dim}"
    return [
        *rows[:4],
        ("coordinates, in a head", widths),
        *rows[4:],
        ("cutoff", "none" if settings.cutoff == "none" else settings.cutoff),
    ]


def recipe(facts: dict[str, Any]) -> list[str]:
    """How it was trained, where that is recorded."""
    training = facts["training"]
    if training is None:
        return ["How it was made is not recorded in this folder; all else is read from its files."]
    schedule = training.get("schedule", "a cosine")
    return [
        f"Trained from nothing, seed {training['seed']}: {counted(training['steps'], 'step')} of "
        f"{training['rows']} windows of {training['length']} tokens, {training['tokens']:,} tokens "
        f"in all{', in bfloat16' if training['bfloat16'] else ''}; dropout "
        f"{facts['settings'].dropout:g}.",
        f"AdamW, learning rate {training['learning_rate']:g} after "
        f"{counted(training['warmup_steps'], 'step')} of warmup, then {schedule}; weight decay "
        f"{training['weight_decay']:g}.{rate_text(training)}{_repulsion(training)}",
        f"Text: {training['text']}.",
    ]


def _repulsion(training: dict[str, Any]) -> str:
    weight = training.get("repulsion_weight")
    return f" Its coordinates repelled each other in training, weight {weight:g}." if weight else ""


def loading(facts: dict[str, Any], name: str) -> str:
    """Code that runs with the library."""
    auto = "AutoModelForCausalLM" if _class(facts).endswith("ForCausalLM") else "AutoModel"
    return (
        "```python\nimport gravity_hf  # tells the Auto classes what an NGT is\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```\n\n'
        "It needs the library: there is no code beside the weights. With a tokenizer in the folder "
        "`gravity-hf generate` and `gravity-hf chat` continue a text in a terminal."
    )


def _longest(settings: NGTConfig) -> str:
    limit = counted(settings.max_position_embeddings, "token")
    if settings.crop_long_inputs:
        return f"any, of which it reads the last {limit}"
    return limit if settings.has_position_table else f"any; meant for {limit}"


def _class(facts: dict[str, Any]) -> str:
    return (facts["config"].get("architectures") or ["NGTModel"])[0]
