"""Size and error of every export format, of all-MiniLM-L6-v2 and of folders of your own.

    python scripts/benchmark/formats.py --output formats.json
    python scripts/benchmark/formats.py --model out --output formats.json    # a gravity model, too

MiniLM is calibrated first, at softness 1. Each export is loaded again and compared with the float32
gravity model in torch: what a format loses, not what the conversion changed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import conditions
from rich.progress import track
from transformers import AutoModel, AutoTokenizer

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
from gravity_hf.cli.pieces import padded_batches
from gravity_hf.hub.card_public import public
from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.formats.measuring import in_words
from gravity_hf.training.files import write_json
from gravity_hf.training.text import disjoint_samples, embedded_english, prose_paragraphs

FORMATS = ("onnx", "torch", "fp16", "bf16", "int8")
_SOFTNESS, _TEXTS, _TOKENS = 1.0, 32, 64


def convert_minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 with gravity in `folder`, calibrated on paragraphs of Python's help text."""
    host = minilm_folder()
    if host is None:
        raise ImportError(HOW_TO_GET)
    tokenizer = AutoTokenizer.from_pretrained(host)
    texts, _ = disjoint_samples(prose_paragraphs(embedded_english()), _TEXTS)
    model = patch_with_gravity(AutoModel.from_pretrained(host).eval(), GravityConfig())
    batches = padded_batches(tokenizer, sorted(texts, key=len), _TOKENS)
    calibrate(model, batches, softness=_SOFTNESS, progress=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """One row for each format."""
    rows = []
    for format in track(FORMATS, name, disable=not sys.stderr.isatty()):
        out = scratch / f"{name}-{format}"
        report = export_gravity_model(folder, out, format=format, length=_TOKENS)
        sizes = {"bytes_before": report.bytes_before, "bytes_after": report.bytes_after}
        row = {"model": name, "format": format, **sizes, "measured": report.measured}
        rows.append({**row, "measured_on": report.measured_on, "versions": report.versions})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", default=[], help="gravity folder")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    known = conditions("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        folders = {"all-MiniLM-L6-v2": convert_minilm(room / "minilm")}
        folders |= {folder.resolve().name: folder for folder in options.model}
        rows = [row for name, folder in folders.items() for row in measure(name, folder, room)]
    for row in rows:
        words = ", ".join(f"{title} {value}" for title, value in in_words(row["measured"]).items())
        size = row["bytes_after"] / 1e6
        print(f"{row['model']:<20} {row['format']:<6} {size:7.1f} MB, {words}")
    if options.output:
        results = {"conditions": known, "softness": _SOFTNESS, "rows": rows}
        # Whoever reads them has other folders.
        write_json(options.output, public(results))


if __name__ == "__main__":
    main()
