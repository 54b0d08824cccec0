"""A Newton Gravity Transformer in two steps: train a small one, then talk with it.

    python scripts/quickstart.py                 # a minute or two on two CPU cores, offline
    gravity-hf chat ngt-quickstart

It learns, character by character, the language reference behind Python's help() or a text file of
yours (--text). Both steps at once: python scripts/quickstart.py --chat
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from gravity_hf.cli.console import make_console, progress_bar
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS, app
from gravity_hf.training.counting import fit_counts
from gravity_hf.training.folders import require_free, whole_folder
from gravity_hf.training.pretrain_arguments import PretrainArguments
from gravity_hf.training.pretraining import PretrainResult, pretrain
from gravity_hf.training.samples import generation_samples
from gravity_hf.training.streams import ConsecutiveWindows, TokenStream, make_stream
from gravity_hf.training.text import read_texts

SIZES = {
    "usual": {
        "overrides": "hidden_size=96,coord_dim=24,num_hidden_layers=3,num_attention_heads=4,"
        "intermediate_size=384,dropout=0.0",
        **{"length": 96, "rows": 12, "steps": 700, "windows": 128, "sample": 300},
    },
    "quick": {
        "overrides": "hidden_size=16,coord_dim=4,num_hidden_layers=1,num_attention_heads=2,"
        "intermediate_size=32,dropout=0.0",
        **{"length": 32, "rows": 4, "steps": 8, "windows": 4, "sample": 20},
    },
}
PROMPT = "The "


class _Bar(TrainerCallback):
    """Moves a bar on with each step and shows the last loss."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.advance, self.note = advance, ""

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}"

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance(self.note)


def train(stream: TokenStream, size: dict[str, Any], seed: int, console: Any) -> PretrainResult:
    arguments = PretrainArguments(
        architecture="ngt",
        overrides=size["overrides"],
        length=size["length"],
        validation_windows=size["windows"],
    )
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=size["steps"],
            per_device_train_batch_size=size["rows"],
            per_device_eval_batch_size=size["rows"],
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=size["steps"] // 12,
            weight_decay=0.01,
            logging_steps=max(1, size["steps"] // 60),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        with progress_bar(console, "training", size["steps"]) as advance:
            return pretrain(arguments, training, stream, callbacks=[_Bar(advance)])


def counted_loss(stream: TokenStream, size: dict[str, Any]) -> float:
    """What knowing which character follows which is worth, on the same windows."""
    windows = ConsecutiveWindows(stream.validation, size["windows"], size["length"])
    ids = windows.__getitems__(list(range(len(windows))))
    return fit_counts(stream.train, stream.vocabulary, 2).loss([ids])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("ngt-quickstart"), help="model's folder")
    parser.add_argument("--text", type=Path, nargs="+", help="text files [Python's help texts]")
    parser.add_argument("--steps", type=int, help="optimiser steps [700]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the model in --out")
    parser.add_argument("--chat", action="store_true", help="open the chat when it is trained")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 8 steps: to try")
    options = parser.parse_args(arguments)
    size = dict(SIZES["quick" if options.quick else "usual"])
    size["steps"] = size["steps"] if options.steps is None else options.steps
    console = make_console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        require_free(options.out, options.force)
        text = read_texts(options.text)
        cut = int(0.9 * len(text))
        stream = make_stream("char", text[:cut], text[cut:])
        result = train(stream, size, options.seed, console)
        with whole_folder(options.out) as room:
            result.model.save_pretrained(room)
            stream.tokenizer.save_pretrained(room)
        (sample,) = generation_samples(
            result.model,
            stream.tokenizer,
            [PROMPT],
            max_new_tokens=size["sample"],
            seed=options.seed,
        )
    except EXPECTED_ERRORS as error:
        make_console(stderr=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error
    lines = (
        f"NGT with {result.record['parameters']:,} parameters, on text that it has not seen: "
        f"{result.record['loss']:.3f} nats per character",
        f"Counts of which character follows which: {counted_loss(stream, size):.3f}",
        "",
        PROMPT + sample["text"],
        "",
        f"Talk with it:          gravity-hf chat {options.out}",
        f"See its coordinates:   gravity-hf figures {options.out} -o pictures",
        "Train a larger one:    python scripts/pretrain.py --model ngt --help",
    )
    for line in lines:
        console.print(line, markup=False)
    if options.chat:
        app(["chat", str(options.out)])


if __name__ == "__main__":
    main(sys.argv[1:])
