"""What the geolip experiments share: their options, ids of runs, and one file of all that was
found."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pool import Run, run_all

RESULTS = Path(__file__).resolve().parent / "results"
_DIGITS = 8


def named(name: str, seed: int, settings: dict[str, Any]) -> Run:
    """A run for `run_all`. Its id holds a digest of the settings: under others it is another."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return {"id": f"{name} seed={seed} {digest}", "seed": seed, **settings}


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options that every one of these experiments has; `name` is that of its files."""
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", help="instead of an arm's own")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--workers", type=int, default=1, help="processes, one core each; 0: this one")
    add("--minutes", type=float, default=60, help="start no run later than this")
    add("--out", type=Path, default=Path("runs") / name, help="what is kept of single runs")
    add("--summary", type=Path, help=f"JSON file [results/{name}.json; --quick: in --out]")
    add("--quick", action="store_true", help="tiny models, 2 steps: to try, not to keep")


def finish(
    options: argparse.Namespace,
    runs: list[Run],
    work: Callable[[Run], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    name: str,
    arguments: list[str] | None,
) -> dict[str, Any]:
    """Do the runs that are not done, and write what is known of them as one JSON object.

    Raises:
        SystemExit: nothing was measured, or some runs are left.
    """
    from gravity_hf.hub.card_public import public
    from gravity_hf.training.files import write_json

    done = run_all(
        runs,
        work,
        options.out / "runs.jsonl",
        workers=options.workers,
        gpus=1 if options.device == "cuda" else 0,
        minutes=options.minutes,
    )
    left = len(runs) - len(done)
    if not done:
        raise SystemExit(f"error: all {left} runs failed or were left for later: see above")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", f"scripts/experiments/{name}.py", *given])
    content = summary(done)
    content["conditions"] = {**done[-1]["conditions"], "command": command}
    content = public(content)
    default = options.out if options.quick else RESULTS
    file = options.summary or default / f"{name}.json"
    print(f"written to {write_json(file, content)}")
    if left:
        raise SystemExit(f"error: {left} runs failed or were left for later: run it again")
    return content


def over_seeds(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def show(headers: list[str], rows: list[list[str]]) -> None:
    """A table on the screen, its columns aligned."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for line in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print()
