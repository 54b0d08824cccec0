"""What `gravity-hf status` says of models that are gravity by themselves: LGT and the tri-model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from ..hub.own_models import own_config


def show_own_model(console: Console, directory: Path, config: dict[str, Any]) -> None:
    """Its law, sizes and constants, read without loading the weights.

    Args:
        config: the content of config.json.
    """
    # As the model would read it: what config.json leaves out has its default.
    settings = own_config(directory)
    name = (config.get("architectures") or [settings.model_type])[0]
    console.print(f"[bold]{escape(str(directory))}[/bold]: {escape(name)}, gravity from the start")
    for line in _lines(settings):
        console.print(f"  {line}", markup=False)
    if not any(directory.glob("model*.safetensors")):
        console.print("  no model.safetensors: the settings alone are here")
        return
    _show_tensors(console, directory)
    console.print(f"  next: {_next_step(directory, name, settings)}", markup=False)


def _lines(settings: PreTrainedConfig) -> list[str]:
    sizes = f"{settings.num_hidden_layers} layers, {settings.num_attention_heads} heads, width "
    lines = [sizes + f"{settings.hidden_size}, {_vocabulary(settings)}"]
    streams = getattr(settings, "streams", None)
    if streams is not None:
        return [*lines, *(_stream(name, values) for name, values in streams.items())]
    law = "softmax over forces"
    if settings.force_law == "power":
        law = "weights proportional to (mass / distance)^|G|"
    sight = "causal" if settings.is_causal else "sees both ways"
    lines.append(f"law {settings.force_law}: {law}; {sight}")
    distance = f"{settings.position_type} positions of {settings.dim_position} coordinates, "
    lines.append(distance + f"curvature {settings.curvature:g}, {_softening(settings.softening)}")
    if settings.force_law != "power":
        cap = "no cap" if settings.max_force is None else f"capped at {settings.max_force:g}"
        lines.append(f"forces {cap}" + ("" if settings.max_force is None else _cap(settings)))
    return lines


def _cap(settings: PreTrainedConfig) -> str:
    return f" ({settings.force_cap})"


def _vocabulary(settings: PreTrainedConfig) -> str:
    if settings.vocab_size is None:
        return "continuous inputs"
    return f"vocabulary {settings.vocab_size}, {settings.max_position_embeddings} positions"


def _softening(softening: float) -> str:
    what = "the published law" if softening == 0 else "added to the squared distance"
    return f"softening {softening:g} ({what})"


def _stream(name: str, values: Any) -> str:
    shown = values if isinstance(values, dict) else vars(values)
    return f"stream {name}: " + ", ".join(f"{key} {value}" for key, value in shown.items())


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


def _next_step(directory: Path, name: str, settings: PreTrainedConfig) -> str:
    causal = getattr(settings, "is_causal", False)
    if name.endswith("ForCausalLM") and causal and (directory / "tokenizer_config.json").is_file():
        return f'gravity-hf generate {directory} "..."'
    return f"in Python, transformers.AutoModel.from_pretrained({str(directory)!r})"
