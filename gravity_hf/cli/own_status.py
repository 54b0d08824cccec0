"""What `gravity-hf status` says of models of this library's own; NGT's twins, LeanFormers that take
dot products, and a geolip unless it was asked for, have no gravity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from ..hub.own_models import own_config
from ..integration.own_geolip import GEOLIPS
from ..integration.own_lean import LEANFORMER
from ..integration.own_models import (
    gravity_in_words,
    has_no_gravity,
    sizes_in_words,
    why_no_text,
)
from ..integration.own_words import NGT
from .geolip_status import show_geolip


def show_own_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    """Its law, sizes and constants, read without loading the weights.

    Args:
        config: the content of config.json.
    """
    # As the model would read it: what config.json leaves out has its default.
    settings = own_config(directory)
    name = (config.get("architectures") or [settings.model_type])[0]
    what = "without gravity" if has_no_gravity(settings) else "gravity from the start"
    console.print(f"[bold]{escape(str(directory))}[/bold]: {escape(name)}, {what}")
    for line in (sizes_in_words(settings), *gravity_in_words(settings)):
        console.print(f"  {line}", markup=False)
    if not any(directory.glob("model*.safetensors")):
        console.print("  no model.safetensors: the settings alone are here")
        return
    _show_tensors(console, directory, settings)
    if settings.model_type in GEOLIPS:
        show_geolip(console, directory, settings)
        return
    console.print(f"  next: {_next_step(directory, settings)}", markup=False)


def _show_tensors(console: Console, directory: Path, settings: PreTrainedConfig) -> None:
    from ..hub.plan import size_in_words
    from ..hub.tensor_files import shapes_of_export

    count = len(shapes_of_export(directory, "model"))
    size = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    console.print(f"  {count} tensors, {size_in_words(size)}")
    if settings.model_type in GEOLIPS:
        return
    rows, columns = _constants(directory, settings)
    if not rows:
        return
    console.print("  of the heads of each layer: lowest / median / highest")
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("heads", justify="right")
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        heads = row[columns[0][1]]["count"]
        table.add_row(row["layer"], str(heads), *(_spread(row.get(key)) for _, key in columns))
    console.print(table)


def _constants(
    directory: Path, settings: PreTrainedConfig
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Rows of layers, and of their columns the titles and the keys."""
    if settings.model_type == NGT:
        from ..hub.card_ngt import COLUMNS, constants_of_ngt

        rows = constants_of_ngt(directory)
        return rows, [(title, key) for title, key in COLUMNS if any(key in row for row in rows)]
    if settings.model_type == LEANFORMER:
        from ..hub.card_lean import COLUMNS as LEAN_COLUMNS
        from ..hub.card_lean import constants_of_leanformer

        rows = constants_of_leanformer(directory)
        return rows, [pair for pair in LEAN_COLUMNS if any(pair[1] in row for row in rows)]
    from ..hub.card_lgt import constants_of

    return constants_of(directory), [("|G|", "G")]


def _spread(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    numbers = [f"{found[which]:.4g}" for which in ("lowest", "median", "highest")]
    return numbers[0] if found["lowest"] == found["highest"] else " / ".join(numbers)


def _next_step(directory: Path, settings: PreTrainedConfig) -> str:
    if why_no_text(settings) is None and (directory / "tokenizer_config.json").is_file():
        return f'gravity-hf generate {directory} "..."'
    return f"in Python, gravity_hf.load_gravity_model({str(directory)!r})"
