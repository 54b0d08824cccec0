"""What `gravity-hf status` says of a geolip, of a companion, and of a prior over codes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from ..hub.tensor_files import read_json
from ..integration.own_geolip import COMPANION, PRIOR, verdict_in_words

# As `viz.geolip` calls it, which is not imported to read a status.
_SAMPLES = "samples.safetensors"


def show_geolip(console: Console, directory: Path, settings: PreTrainedConfig) -> None:
    """Its lens as the file has it, its verdict as it was recorded, alpha of each layer, and what
    comes next; a prior has none but the last."""
    if settings.model_type != PRIOR:
        _show_measured(console, directory, settings)
    console.print(f"  next: {_next_step(directory, settings)}", markup=False)


def _show_measured(console: Console, directory: Path, settings: PreTrainedConfig) -> None:
    from ..hub.card_geolip import alphas_of_geolip, inner_settings, lens_error_of

    inner = settings
    if settings.model_type == COMPANION:
        inner = inner_settings(read_json(directory / "config.json"))
    error = lens_error_of(directory, inner)
    if error is not None:
        console.print(f"  lens, read from the file: largest entry of E^T E - 1 is {error:.1e}")
    for line in verdict_in_words(inner.verdict):
        console.print(f"  {line}", markup=False)
    rows = alphas_of_geolip(directory, inner)
    if not rows:
        return
    start = f"{inner.alpha_start:.4g}"
    console.print(f"  alpha of the modes of each layer, of which the start is {start}:")
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("modes", justify="right")
    for title in ("lowest", "median", "highest"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        alpha = row["alpha"]
        numbers = [f"{alpha[which]:.4g}" for which in ("lowest", "median", "highest")]
        table.add_row(row["layer"], str(alpha["count"]), *numbers)
    console.print(table)


def _next_step(directory: Path, settings: PreTrainedConfig) -> str:
    if settings.model_type != PRIOR and (directory / _SAMPLES).is_file():
        return f"gravity-hf figures {directory}"
    if settings.model_type == COMPANION:
        return f"in Python, gravity_hf.GeolipCompanion.from_pretrained({str(directory)!r})"
    return f"in Python, gravity_hf.load_gravity_model({str(directory)!r})"
