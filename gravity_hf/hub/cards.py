"""The model card of a conversion or of an exported folder, from what was measured and what its
files show, and nothing else: a number that was not measured has no place in it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..training.files import write_text
from .card_attribution import citation, licence
from .card_facts import complete, facts_of_folder
from .card_figures import FOLDER, read_figures
from .card_kinds import card_kind, kind_of_folder
from .card_law import constants, law_text, layer_table
from .card_limits import limits, software
from .card_metadata import metadata
from .card_tables import measured
from .card_text import changes, command, conditions, introduction, loading, recipe, samples
from .own_models import is_own_folder
from .tensor_files import read_json

_CARDS_PACKAGE = "gravity_hf._cards"
_TEMPLATE = "template.md"


def write_card(
    source: Path, target: Path, *, name: str | None = None, figures: Path | None = None
) -> None:
    """Write a card: whole, or not at all.

    Args:
        source: an exported folder, or the results.json of a conversion.
        target: the file to write.
        name: of the model; the title. Default: the name of the target's folder.
        figures: folder of pictures below the target's. Default: `figures` beside the source.
    """
    is_folder = source.is_dir()
    facts = _facts_of_folder(source) if is_folder else _complete(read_json(source))
    if figures is None:
        figures = (source if is_folder else source.parent) / FOLDER
        shown = FOLDER
    else:
        shown = figures.relative_to(target.parent).as_posix()
    card = _card(facts, name or target.resolve().parent.name, read_figures(figures, shown))
    write_text(target, str(card))


def model_card(results: dict[str, Any], name: str) -> ModelCard:
    """The card of a conversion, or of a model of our own, without pictures.

    Args:
        results: as `gravity-hf convert` writes them to results.json; of a model of our own
            with its config.
        name: of the model; the title.
    """
    return _card(_complete(results), name, [])


def card_of_folder(
    folder: Path, name: str, *, host: str | None = None, online: bool = True
) -> ModelCard:
    """The card of an exported model or adapter: of its results.json where there is one, or else of
    its settings and tensors, which say nothing of its quality: "not measured".

    Args:
        folder: as `save_pretrained` or `gravity-hf convert` wrote it, or a saved model of our own;
            pictures in its `figures`.
        name: of the model, such as `me/my-model`; the title.
        host: folder or Hub name of the host, where the folder does not record it.
        online: whether the Hub may be asked for the host's card, for its licence.

    Raises:
        ValueError: no gravity model or adapter, or files that cannot be read.
    """
    facts = _facts_of_folder(folder, host, online=online)
    return _card(facts, name, read_figures(folder / FOLDER))


def _facts_of_folder(
    folder: Path, host: str | None = None, *, online: bool = True
) -> dict[str, Any]:
    own = kind_of_folder(folder)
    if own is not None:
        return own.complete(own.results_of(folder))
    if is_own_folder(folder):
        raise ValueError(
            f"card: expected an LGT, an NGT, a geolip or a converted model, got {str(folder)!r} of "
            "another kind, such as a tri-model, which has no card yet. Write its README.md yourself"
        )
    return facts_of_folder(folder, host, online=online)


def _complete(results: dict[str, Any]) -> dict[str, Any]:
    own = card_kind(results)
    return complete(results) if own is None else own.complete(results)


def _card(facts: dict[str, Any], name: str, figures: list[dict[str, str]]) -> ModelCard:
    template = resources.files(_CARDS_PACKAGE).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    own = card_kind(facts)
    return ModelCard.from_template(
        metadata(facts, name) if own is None else own.metadata(facts, name),
        template_str=template,
        title=name,
        figures=figures,
        **(_parts(facts, name) if own is None else own.parts(facts, name)),
    )


def _parts(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "introduction": introduction(facts),
        "version": facts["gravity_hf"],
        "law_text": law_text(facts),
        "constants": constants(facts),
        "layers": layer_table(facts),
        "changes_title": "What was changed",
        "changes": changes(facts),
        "recipe": recipe(facts),
        "measured": measured(facts),
        "samples": samples(facts),
        "conditions": conditions(facts),
        "command": command(facts),
        "loading": loading(facts, name),
        "limits": limits(facts),
        "software": software(facts),
        "licence": licence(facts),
        "citation": citation(facts),
    }
