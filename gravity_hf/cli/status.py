"""`gravity-hf status`: what a folder holds, read without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..hub.file_names import CALIBRATION_FILE
from ..hub.tensor_files import read_json
from ..integration.factorized_folder import KEY as LOW_RANK_KEY
from .console import make_console


def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a model or adapter.")],
) -> None:
    """Say what DIR holds: the gravity settings, masses per layer, and how gravitational it is.

    Reads settings and the gravity tensors only, so it is quick on a model of any size.

    Example:

        gravity-hf status out
    """
    from ..hub.own_models import is_own_folder
    from .own_status import show_own_model

    console = make_console()
    if (directory / "adapter_config.json").is_file():
        _show_adapter(console, directory)
        return
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"status: expected a folder with config.json or adapter_config.json, got "
            f"{str(directory)!r}. Make a gravity model with: gravity-hf convert MODEL OUT"
        )
    config = read_json(directory / "config.json")
    if is_own_folder(directory):
        show_own_model(console, directory, config)
    elif "gravity" in config:
        _show_gravity_model(console, directory, config)
    else:
        _show_plain_model(console, directory, config)


def _show_gravity_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    console.print(_title(directory, f"gravity model, {architecture}"))
    _show_gravity(console, directory, config["gravity"])
    _show_ranks(console, config)
    console.print(f"  next: {_next_step(directory, architecture)}", markup=False)


def _show_gravity(console: Console, directory: Path, block: dict[str, Any]) -> None:
    """Settings, masses and calibration, of a model or an adapter."""
    from ..config import GravityConfig
    from ..hub.card_tensors import gravity_layers

    settings = GravityConfig.from_dict(block)
    console.print(
        f"  law {settings.law}, distance {settings.distance}, {settings.softness_in_words}"
    )
    console.print(
        f"  one mass per {settings.mass_per.replace('_', ' ')}, base epsilon "
        f"{settings.epsilon:g}, implementation {settings.implementation}"
    )
    layers = gravity_layers(directory)
    console.print("  over each layer: lowest / median / highest")
    console.print(_layer_table(layers))
    _show_calibration(console, directory)


def _title(directory: Path, what: str) -> str:
    return f"[bold]{escape(str(directory))}[/bold]: {escape(what)}"


def _next_step(directory: Path, architecture: str | None) -> str:
    if str(architecture).endswith(("ForCausalLM", "LMHeadModel")):
        return f'gravity-hf generate {directory} "..."'
    return f"in Python, gravity_hf.load_gravity_model({str(directory)!r})"


def _show_calibration(console: Console, directory: Path) -> None:
    file = directory / CALIBRATION_FILE
    if not file.is_file():
        console.print("  no calibration.json: the contrast is not recorded")
        return
    summary = read_json(file).get("summary", {})
    shown = {
        "contrast_median": "median contrast {:.3g} (1 = distance makes no difference)",
        "kl_mean": "mean KL to the host's attention {:.3g} nats",
    }
    found = [text.format(summary[key]) for key, text in shown.items() if key in summary]
    console.print("  at calibration: " + ", ".join(found))
    factors = [summary.get(f"softness_{which}") for which in ("min", "median", "max")]
    if None not in factors and factors[0] != factors[-1]:
        spread = " / ".join(f"{factor:.3g}" for factor in factors)
        console.print(f"  softness over all heads, lowest / median / highest: {spread}")
    if summary.get("over_budget"):
        console.print(
            f"  [bold]{summary['over_budget']} of {summary['heads']} heads are over the KL budget"
            "[/bold]"
        )


def _show_plain_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    kind = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    console.print(_title(directory, f"{kind} with its own attention, not a gravity model"))
    _show_ranks(console, config)
    if (directory / "gravity_mass_log.pt").is_file():
        console.print(
            "  gravity_mass_log.pt lies beside it: apply those masses in Python with "
            "gravity_hf.load_gravity_mass_log"
        )
    console.print(f"  to convert it: gravity-hf convert {directory} OUT", markup=False)


def _show_ranks(console: Console, config: dict[str, Any]) -> None:
    """Of a factorised host: how many maps, and that nothing else loads it."""
    ranks = (config.get(LOW_RANK_KEY) or {}).get("ranks")
    if ranks:
        console.print(
            f"  {len(ranks)} maps of low rank, {min(ranks.values())} to {max(ranks.values())}: "
            "load it with gravity_hf.load_factorized; transformers alone refuses it"
        )


def _show_adapter(console: Console, directory: Path) -> None:
    adapter = read_json(directory / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") or "an unnamed base model"
    kind = adapter.get("peft_type", "peft")
    block = adapter.get("gravity")
    # Of models that are gravity by construction adapters hold masses without settings of a patch.
    has_masses = block is not None or "gravity" in (adapter.get("modules_to_save") or ())
    holds = "with masses" if has_masses else "without masses: plain attention"
    console.print(_title(directory, f"{kind} adapter ({holds}) of {base}"))
    if block is not None:
        _show_gravity(console, directory, block)
    console.print(
        f"  rank {adapter.get('r', '?')}, alpha {adapter.get('lora_alpha', '?')}; to merge it "
        f"in Python: gravity_hf.load_gravity_model({str(directory)!r}).merge_and_unload()",
        markup=False,
    )


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    titles = ("mass", "softening", "key_radius")
    shown = [key for key in titles if any(row[key] is not None for row in layers)]
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("masses", justify="right")
    for key in shown:
        table.add_column(key.replace("_", " "), justify="right", no_wrap=True)
    for row in layers:
        spreads = [_spread(row[key]) for key in shown]
        table.add_row(row["layer"], str(row["mass"]["count"]), *spreads)
    return table


def _spread(values: dict[str, Any] | None) -> str:
    if values is None:
        return ""
    return " / ".join(f"{values[which]:.4g}" for which in ("lowest", "median", "highest"))
