"""One YAML file, or flags, or a file and flags that override it: the same settings from each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


def parse_settings(
    kinds: tuple[type, ...],
    arguments: list[str],
    defaults: dict[str, Any] | None = None,
    **options: Any,
) -> tuple:
    """Instances of the dataclasses `kinds` from the command line.

    Args:
        kinds: dataclasses; their field names are the flags and the keys of the file.
        arguments: flags, after the name of a YAML file or without one. Flags win.
        defaults: in place of those of the dataclasses.
        **options: for the parser: `description`, `epilog`, `prog`.

    Raises:
        ValueError: an unreadable file, an unknown key, a value of the wrong type.
    """
    parser = HfArgumentParser(kinds, allow_abbrev=False, **options)
    parser.set_defaults(**(defaults or {}))
    flags = list(arguments)
    if flags and not flags[0].startswith("-"):
        flags = _flags_of(parser, Path(flags[0])) + flags[1:]
    *found, unknown = parser.parse_args_into_dataclasses(
        flags, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(
            f"flags: expected only those that --help lists, got {' '.join(unknown)!r}. Check the "
            "spelling"
        )
    return tuple(found)


def _flags_of(parser: HfArgumentParser, file: Path) -> list[str]:
    """The file's content as flags, so that both are read, converted and refused alike."""
    content = _read_yaml(file)
    known = {action.dest for action in parser._actions if action.dest != "help"}
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ValueError(
            f"{file}: unknown {unknown}; expected only {sorted(known)}. A key that is dropped "
            "would be another model"
        )
    flags: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{file}: {key}: expected a value or a list, got a mapping")
        if isinstance(value, list):
            # An empty list is the default of every field that holds one.
            flags += [f"--{key}", *(str(item) for item in value)] if value else []
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file}: expected a YAML file, cannot read it ({error.strerror}). Give one, or only "
            "flags: --model ... --out ..."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected keys and values, got {type(content).__name__}")
    return content
