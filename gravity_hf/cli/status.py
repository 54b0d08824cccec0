"""`gravity-hf status`: what a folder holds, read without loading the model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import make_console

CALIBRATION_FILE = "calibration.json"
_MASSES = ".gravity.mass_log"
_SOFTENINGS = ".gravity.softening_log"
_RADII = ".gravity.key_radius_sq"


def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a model or adapter.")],
) -> None:
    """Say what DIR holds: the gravity settings, masses per layer, and how gravitational it is.

    Reads config.json and the gravity tensors only, so it is quick on a model of any size.

    Example:

        gravity-hf status out
    """
    console = make_console()
    if (directory / "adapter_config.json").is_file():
        _show_adapter(console, directory)
        return
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"status: expected a folder with config.json or adapter_config.json, got "
            f"{str(directory)!r}. Make a gravity model with: gravity-hf convert MODEL OUT"
        )
    config = _read_json(directory / "config.json")
    if "gravity" in config:
        _show_gravity_model(console, directory, config)
    else:
        _show_plain_model(console, directory, config)


def _show_gravity_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    from ..config import GravityConfig

    settings = GravityConfig.from_dict(config["gravity"])
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    console.print(_title(directory, f"gravity model, {architecture}"))
    console.print(
        f"  law {settings.law}, distance {settings.distance}, {settings.softness_in_words}"
    )
    console.print(
        f"  one mass per {settings.mass_per.replace('_', ' ')}, base epsilon "
        f"{settings.epsilon:g}, implementation {settings.implementation}"
    )
    tensors = dict(gravity_tensors(directory))
    layers = [name.removesuffix(_MASSES) for name in tensors if name.endswith(_MASSES)]
    if not layers:
        raise ValueError(
            f"status: config.json of {str(directory)!r} describes a gravity model, expected "
            "tensors named '*.gravity.mass_log', found none. Save the model again"
        )
    console.print("  over the heads of each layer: lowest / median / highest")
    console.print(_layer_table(layers, tensors))
    _show_calibration(console, directory)
    console.print(f"  next: {_next_step(directory, architecture)}", markup=False)


def _title(directory: Path, what: str) -> str:
    return f"[bold]{escape(str(directory))}[/bold]: {escape(what)}"


def _next_step(directory: Path, architecture: str | None) -> str:
    if str(architecture).endswith(("ForCausalLM", "LMHeadModel")):
        return f'gravity-hf generate {directory} "..."'
    return f"in Python, gravity_hf.load_gravity_model({str(directory)!r})"


def _show_calibration(console: Console, directory: Path) -> None:
    file = directory / CALIBRATION_FILE
    if not file.is_file():
        console.print("  no calibration.json: the contrast of its scores is not recorded")
        return
    summary = _read_json(file).get("summary", {})
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
    if (directory / "gravity_mass_log.pt").is_file():
        console.print(
            "  gravity_mass_log.pt lies beside it: apply those masses in Python with "
            "gravity_hf.load_gravity_mass_log"
        )
    console.print(f"  to convert it: gravity-hf convert {directory} OUT", markup=False)


def _show_adapter(console: Console, directory: Path) -> None:
    adapter = _read_json(directory / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") or "an unnamed base model"
    kind = adapter.get("peft_type", "peft")
    saved = adapter.get("modules_to_save") or []
    holds = "with masses" if "gravity" in saved else "without masses: plain attention"
    console.print(_title(directory, f"{kind} adapter ({holds}) of {base}"))
    console.print(
        f"  rank {adapter.get('r', '?')}, alpha {adapter.get('lora_alpha', '?')}; to merge it "
        f"in Python: gravity_hf.load_gravity_model({str(directory)!r}).merge_and_unload()",
        markup=False,
    )


def _layer_table(layers: list[str], tensors: dict[str, Any]) -> Table:
    from torch.nn.functional import softplus

    columns = [("mass", _MASSES, softplus)]
    if any(name.endswith(_SOFTENINGS) for name in tensors):
        columns.append(("softening", _SOFTENINGS, softplus))
    if any(name.endswith(_RADII) for name in tensors):
        columns.append(("key radius", _RADII, lambda radius_sq: radius_sq.sqrt()))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("heads", justify="right")
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        row = [layer, str(tensors[layer + _MASSES].numel())]
        for _, suffix, readable in columns:
            values = readable(tensors[layer + suffix].float()).tolist()
            shown = (min(values), statistics.median(values), max(values))
            row.append(" / ".join(f"{value:.4g}" for value in shown))
        table.add_row(*row)
    return table


def gravity_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Name and tensor of every gravity tensor of a checkpoint, read lazily, in layer order."""
    from safetensors import safe_open

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update({n: tensors.get_tensor(n) for n in tensors.keys() if ".gravity." in n})  # noqa: SIM118
    yield from sorted(found.items(), key=lambda item: _natural(item[0]))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
