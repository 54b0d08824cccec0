"""Small models on disk, and one whole demonstration that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.commands import TINY, DemoRun
from transformers import BertConfig, BertForMaskedLM

from gravity_hf.cli.console import make_console
from gravity_hf.cli.demo.host import new_host
from gravity_hf.cli.demo.run import run_demo
from gravity_hf.training.tokenizers import byte_tokenizer


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A random byte-level Qwen2 with its tokenizer."""
    folder = tmp_path / "decoder"
    new_host(TINY).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random byte-level BERT with its tokenizer."""
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(vocab_size=256, num_hidden_layers=2, initializer_range=0.2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """Everything `gravity-hf demo` does, with a model that trains in seconds."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = make_console()
    with console.capture() as capture:
        results = run_demo(out, TINY, console, command="gravity-hf demo --out out")
    return DemoRun(results, out, capture.get())
