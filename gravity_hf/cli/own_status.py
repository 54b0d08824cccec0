"""What `gravity-hf status` says of models that are gravity by themselves: LGT and the tri-model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from ..hub.own_models import own_config
from ..integration.own_models import gravity_in_words, sizes_in_words, why_no_text


def show_own_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    """Its law, sizes and constants, read without loading the weights.

    Args:
        config: the content of config.json.
    """
    # As the model would read it: what config.json leaves out has its default.
    settings = own_config(directory)
    name = (config.get("architectures") or [settings.model_type])[0]
    console.print(f"[bold]{escape(str(directory))}[/bold]: {escape(name)}, gravity from the start")
    for line in (sizes_in_words(settings), *gravity_in_words(settings)):
        console.print(f"  {line}", markup=False)
    if not any(directory.glob("model*.safetensors")):
        console.print("  no model.safetensors: the settings alone are here")
        return
    _show_tensors(console, directory)
    console.print(f"  next: {_next_step(directory, settings)}", markup=False)


def _show_tensors(console: Console, directory: Path) -> None:
    from ..hub.card_lgt import constants_of
    from ..hub.plan import size_in_words
    from ..hub.tensor_files import shapes_of_export

    count = len(shapes_of_export(directory, "model"))
    size = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    console.print(f"  {count} tensors, {size_in_words(size)}")
    rows = constants_of(directory)
    if not rows:
        return
    console.print("  |G| over the heads of each layer: lowest / median / highest")
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("heads", justify="right")
    table.add_column("|G|", justify="right", no_wrap=True)
    for row in rows:
        found = row["G"]
        spread = " / ".join(f"{found[which]:.4g}" for which in ("lowest", "median", "highest"))
        table.add_row(row["layer"], str(found["count"]), spread)
    console.print(table)


def _next_step(directory: Path, settings: PreTrainedConfig) -> str:
    if why_no_text(settings) is None and (directory / "tokenizer_config.json").is_file():
        return f'gravity-hf generate {directory} "..."'
    return f"in Python, gravity_hf.load_gravity_model({str(directory)!r})"
