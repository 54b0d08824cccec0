"""The files of a benchmark: rows as CSV, what they were measured under as JSON beside them."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gravity_hf.training.conditions import run_conditions
from gravity_hf.training.files import write_json, write_text

COLUMNS = (
    "provider",
    "law",
    "distance",
    "pass",
    "launch",
    "batch",
    "heads",
    "kv_heads",
    "queries",
    "keys",
    "width",
    "causal",
    "dtype",
    "p50_ms",
    "p20_ms",
    "p80_ms",
    "extra_mib",
    "note",
    "device",
    "torch",
    "triton",
    "cudnn",
    "commit",
    "date",
)


def conditions(device: str, commit: str | None = None) -> dict[str, Any]:
    """`run_conditions`, with what a kernel's time depends on beside. `commit` names it where the
    tree is a copy without git."""
    known = run_conditions(device)
    if commit:
        known.pop("uncommitted_changes", None)
        known["commit"] = commit
    known.setdefault("commit", "unknown")
    triton = importlib.util.find_spec("triton") is not None
    known["versions"]["triton"] = importlib.metadata.version("triton") if triton else None
    known["versions"]["cuda"] = torch.version.cuda
    known["versions"]["cudnn"] = torch.backends.cudnn.version() if device != "cpu" else None
    return known


def save(file: Path, rows: Iterable[dict[str, Any]], report: dict[str, Any], dtype: str) -> None:
    """`rows` to `file` (.csv), `report` beside it (.json), each whole or not at all."""
    known = report["conditions"]
    shared = {
        "dtype": dtype,
        "device": known["device"],
        "commit": known["commit"],
        "date": known["date"],
        **{name: known["versions"][name] for name in ("torch", "triton", "cudnn")},
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _short(value) for name, value in {**row, **shared}.items()})
    write_text(file, text.getvalue())
    write_json(file.with_suffix(".json"), report)


def _short(value: Any) -> Any:
    """Six digits are more than a time has."""
    return f"{value:.6g}" if isinstance(value, float) else value
