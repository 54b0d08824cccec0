"""Train any registered causal language model from scratch, under gravity or dot-product attention.

    python scripts/pretrain.py --output_dir runs/gravity
    python scripts/pretrain.py --output_dir runs/softmax --attention dot_product
    python scripts/pretrain.py --output_dir runs/gpt2 --architecture gpt2 --tokenizer char \\
        --text_files tinyshakespeare.txt --overrides n_embd=384,n_layer=6,n_head=6,n_positions=256
    accelerate launch --num_processes 2 scripts/pretrain.py recipe.yaml

Without --text_files or --dataset it trains on the Python standard library's source. Every option of
transformers' TrainingArguments is accepted, as a flag or in the YAML file. A run that was stopped
goes on from its last whole checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

from transformers import TrainingArguments

from gravity_hf.cli.console import make_console
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS
from gravity_hf.cli.steps.parsing import parse_settings
from gravity_hf.training.pretraining import PretrainArguments, pretrain, write_record
from gravity_hf.training.streams import load_stream


@dataclass
class TextArguments:
    """Where the text comes from."""

    tokenizer: str = field(
        default="byte", metadata={"help": "byte, char, bpe:SIZE, or a tokenizer's folder or name."}
    )
    text_files: list[str] | None = field(default=None, metadata={"help": "Text files."})
    dataset: str | None = field(default=None, metadata={"help": "Name for datasets.load_dataset."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Its column of text."})
    train_bytes: int = field(default=100_000_000, metadata={"help": "Training text at most."})
    validation_bytes: int = field(default=10_000_000, metadata={"help": "Validation text at most."})


# A small Qwen2, and what a small model trained from scratch wants, where TrainingArguments was made
# for fine-tuning.
DEFAULTS = {
    "overrides": (
        "hidden_size=384,intermediate_size=1024,num_hidden_layers=6,num_attention_heads=6,"
        "num_key_value_heads=2,tie_word_embeddings=true"
    ),
    "output_dir": "pretrained",
    "max_steps": 1000,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "eval_strategy": "steps",
    "eval_steps": 250,
    "save_steps": 250,
    "save_total_limit": 2,
    "logging_steps": 25,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "disable_tqdm": not sys.stderr.isatty(),
}


def main(arguments: list[str]) -> None:
    """Train one model; expected errors end in one line and exit code 2."""
    console = make_console()
    try:
        kinds = (PretrainArguments, TextArguments, TrainingArguments)
        defaults = DEFAULTS
        if any(a.startswith("--architecture") for a in arguments):
            # The sizes are those of another architecture's names.
            defaults = {**DEFAULTS, "overrides": ""}
        model, text, training = parse_settings(
            kinds,
            arguments,
            defaults,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        stream = load_stream(**vars(text))
        is_main = training.process_index == 0
        if is_main:
            console.print(stream.description, markup=False)
        result = pretrain(model, training, stream)
        if is_main:
            result.model.save_pretrained(training.output_dir)
            stream.tokenizer.save_pretrained(training.output_dir)
            file = write_record(result.record, training.output_dir)
            console.print(
                f"validation loss {result.record['loss']:.4f} nats per token, "
                f"{result.record['loss'] / stream.bytes_per_token:.4f} per byte; {file}",
                markup=False,
            )
    except EXPECTED_ERRORS as error:
        make_console(stderr=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(EXIT_EXPECTED) from error


if __name__ == "__main__":
    main(sys.argv[1:])
