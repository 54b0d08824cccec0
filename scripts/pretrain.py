"""Train a causal language model from scratch: an NGT, an LGT, a LeanFormer, or any that
transformers knows, under gravity or dot-product attention.

    python scripts/pretrain.py --model ngt --output_dir runs/ngt
    python scripts/pretrain.py --model ngt --attention dot_product --output_dir runs/twin
    python scripts/pretrain.py scripts/recipes/ngt-w3-25m.yaml --output_dir runs/w3
    python scripts/pretrain.py --model gpt2 --tokenizer char --text_files tinyshakespeare.txt \\
        --overrides n_embd=384,n_layer=6,n_head=6,n_positions=256 --output_dir runs/gpt2
    python scripts/pretrain.py --model leanformer --preset tiny --governed --output_dir runs/lean
    accelerate launch --num_processes 2 scripts/pretrain.py recipe.yaml

Flags win over the file, and --overrides over --preset, also where they say what is the default
anyway. Text: --text_files, --dataset (wikitext103, wikitext2, tinyshakespeare, or any name or
folder for datasets.load_dataset), or, without either, the Python standard library's source. Every
option of transformers' TrainingArguments is accepted: --bf16 and --fp16 for mixed precision,
--gradient_accumulation_steps, --torch_compile, --report_to tensorboard, ...

--governed freezes groups of weights that have converged and shares rates between the others;
OUTPUT_DIR/pretrain.json then says what that did, under "governance", and OUTPUT_DIR/governed.jsonl
is its ledger (gravity-hf ledger verify).

OUTPUT_DIR then is the model as it was last; OUTPUT_DIR/best has the lowest validation loss,
OUTPUT_DIR/last the last one beside it; each loads as it is, its tokenizer too. A run that was
stopped goes on from its last whole checkpoint when the same command is given again. What next:

    gravity-hf chat runs/ngt
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from gravity_hf.cli.console import make_console
from gravity_hf.cli.main import EXIT_EXPECTED, EXPECTED_ERRORS
from gravity_hf.cli.steps.parsing import parse_settings
from gravity_hf.training.new_models import config_of
from gravity_hf.training.pretraining import PretrainArguments, pretrain, write_record
from gravity_hf.training.streams import load_stream
from gravity_hf.training.tokenizers import BYTES


@dataclass
class ModelName:
    """What is trained."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "ngt, lgt, leanformer, or a model_type of transformers: qwen2 [qwen2], ..."
        },
    )


@dataclass
class TextArguments:
    """Where the text comes from."""

    tokenizer: str = field(
        default="byte",
        metadata={
            "help": "byte, char, bpe:SIZE, tiktoken:NAME (gpt2, ...), tiktoken:FILE, or a "
            "tokenizer's folder or name."
        },
    )
    text_files: list[str] | None = field(default=None, metadata={"help": "Text files."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "wikitext103, wikitext2, tinyshakespeare, or a name or folder for "
            "datasets.load_dataset."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Its column of text."})
    train_bytes: int = field(default=100_000_000, metadata={"help": "Training text at most."})
    validation_bytes: int = field(default=10_000_000, metadata={"help": "Validation text at most."})


# As shells say it of a command that was stopped from the keyboard.
EXIT_STOPPED = 130
# The sizes of a small Qwen2, where nothing else is said.
SMALL_QWEN2 = (
    "hidden_size=384,intermediate_size=1024,num_hidden_layers=6,num_attention_heads=6,"
    "num_key_value_heads=2,tie_word_embeddings=true"
)
# What a small model trained from scratch wants, where TrainingArguments was made for fine-tuning.
DEFAULTS: dict[str, Any] = {
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
    "dataloader_pin_memory": torch.accelerator.is_available(),
}


def settings_of(
    arguments: list[str],
) -> tuple[PretrainArguments, TextArguments, TrainingArguments]:
    """What a command line says, once each value is known to be given or not."""
    name, model, text, training = parse_settings(
        (ModelName, PretrainArguments, TextArguments, TrainingArguments),
        arguments,
        # None: not given.
        {**DEFAULTS, "architecture": None},
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # --architecture is the older name.
    names = {given for given in (name.model, model.architecture) if given is not None}
    if len(names) > 1:
        raise ValueError(f"--model: expected one name, got {sorted(names)} with --architecture")
    model = dataclasses.replace(model, architecture=names.pop() if names else "qwen2")
    if model.architecture == "qwen2" and not model.overrides:
        model.overrides = SMALL_QWEN2
    return model, text, training


def main(arguments: list[str]) -> None:
    """Train one model; expected errors end in one line and exit code 2, Ctrl-C in one and 130."""
    console = make_console()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, text, training = settings_of(arguments)
        # What cannot be built is said before a text is fetched and made into tokens.
        config_of(model, BYTES)
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
    except KeyboardInterrupt:
        said = "stopped; the same command goes on from the last checkpoint, if there is one"
        make_console(stderr=True).print(said, markup=False)
        raise SystemExit(EXIT_STOPPED) from None


if __name__ == "__main__":
    main(sys.argv[1:])
