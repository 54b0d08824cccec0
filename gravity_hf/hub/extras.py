"""What goes up beside an export, looked at before anything is saved or asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_kinds import card_kind
from .card_lora import is_lora_run
from .tensor_files import read_json

# The blocks that a card is made from, and what they are; the others may be absent.
_BLOCKS: dict[str, type] = {"host": dict, "saved": str, "law": str, "patch": dict}
_LORA_BLOCKS: dict[str, type] = {
    **dict.fromkeys(("model", "settings", "training", "conditions"), dict)
}


@dataclass(frozen=True)
class Extras:
    """What goes up beside the export; the arguments of `push_gravity_model` of the same names."""

    tokenizer: Any = "host"
    processor: Any = None
    results: Any = None
    figures: Any = True
    tags: tuple[str, ...] = ()

    @property
    def given_inputs(self) -> list[Any]:
        """The tokenizer and the processor that were given, where they were."""
        return [part for part in (self.tokenizer, self.processor) if part not in (None, "host")]


def check_extras(extras: Extras) -> None:
    """Refuse what cannot go up.

    Raises:
        ValueError: which argument it is, and what it may be.
    """
    for name, other in (("tokenizer", "'host', "), ("processor", "")):
        part = getattr(extras, name)
        if part is None or (other and isinstance(part, str) and part == "host"):
            continue
        if not hasattr(part, "save_pretrained"):
            raise ValueError(
                f"{name}: expected {other}a {name} or None, got {part!r}. Load it first: "
                f"{name}=Auto{name.capitalize()}.from_pretrained(...)"
            )
    figures = extras.figures
    if isinstance(figures, (str, os.PathLike)) and not Path(figures).expanduser().is_dir():
        raise ValueError(
            f"figures: expected True, False or a folder with pictures, got {str(figures)!r}, which "
            "is no folder. Draw some with: gravity-hf figures FOLDER -o OUT"
        )
    given_results(extras)


def given_results(extras: Extras) -> dict[str, Any] | None:
    """The results that were given, read from their file; None where there are none.

    Raises:
        ValueError: no such file, or results of something else.
    """
    results = extras.results
    if results is None:
        return None
    name = "results"
    if isinstance(results, (str, os.PathLike)):
        file = Path(results).expanduser()
        if not file.is_file():
            raise ValueError(f"results: expected a results.json, got {str(file)!r}: no such file")
        name, results = f"results: {file}", read_json(file)
    missing = missing_block(results) if isinstance(results, Mapping) else next(iter(_BLOCKS))
    if missing is not None:
        raise ValueError(
            f"{name}: expected what `gravity-hf convert` writes to results.json, got something "
            f"without its block {missing!r}. Leave results out: the card then says 'not measured'"
        )
    return dict(results)


def missing_block(results: Mapping[str, Any]) -> str | None:
    """The first block that a card needs and `results` lack; None where nothing is missing."""
    if card_kind(results) is not None:
        return None
    blocks = _LORA_BLOCKS if is_lora_run(dict(results)) else _BLOCKS
    return next(
        (key for key, kind in blocks.items() if not isinstance(results.get(key), kind)), None
    )
