"""Whose work a model is: the host's licence and sources, and how to cite both."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from .card_public import is_hub_name, last_name

UNKNOWN = "not stated by the host"
_PACKAGE = "gravity_hf"


def host_name(facts: dict[str, Any]) -> str | None:
    """What people may read of the host's name: of a folder, not where it lies."""
    host = facts["host"]
    if host["name"] is None or not host["local"]:
        return host["name"]
    return last_name(host["name"])


def base_model(facts: dict[str, Any]) -> str | None:
    """The host's name on the Hub, where it is known to have one."""
    host = facts["host"]
    named = host["base_model"] or (host["name"] if host["local"] is False else None)
    return named if named and is_hub_name(named) else None


def licence_link(card: dict[str, Any]) -> str | None:
    """The host's link to its licence, unless it points to a file beside the host."""
    link = card.get("license_link")
    return link if link and link.startswith(("http://", "https://")) else None


def licence(facts: dict[str, Any]) -> list[str]:
    """Sentences: the licence, and whose work the weights are."""
    card = facts["host"].get("card")
    name, lines = host_name(facts), []
    if card is not None and card.get("broken"):
        lines.append("Licence: not stated; the host's card could not be read.")
    elif card is None or not card["found"]:
        lines.append("Licence: not stated; no card of the host was found.")
    elif card["license"] is None:
        lines.append(f"Licence: {UNKNOWN}.")
    else:
        lines.append(f"Licence: {_licence(card)}, inherited from the host's card.")
    lines.append(_whose(name, base_model(facts), facts["saved"] == "adapter"))
    if card and card["base_model"]:
        lines.append(f"The host names as its own base: {_listed(card['base_model'])}.")
    if card and card["datasets"]:
        lines.append(f"The host's card names as its data: {_listed(card['datasets'])}.")
    return lines


def citation(facts: dict[str, Any]) -> list[str]:
    """BibTeX: this software, then what the host's card asks for."""
    entries = [_own_entry(facts["gravity_hf"])]
    card = facts["host"].get("card")
    if card and card["citation"]:
        entries.append(card["citation"])
    return entries


def _whose(name: str | None, where: str | None, is_adapter: bool) -> str:
    if name is None:
        whose = "it goes onto" if is_adapter else "it started from"
        return f"Whose weights {whose} is not recorded."
    whose = f"`{name}`"
    if where and where != name:
        whose += f" (`{where}` on the Hub)"
    if is_adapter:
        return f"It holds no weights of {whose}; it goes onto them."
    return f"The weights are those of {whose}, changed as described above."


def _licence(card: dict[str, Any]) -> str:
    named = card["license"]
    text = _listed(named if isinstance(named, list) else [named])
    if card["license_name"]:
        text += f" ({card['license_name']})"
    if licence_link(card):
        text += f", {card['license_link']}"
    elif card["license_link"]:
        text += f", in the host's file `{card['license_link']}`"
    return text


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _own_entry(version: str) -> str:
    fields = {"title": _title(), "version": version}
    url = _url()
    if url:
        fields["url"] = url
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@software{{{_PACKAGE},\n{body}\n}}"


def _title() -> str:
    try:
        summary = metadata(_PACKAGE)["Summary"]
    except PackageNotFoundError:
        summary = None
    return f"{_PACKAGE}: {summary}".rstrip(".") if summary else _PACKAGE


def _url() -> str | None:
    try:
        urls = metadata(_PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    found = (re.search(r"https?://\S+", url) for url in urls)
    return next((match[0] for match in found if match), None)
