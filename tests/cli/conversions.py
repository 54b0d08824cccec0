"""Shared by the tests of conversions: the smallest one that has every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, Qwen2Config, Qwen2ForCausalLM

from gravity_hf.cli.console import make_console
from gravity_hf.cli.convert.pipeline import run_conversion
from gravity_hf.cli.convert.settings import STEPS, parse_conversion
from gravity_hf.training.tokenizers import byte_tokenizer

# 300 paragraphs of random words. Not a page that people edit: what so small a model learns from
# would change with every sentence, and with it whether a test's comparison comes out.
TEXT = Path(__file__).with_name("words.txt")
SMALL = {
    "text_files": [str(TEXT)],
    "length": 32,
    "samples": 4,
    "transfer_steps": 4,
    "lora_steps": 4,
    "lora_rank": 2,
    "lora_learning_rate": 1e-2,
    "batch_size": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "evaluation_samples": 8,
    "prompts": ["Gravity "],
    "prompt_tokens": 4,
    # Pictures take longer than all the rest; one test draws them.
    "figures": False,
    "device": "cpu",
}


def save_decoder(folder: Path) -> Path:
    """A random byte-level Qwen2 whose attention is far from uniform, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    tokens = {"vocab_size": 256, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
    config = Qwen2Config(
        **sizes,
        **tokens,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    """A random byte-level BERT with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(vocab_size=256, num_hidden_layers=2, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def flags(model: Path, out: Path, **changes: Any) -> list[str]:
    """Command-line flags of the small conversion with these changes."""
    found = ["--model", str(model), "--out", str(out)]
    for name, value in {**SMALL, **changes}.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *map(str, values)] if values else []
    return found


def convert(model: Path, out: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """Run it in this process, on one thread; results and what was printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    console = make_console()
    try:
        with console.capture() as capture:
            results = run_conversion(parse_conversion(flags(model, out, **changes)), console, "x")
    finally:
        torch.set_num_threads(before)
    return results, capture.get()


def rows(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in results["evaluation"]["rows"]}


def ran(screen: str) -> list[str]:
    """The steps that were done, from what was printed."""
    lines = (line.split(", again")[0] for line in screen.splitlines())
    return [line for line in lines if line in STEPS]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor that a conversion left: of its steps, and of the finished model."""
    files = sorted(folder.glob("work/*/*.safetensors")) + sorted(folder.glob("*.safetensors"))
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def losses(folder: Path) -> dict[str, Any]:
    """Every loss of training and evaluation."""
    results = json.loads((folder / "results.json").read_text())
    training = {k: v["losses"] for k, v in results["training"].items() if v and "losses" in v}
    return {"training": training, "rows": {k: v["loss"] for k, v in rows(results).items()}}
