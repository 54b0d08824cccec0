"""What the host's own card says: licence, languages, data and how to cite it. All of it is passed
on, none of it is guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

_CARD = "README.md"
# Fenced blocks that hold BibTeX entries, whatever the fence calls its language.
_FENCE = re.compile(r"^```[^\n`]*\n(?P<body>[^`]*?)^```", re.MULTILINE)
_ENTRY = re.compile(r"\s*@\w+\s*\{")
# Of the HTTP library that the Hub's client is built on, which has changed its name.
_HTTP_ERROR = HfHubHTTPError.__mro__[1]
# No card, no network, a gated repository, a name that is none.
_NOT_THERE = (OSError, ValueError, EntryNotFoundError, _HTTP_ERROR)
# Text that is none, metadata that is none.
_BROKEN = (ValueError, TypeError, yaml.YAMLError)
_TEXTS = ("license_name", "license_link")
_LISTS = ("base_model", "language", "datasets")


def read_host_card(name: str, *, online: bool = True) -> dict[str, Any]:
    """The facts of the card of a host that this project passes on.

    Args:
        name: the host's folder, or its name on the Hub.
        online: whether the Hub may be asked for a card that is not on this machine.

    Returns:
        `found` (bool: whether there was a card that can be read), `broken` (bool: whether there
        was one that cannot), `license` (str, a list of them, or None), `license_name`,
        `license_link`, `citation` (str or None), `base_model`, `language`, `datasets` (lists of
        str). A card that is missing, unreachable or broken is never an error.
    """
    facts: dict[str, Any] = {"found": False, "broken": False}
    facts |= dict.fromkeys(("license", *_TEXTS, "citation"))
    facts |= {key: [] for key in _LISTS}
    file = _file(name, online)
    if file is None:
        return facts
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except _BROKEN:
        return {**facts, "broken": True}
    except OSError:
        return facts
    values = card.data.to_dict()
    facts["found"] = True
    licences = _texts(values.get("license"))
    facts["license"] = licences if len(licences) > 1 else next(iter(licences), None)
    facts |= {key: _text(values.get(key)) for key in _TEXTS}
    facts |= {key: _texts(values.get(key)) for key in _LISTS}
    facts["citation"] = _citation(card.text)
    return facts


def _file(name: str, online: bool) -> Path | None:
    file = Path(name).expanduser() / _CARD
    if file.parent.is_dir():
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(name, _CARD, local_files_only=not online))
    except _NOT_THERE:
        return None


def _text(value: Any) -> str | None:
    if value is False:
        # What YAML makes of the language code of Norwegian.
        return "no"
    return " ".join(str(value).split()) if isinstance(value, str | int | float) else None


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values) if text]


def _citation(text: str) -> str | None:
    blocks = (match["body"].strip() for match in _FENCE.finditer(text))
    entries = [block for block in blocks if _ENTRY.match(block)]
    return "\n\n".join(entries) or None
