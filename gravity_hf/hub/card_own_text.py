"""What the cards of our own causal models, LGT, NGT and LeanFormer, say alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .card_attribution import citation
from .card_law import NOT_MEASURED, spread
from .card_pretrained import rate_text
from .card_text import command, conditions, samples
from .card_words import counted

UNKNOWN_WEIGHTS = "Whose weights these are is not recorded."


def own_parts(
    facts: dict[str, Any],
    model_type: str,
    said: Mapping[str, Any],
    unknown_weights: str = UNKNOWN_WEIGHTS,
) -> dict[str, Any]:
    """What the template of cards is filled in with.

    Args:
        said: what is the model's own, by the template's names: introduction, law_text, constants,
            layers, changes, recipe, measured, loading, limits.
        unknown_weights: of a model whose training is not recorded.
    """
    return {
        "version": facts["gravity_hf"],
        "changes_title": "What it is",
        "samples": samples(facts),
        "conditions": conditions(facts),
        "command": command(facts),
        "software": [
            f"transformers without this library: does not know the model type `{model_type}`.",
            "llama.cpp, vLLM, TGI: not tried.",
        ],
        "licence": [
            "Licence: not stated.",
            "It was trained from nothing: there are no weights of others in it."
            if facts["training"]
            else unknown_weights,
        ],
        "citation": citation(facts),
        **said,
    }


def own_metadata(
    facts: dict[str, Any], name: str, tags: Sequence[str], results: Sequence[Any]
) -> ModelCardData:
    """Tags, and what was measured of this model alone."""
    writes = class_of(facts, "").endswith("ForCausalLM")
    return ModelCardData(
        # Under "transformers" the Hub shows code that does not know the model type.
        library_name="gravity_hf",
        pipeline_tag="text-generation" if writes else None,
        tags=list(tags),
        model_name=name if results else None,
        eval_results=list(results) or None,
    )


def constants_table(
    layers: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]], legend: str
) -> str:
    """Markdown: the learned constants of every layer, lowest / median / highest of its heads.

    Args:
        columns: titles and keys of rows; those that no row has are left out, the first is there.
        legend: what stands below, after what the numbers of a cell are.
    """
    if not layers:
        return f"The constants of each layer: {NOT_MEASURED}."
    shown = [(title, key) for title, key in columns if any(row.get(key) for row in layers)]
    lines = [
        f"| layer | heads | {' | '.join(title for title, _ in shown)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in shown)} |",
    ]
    for row in layers:
        cells = [spread(row.get(key)) for _, key in shown]
        heads = row[columns[0][1]]["count"]
        lines.append(f"| `{row['layer']}` | {heads} | {' | '.join(cells)} |")
    read = "Lowest / median / highest over the heads of a layer, read from the tensors; one number"
    return "\n".join([*lines, "", f"{read} where all are equal. {legend}"])


def training_text(
    facts: dict[str, Any], *, schedule: str = "a cosine", dropout: str = "", more: str = ""
) -> list[str]:
    """How it was trained, where that is recorded.

    Args:
        schedule: of the rate, where the record does not name it.
        dropout, more: ends of the first and the second sentence.
    """
    training = facts["training"]
    if training is None:
        return ["How it was made is not recorded in this folder; all else is read from its files."]
    return [
        f"Trained from nothing, seed {training['seed']}: {counted(training['steps'], 'step')} of "
        f"{training['rows']} windows of {training['length']} tokens, {training['tokens']:,} tokens "
        f"in all{', in bfloat16' if training['bfloat16'] else ''}{dropout}.",
        f"AdamW, learning rate {training['learning_rate']:g} after "
        f"{counted(training['warmup_steps'], 'step')} of warmup, then "
        f"{training.get('schedule', schedule)}; weight decay {training['weight_decay']:g}."
        f"{rate_text(training)}{more}",
        f"Text: {training['text']}.",
    ]


def causal_loading(facts: dict[str, Any], name: str, model: str, noun: str) -> str:
    """Code that runs with the library. `model`: the class where none is recorded."""
    causal = class_of(facts, model).endswith("ForCausalLM")
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    return (
        f"```python\nimport gravity_hf  # tells the Auto classes what {noun} is\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```\n\n'
        "It needs the library: there is no code beside the weights. With a tokenizer in the folder "
        "`gravity-hf generate` and `gravity-hf chat` continue a text in a terminal."
    )


def class_of(facts: dict[str, Any], otherwise: str) -> str:
    return (facts["config"].get("architectures") or [otherwise])[0]
