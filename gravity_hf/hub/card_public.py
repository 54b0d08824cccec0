"""Results as others may read them: no place on the machine that they were made on."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Beginnings of a path that names a place: "/", "~/", "~name/", "C:\", "\\server", "file://".
_ROOT = r"(?:file://|/|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\)"
_PARENT = r"(?:[\w.~-]+[/\\])*\.\.[/\\]"
_PLACE = re.compile(rf"^(?:{_ROOT}|~$|\.\.$|{_PARENT}|\S*[/\\]\.\.$)", re.ASCII)
# The same inside of a sentence, up to where a name may end.
_PLACE_IN_TEXT = re.compile(
    rf"(?<![\w/\\.:~<-])(?:{_ROOT}|{_PARENT})[^\s'\"`,;()\[\]{{}}<>|]*[\w*-]", re.ASCII
)
# Where those are quoted word for word, and belong to what was measured.
_QUOTED = ("samples", "prompts", "citation")
_NOWHERE = {"", ".", "..", "~"}


def is_local(name: str) -> bool:
    """Whether a name is that of a folder here, or could be no name on the Hub."""
    local = name.startswith(".") or _PLACE.match(name) is not None
    return local or Path(name).expanduser().is_dir()


def is_hub_name(name: str) -> bool:
    """Whether a model or dataset on the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public(results: dict[str, Any]) -> dict[str, Any]:
    """A copy of results.json in which every path is its last name; `public` of that is the same.

    What a path said beside its name is kept: whether the host and the dataset lay on this machine.
    Paths are recognised by where they begin: at a root, a drive, a home or a parent folder.
    """
    found = dict(results)
    host, settings = found.get("host"), found.get("settings")
    if isinstance(host, dict) and host.get("name"):
        found["host"] = {**host, "name": _host_name(host["name"])}
        if host.get("local") is None and "local" not in host:
            found["host"]["local"] = is_local(host["name"])
    if isinstance(settings, dict) and settings.get("dataset"):
        found.setdefault("dataset_local", is_local(settings["dataset"]))
    return _public(found)


def _host_name(name: str) -> str:
    """A name that only the working folder gives a meaning to gets the one that it has there."""
    if set(re.split(r"[/\\]", name)) <= _NOWHERE:
        return Path(os.path.abspath(Path(name).expanduser())).name
    return last_name(name) if name.startswith(".") else name


def _public(content: Any, key: str = "") -> Any:
    if key in _QUOTED:
        return content
    if isinstance(content, dict):
        return _public_keys(content)
    if isinstance(content, list | tuple):
        return [_public(part) for part in content]
    if not isinstance(content, str):
        return content
    return _public_command(content) if key == "command" else _public_text(content)


def _public_keys(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = unique = _public_text(key)
        count = 1
        while unique in found:
            count += 1
            unique = f"{name} ({count})"
        found[unique] = _public(value, key)
    return found


def _public_text(text: str) -> str:
    if _PLACE.match(text) and "\n" not in text:
        return last_name(text)
    return _PLACE_IN_TEXT.sub(lambda match: last_name(match[0]), text)


def _public_command(command: str) -> str:
    """The words of a command, each its own path or the value of an option."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if re.search(r"[A-Za-z]:\\\w", command):
        # Outside of quotes these separate folders there, and escape nothing.
        lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError:
        return _public_text(command)
    shown = [_public_word(word) for word in words]
    return command if shown == words else shlex.join(shown)


def _public_word(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_public_text(value)}"
    return _public_text(word)


def last_name(path: str) -> str:
    """The last part of a path of any system that is a name."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in _NOWHERE]
    named = [part for part in parts if not re.fullmatch(r"[A-Za-z]:|file:|~[\w.-]*", part)]
    return named[-1] if named else "folder"
