"""`gravity-hf convert`: the options of a conversion and its last words."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..console import make_console, quiet_libraries

if TYPE_CHECKING:
    from .settings import ConversionSettings


_SKIP = (
    "Step to leave out: calibrate, transfer, lora, control, merge, evaluate, figures or card; "
    "repeatable. --skip merge saves LoRA as an adapter."
)


def convert(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model folder or Hub name.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    softness: Annotated[
        float,
        typer.Option(min=0.0, help="0: bare gravity. Large: near the original, hardly gravity."),
    ] = 1.0,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Instead: the most gravity within this KL to the host's attention."),
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Refine every head by KL.")] = False,
    transfer_steps: Annotated[
        int, typer.Option(min=0, help="Steps of attention transfer: masses, softenings only.")
    ] = 0,
    lora_steps: Annotated[int, typer.Option(min=0, help="Steps of LoRA.")] = 0,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA matrices.")] = 8,
    control: Annotated[
        bool, typer.Option(help="Give the untouched host the same LoRA, to compare with.")
    ] = True,
    skip: Annotated[list[str] | None, typer.Option(help=_SKIP)] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text, its last part held out; repeatable (default: Python's)"),
    ] = None,
    law: Annotated[str, typer.Option(help="force or power.")] = "force",
    distance: Annotated[str, typer.Option(help="lifted or euclidean.")] = "lifted",
    mass_per: Annotated[str, typer.Option(help="query_head, kv_head or layer.")] = "query_head",
    layers: Annotated[
        str | None, typer.Option(help="Which attention layers, such as 0,1,5-8. Default: all.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Pieces of text to calibrate on, and as many to measure on.")
    ] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a piece.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces in a training step.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Of text, batches and LoRA.")] = 0,
    base_model: Annotated[
        str | None,
        typer.Option(help="MODEL's name on the Hub, for the card, where MODEL is a folder."),
    ] = None,
    figures: Annotated[
        bool, typer.Option(help="Draw figures for the card, where matplotlib is installed.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Start anew and replace the model in OUT.")
    ] = False,
) -> None:
    """Convert MODEL to gravity attention and save it to OUT, with a card that says how it went.

    Masses, softenings and key radii come from MODEL's own queries and keys on the text. What the
    conversion cost is measured on other text. Attention transfer and LoRA train away what is left.

    Finished steps lie in OUT/work: call it again and it goes on where it stopped. With other
    options only the steps that depend on them run again.

    Every setting, YAML files and several GPUs: python scripts/convert.py --help

    Examples:

        gravity-hf convert Qwen/Qwen2.5-0.5B out --text notes.txt

        gravity-hf convert ./my-bert out --softness 4 --samples 64 --length 128

        gravity-hf convert ./my-llama out --law power --max-kl 0.05 --lora-steps 300
    """
    require_packages("convert")
    from .settings import (
        ConversionSettings,
        DataArguments,
        EvaluationArguments,
        GravityArguments,
        LoraArguments,
        ModelArguments,
        TrainingOptions,
        TransferArguments,
    )

    files = [str(file) for file in text] if text else None
    settings = ConversionSettings(
        model=ModelArguments(
            *(model, str(out), None, dtype, device, force, list(skip or ())),
            base_model=base_model,
            figures=figures,
        ),
        gravity=GravityArguments(
            law=law,
            distance=distance,
            mass_per=mass_per,
            layers=layers,
            softness=softness,
            max_kl=max_kl,
            fit=fit,
            samples=samples,
        ),
        transfer=TransferArguments(transfer_steps=transfer_steps),
        lora=LoraArguments(lora_steps=lora_steps, lora_rank=lora_rank, control=control),
        evaluation=EvaluationArguments(evaluation_samples=samples),
        data=DataArguments(text_files=files, length=length, seed=seed),
        training=TrainingOptions(batch_size=batch_size),
    )
    convert_and_report(settings, make_console(), _command(settings))


def convert_and_report(settings: ConversionSettings, console: Console, command: str) -> None:
    """Run the conversion and print what it cost. The command lines share it."""
    from .pipeline import run_conversion

    quiet_libraries()
    results = run_conversion(settings, console, command)
    if results:
        say_results(console, results, settings.model.out)


def require_packages(command: str, *others: str) -> None:
    """Before long work, not after it."""
    for name in ("accelerate", "datasets", *others):
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"{command} needs {name}, which is not installed: pip install 'gravity_hf[train]'"
            )


def say_results(console: Console, results: dict[str, Any], out: str) -> None:
    """The numbers of the table in words, each with how gravitational it is."""
    evaluation = results["evaluation"]
    rows = {row["key"]: row for row in evaluation["rows"]} if evaluation else {}
    gravity = [row for row in rows.values() if row.get("attention")]
    for row in gravity:
        console.print(f"{row['title']}: {_quality(row, rows)}", markup=False)
    summary = gravity[-1]["attention"] if gravity else results["calibration"]
    if summary is not None:
        console.print(
            f"How gravitational: median softness {summary['softness_median']:.3g}, median contrast "
            f"{summary['contrast_median']:.3g} (1 = distance makes no difference)"
        )
    console.print(f"Saved to {out}. Next: gravity-hf status {out}", markup=False)


def _quality(row: dict[str, Any], rows: dict[str, Any]) -> str:
    if "loss" not in row:
        return (
            f"held-out text, embeddings against the host's: mean cosine {row['cosine_mean']:.4f}, "
            f"lowest {row['cosine_min']:.4f}, same nearest neighbour {row['same_neighbour']:.0%}"
        )
    host = rows["host"]["loss"]
    text = (
        f"loss on held-out text {row['loss']:.4f} nats per token, the host's {host:.4f} "
        f"({row['loss'] - host:+.4f})"
    )
    if row["key"] == "healed" and "control" in rows:
        other = rows["control"]["loss"]
        text += f", the host with the same LoRA {other:.4f} ({row['loss'] - other:+.4f})"
    return text


def _command(settings: ConversionSettings) -> str:
    """The call that repeats this one: every option that is not at its default."""
    from .settings import ConversionSettings as Defaults

    given, usual = settings.to_dict(), Defaults().to_dict()
    parts = ["gravity-hf", "convert", given.pop("model"), given.pop("out")]
    usual |= {"length": 256, "evaluation_samples": given["evaluation_samples"]}
    given["text"] = given.pop("text_files") or []
    usual["text"] = []
    for name, value in given.items():
        if value == usual.get(name):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag if value else "--no-" + name.replace("_", "-"))
        else:
            for item in value if isinstance(value, list) else [value]:
                parts += [flag, str(item)]
    return shlex.join(parts)
