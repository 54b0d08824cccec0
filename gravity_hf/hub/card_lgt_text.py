"""The sentences of a card of LGT, each said only where the facts hold what it says."""

from __future__ import annotations

import statistics
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..models.lgt import LGTConfig
from .card_law import NOT_MEASURED, spread
from .card_lgt import MODEL_TYPE
from .card_lgt_law import constants, law_text, limits
from .card_own_text import class_of, own_metadata, own_parts, training_text
from .card_pretrained import validation_text
from .card_words import counted

# Key of the row of the model itself.
THIS = "this"
COUNTED = ("unigram", "bigram")
_COUNTS = (
    "Unigram and bigram are counts of the training text, smoothed by a constant that was chosen on "
    "its last tenth."
)
_LEGEND = (
    "All others were trained by the same recipe on the same windows in the same order, each with "
    "the best of the same learning rates; softmax is GPT-2 of the same width, layers and heads"
)


def parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """What the template of cards is filled in with."""
    said = {
        "introduction": introduction(facts),
        "law_text": law_text(facts["settings"]),
        "constants": constants(facts["settings"]),
        "layers": layer_table(facts),
        "changes": shape(facts),
        "recipe": recipe(facts),
        "measured": comparison(facts, _LEGEND),
        "loading": loading(facts, name),
        "limits": limits(facts),
    }
    return own_parts(facts, MODEL_TYPE, said)


def metadata(facts: dict[str, Any], name: str) -> ModelCardData:
    """Tags, and what was measured of this model alone."""
    return own_metadata(facts, name, ["gravity-attention", MODEL_TYPE], eval_results(facts))


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """Bits per byte of the very model that was saved, of one seed."""
    evaluation = facts["evaluation"]
    if evaluation is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=evaluation["text"],
            dataset_split="held out",
            dataset_args={key: evaluation[key] for key in ("digest", "tokens", "length")},
            metric_type="bits_per_byte",
            metric_name="bits per byte of held-out text",
            metric_value=evaluation["own"],
        )
    ]


def introduction(facts: dict[str, Any]) -> str:
    """What it is. Without a training the folder cannot tell where its weights came from."""
    origin = " It was not converted from another model." if facts["training"] else ""
    return (
        f"{_class(facts)}: a Lightweight Gravitational Transformer. Every token has a mass, a "
        "token attends to others by the pull between their masses over the distance between their "
        "*positions*, and there is no dot product of queries and keys."
        f"{origin}"
    )


def layer_table(facts: dict[str, Any]) -> str:
    """Markdown: |G| of every layer, lowest / median / highest of its heads."""
    if not facts["layers"]:
        return f"The constants of each layer: {NOT_MEASURED}."
    lines = ["| layer | heads | \\|G\\| |", "| --- | ---: | ---: |"]
    lines += [
        f"| `{row['layer']}` | {row['G']['count']} | {spread(row['G'])} |"
        for row in facts["layers"]
    ]
    legend = "Lowest / median / highest over the heads of a layer, read from the tensors."
    return "\n".join([*lines, "", legend])


def shape(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of what it is."""
    settings = facts["settings"]
    count = facts["parameters"]
    vocabulary = settings.vocab_size
    return [
        ("class, weights", ", ".join(filter(None, (_class(facts), facts["host"]["dtype"])))),
        ("parameters", NOT_MEASURED if count is None else f"{count:,}"),
        ("layers, heads", f"{settings.num_hidden_layers}, {settings.num_attention_heads}"),
        ("width, of positions", f"{settings.hidden_size}, {settings.dim_position}"),
        ("tokens it knows", "none: it reads vectors" if vocabulary is None else f"{vocabulary:,}"),
        ("longest text", counted(settings.max_position_embeddings, "token")),
        ("reads", "forwards only (causal)" if settings.is_causal else "in both directions"),
        ("positions", f"{settings.position_type}{_learned(settings)}"),
    ]


def recipe(facts: dict[str, Any]) -> list[str]:
    """How it was trained, where that is recorded."""
    return training_text(facts, schedule="a cosine to a tenth")


def comparison(facts: dict[str, Any], rivals: str) -> str:
    """Markdown: bits per byte of all that were compared; `rivals`: a sentence, what the others are,
    without its full stop."""
    evaluation = facts["evaluation"]
    if evaluation is None:
        known = validation_text(facts["training"])
        if known is not None:
            return f"{known} Nothing else was measured."
        return "Nothing was measured: no results lie in this folder."
    lines = ["| model | parameters | bits per byte | seeds |", "| --- | ---: | ---: | ---: |"]
    keys = {row["key"] for row in evaluation["rows"]}
    for row in evaluation["rows"]:
        title = f"**{row['title']}: this model**" if row["key"] == THIS else row["title"]
        # Counting has no seed.
        seeds = "–" if row["key"] in COUNTED else str(len(row["bits_per_byte"]))
        bits = mean_and_spread(row["bits_per_byte"])
        lines.append(f"| {title} | {row['parameters']:,} | {bits} | {seeds} |")
    counts = f" {_COUNTS}" if keys & set(COUNTED) else ""
    legend = (
        f"Held-out text: {evaluation['text']}; {counted(evaluation['tokens'], 'token')} measured, "
        f"in windows of {evaluation['length']}. Mean ± standard deviation over seeds; the model in "
        f"this folder has {evaluation['own']:.4f}.{counts} {rivals}. Lower is better"
    )
    return "\n".join([*lines, "", f"{legend}. {verdict(evaluation['rows'])}"])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Against whom this model won and lost, in words."""
    mean = {row["key"]: statistics.fmean(row["bits_per_byte"]) for row in rows}
    titles = {row["key"]: row["title"] for row in rows}
    better = [titles[k] for k, bits in mean.items() if k != THIS and mean[THIS] < bits]
    worse = [titles[k] for k, bits in mean.items() if k != THIS and mean[THIS] >= bits]
    said = []
    if better:
        said.append(f"better than: {'; '.join(better)}")
    if worse:
        said.append(f"no better than: {'; '.join(worse)}")
    return f"In the mean it is {', and '.join(said)}."


def mean_and_spread(values: list[float]) -> str:
    """`mean ± standard deviation`; the mean alone of one value."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def loading(facts: dict[str, Any], name: str) -> str:
    """Code that runs with the library."""
    _, found, task = _class(facts).partition("For")
    auto = f"AutoModelFor{task}" if found else "AutoModel"
    return (
        "```python\nimport gravity_hf  # tells the Auto classes what an LGT is\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```\n\n'
        "It needs the library: there is no code beside the weights."
    )


def _class(facts: dict[str, Any]) -> str:
    return class_of(facts, "LGTModel")


def _learned(settings: LGTConfig) -> str:
    fixed = settings.position_type == "fractal" and not settings.learnable_residual
    return ", of one learned size" if fixed else ", learned"
