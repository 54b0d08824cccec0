"""`gravity-hf demo`: the options of the demonstration and its last words."""

from __future__ import annotations

import importlib.util
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ..console import make_console

EXIT_NOT_ACCEPTED = 1


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, numbers and models.")] = (
        Path("gravity_demo")
    ),
    seed: Annotated[int, typer.Option(help="Of weights, batches and samples.")] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Your own text; repeatable. Default: the Python standard library's."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, for a first look.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train the host again even if OUT has one.")
    ] = False,
) -> None:
    """Train a small model, make its attention gravitational in three ways, and report honestly.

    Offline, on the CPU, in a few minutes. Exit code 1 if calibrated and healed gravity ends more
    than 0.02 nats per byte away from the host with the same LoRA budget.

    Examples:

        gravity-hf demo

        gravity-hf demo --quick --out first_look

        gravity-hf demo --text novel.txt --seed 1
    """
    _require_packages()
    # Said before torch and transformers are imported, which takes seconds.
    console = make_console()
    console.print(f"gravity-hf demo, seed {seed}, into {out}", markup=False)
    from .run import run_demo
    from .settings import demo_settings

    started = time.perf_counter()
    results = run_demo(
        out,
        demo_settings(seed, quick),
        console,
        files=text,
        fresh=fresh,
        command=_command(out, seed, text, quick, fresh),
    )
    console.print()
    style = "bold red" if results.problems else "bold green"
    console.print(results.verdict, style=style, markup=False)
    minutes = (time.perf_counter() - started) / 60
    last_words = (
        f"{minutes:.1f} minutes. Open {out / 'report.html'}; numbers in results.json\n"
        f"Next: gravity-hf status {out / 'model'}"
    )
    console.print(last_words, markup=False)
    if results.problems:
        raise typer.Exit(EXIT_NOT_ACCEPTED)


def _require_packages() -> None:
    """Before long work, not after it."""
    for name in ("peft", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"demo needs {name}, which is not installed: pip install 'gravity_hf[demo]'"
            )


def _command(out: Path, seed: int, text: list[Path] | None, quick: bool, fresh: bool) -> str:
    parts = ["gravity-hf", "demo", "--out", str(out), "--seed", str(seed)]
    for file in text or []:
        parts += ["--text", str(file)]
    parts += ["--quick"] * quick + ["--fresh"] * fresh
    return shlex.join(parts)
