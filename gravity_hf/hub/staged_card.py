"""Which card a push brings: the user's own, or one that is made from the files of the push."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..integration.own_geolip import GEOLIPS
from .cards import card_of_folder
from .file_names import CARD_FILE

# In the metadata of every card of a gravity model, of the twin of one, and of a geolip.
_OUR_TAG = "gravity-attention"
_OUR_TAGS = {_OUR_TAG, "ngt", *GEOLIPS}


@dataclass(frozen=True)
class CardSource:
    """What a card is made from. `host`: the host's name; `online`: whether its card may be asked
    for on the Hub."""

    host: str | None
    tags: tuple[str, ...]
    online: bool


def staged_card(
    export: Path,
    own: Mapping[str, Path],
    files: Mapping[str, Path],
    name: str,
    source: CardSource,
) -> tuple[str | None, list[str]]:
    """The card's text, None where the one in the folder goes up as it is; and notices.

    Args:
        export: the folder.
        own: what goes up of it, by path.
        files: everything that goes up, by path.
        name: of the repository; the title.
    """
    file, notices = own.get(CARD_FILE), []
    card = None if file is None else _gravity_card(file)
    if file is not None and card is None:
        notices = [
            f"{CARD_FILE} is not a card of a gravity model (its tags have none of "
            f"{', '.join(sorted(_OUR_TAGS))}): a card of this model takes its place"
        ]
    if card is None or _is_untouched(card, export, own, source):
        card = _generated(files, name, source)
    elif not source.tags:
        return None, notices
    data: Any = card.data
    known = data.tags or []
    if source.tags:
        data.tags = [*known, *(tag for tag in source.tags if tag not in known)]
    return str(card), notices


def _gravity_card(file: Path) -> ModelCard | None:
    """The card in a folder, if it was made by us or by somebody who knows what the model is."""
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return None
    tags = card.data.to_dict().get("tags")
    return card if isinstance(tags, list) and _OUR_TAGS & set(tags) else None


def _is_untouched(
    card: ModelCard, export: Path, own: Mapping[str, Path], source: CardSource
) -> bool:
    """Whether nobody has touched a card since it was written: it may take the new name."""
    written = str(_generated(own, export.resolve().name, source))
    return card.content.strip() == written.strip()


def _generated(files: Mapping[str, Path], name: str, source: CardSource) -> ModelCard:
    """The card of files that lie in several folders: linked into one."""
    with tempfile.TemporaryDirectory(prefix="gravity-card-") as scratch:
        for path, file in files.items():
            link = Path(scratch, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        return card_of_folder(Path(scratch), name, host=source.host, online=source.online)
