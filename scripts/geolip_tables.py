"""README's tables of geolip: features, when attention engages, bytes, generation, alignment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import geolip_alignment
import geolip_generation
from geolip_compression_report import compression_table, winners
from geolip_report import (
    criteria_table,
    features_table,
    mechanisms_table,
)
from table_text import experiment_conditions, markdown, result_json

_COMMAND = "python scripts/experiments/geolip_{}.py"


def tables(results: Path) -> dict[str, Callable[[], str]]:
    """Makers by the names of README's marks."""
    return {
        "geolip-features": lambda: features_text(results),
        "geolip-mechanisms": lambda: mechanisms_text(results),
        "geolip-compression": lambda: compression_text(results),
        "geolip-generation": lambda: generation_text(results),
        "geolip-alignment": lambda: alignment_text(results),
    }


def result_of(folder: Path, name: str) -> dict[str, Any]:
    """The results of one of geolip's experiments.

    Raises:
        FileNotFoundError: with the command that makes them.
    """
    return result_json(folder, f"geolip_{name}.json", _COMMAND.format(name))


def features_text(folder: Path) -> str:
    """Held-out cosines, the geometry beside that of random frames, and what attention does."""
    content = result_of(folder, "features")
    parts = [markdown(*features_table(content, "main"))]
    ablations = features_table(content, "ablations")
    if ablations[1]:
        parts.append(markdown(*ablations))
    return "\n".join([*parts, _how_features(content)]) + experiment_conditions([content])


def _how_features(content: dict[str, Any]) -> str:
    data, settings = content["data"], content["settings"]
    return (
        f"{data['description']}: {data['tokens']:,} tokens to learn from, "
        f"{data['held_out_tokens']:,} of other texts held out. {settings['steps']} steps of "
        f"{settings['batch']} texts, Adam, rate {settings['rate']:g}; means over seeds, ± their "
        "standard deviation. PCA: the mean cosine with as many principal components as a token "
        "has numbers. Deviations in radians, inside: below "
        f"{content['rows'][0]['verdict']['dev_critical']:.3f} where rows have 4 numbers.\n"
    )


def mechanisms_text(folder: Path) -> str:
    """What was found where the answer is known, and what simpler criteria would have said."""
    content = result_of(folder, "mechanisms")
    seeds = len({row["seed"] for row in content["rows"]})
    note = (
        f"{seeds} seeds each; alpha starts at {content['rows'][0]['verdict']['alpha_init']:.4f}, "
        "and a gain is the share by which the loss is larger when the other patches come from "
        "another image. What other criteria say of the same runs:"
    )
    return (
        f"{markdown(*mechanisms_table(content))}\n{note}\n\n{markdown(*criteria_table(content))}"
        + experiment_conditions([content])
    )


def compression_text(folder: Path) -> str:
    """Cosines at so many bytes, and where which kind of code is the best."""
    content = result_of(folder, "compression")
    data, settings = content["data"], content["settings"]
    note = (
        f"Mean cosine of {data['held_out_tokens']:,} held-out tokens, {data['description']}; in "
        "brackets the size of the code and the bits of each of its numbers. Networks learned from "
        f"{data['tokens']:,} tokens in {settings['steps']} steps. Bytes of codes alone; what a "
        f"reader needs once is in the file. {'; '.join(winners(content))}.\n"
    )
    table = markdown(*compression_table(content))
    return f"{table}\n{note}" + experiment_conditions([content])


def generation_text(folder: Path) -> str:
    """How far generated images are from real ones, beside controls."""
    content = result_of(folder, "generation")
    sizes = content["sizes"]
    note = (
        f"Distances of {sizes['compared']} images of {sizes['image']} x {sizes['image']} to as "
        "many real ones, sliced Wasserstein, of pixels and of logarithms of power spectra: median "
        "over seeds, lowest and highest. Nearest: the distance to the nearest training image, "
        "beside that of held-out images, and the share that is nearer than those are (0.5 where "
        "they are alike, 1 where training images are copied).\n"
    )
    table = geolip_generation.table(content["rows"])
    return f"{table}\n\n{note}" + experiment_conditions([content])


def alignment_text(folder: Path) -> str:
    """What is left after frames of one geolip were turned into those of another."""
    content = result_of(folder, "alignment")
    note = (
        f"{content['encoder']}, {content['text']}; medians over {content['rows'][0]['seeds']} "
        "seeds, held-out tokens. Pairs: two seeds on one layer; one seed on two layers. A rotation "
        "for all rows, one for each row, one of the whole code; own: its own codes; linear: any "
        "linear map.\n"
    )
    table = geolip_alignment.table(content["rows"])
    return f"{table}\n\n{note}" + experiment_conditions([content])
