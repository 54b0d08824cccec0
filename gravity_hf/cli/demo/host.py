"""The host: a small byte-level Qwen2, trained from scratch with its own dot-product attention."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from ...training.corpus import Corpus, random_windows
from ...training.tokenizers import BYTES, byte_tokenizer
from ..console import progress_bar
from .settings import DemoSettings

_RECORD = "training.json"
_WARMUP_SHARE = 0.05
_FINAL_RATE = 0.05


class TrainedHost(NamedTuple):
    """`losses`: training loss of every step. `seconds`: as measured when it was trained."""

    model: Qwen2ForCausalLM
    losses: list[float]
    seconds: float
    reused: bool


def new_host(settings: DemoSettings) -> Qwen2ForCausalLM:
    """Freshly initialised, reproducible by `settings.seed`."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=BYTES,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def obtain_host(
    settings: DemoSettings, corpus: Corpus, folder: Path, fresh: bool, console: Console
) -> TrainedHost:
    """The host in `folder` if it was trained under exactly these conditions, else a new one."""
    conditions = _conditions(settings, corpus)
    record = _read_record(folder / _RECORD)
    if not fresh and record is not None and record.get("conditions") == conditions:
        console.print(f"  Training the host: reused from {folder}", markup=False)
        model = Qwen2ForCausalLM.from_pretrained(folder)
        return TrainedHost(model.eval(), record["losses"], record["seconds"], reused=True)
    host = train_host(settings, corpus, console)
    # The record goes last: without it a folder that was cut short is not taken for a host.
    (folder / _RECORD).unlink(missing_ok=True)
    host.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    content = {"conditions": conditions, "seconds": host.seconds, "losses": host.losses}
    (folder / _RECORD).write_text(json.dumps(content), encoding="utf-8")
    return host


def train_host(settings: DemoSettings, corpus: Corpus, console: Console) -> TrainedHost:
    """AdamW, warmup and cosine decay, one pass of random windows."""
    model = new_host(settings).train()
    rate = settings.host_learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = cosine_schedule(optimizer, settings.host_steps)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    started = time.perf_counter()
    with progress_bar(console, "Training the host", settings.host_steps) as advance:
        for _ in range(settings.host_steps):
            ids = random_windows(corpus.train, settings.host_batch, settings.length, generator)
            losses.append(train_step(model, ids, optimizer, schedule))
            advance(f"loss {recent(losses):.3f}")
    return TrainedHost(model.eval(), losses, time.perf_counter() - started, reused=False)


def train_step(
    model: nn.Module,
    ids: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One step on windows `ids` `[B, T]`; the loss before it, in nats per byte."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warmup, then a cosine down to a twentieth; scales every group alike."""
    warmup = max(1, int(_WARMUP_SHARE * steps))

    def scale(step: int) -> float:
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / warmup) * (_FINAL_RATE + (1.0 - _FINAL_RATE) * decay)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def recent(losses: list[float], count: int = 50) -> float:
    """Mean of the last losses: single batches are noisy."""
    tail = losses[-count:]
    return sum(tail) / len(tail)


def _conditions(settings: DemoSettings, corpus: Corpus) -> dict[str, Any]:
    relevant = ("seed", "hidden_size", "intermediate_size", "layers", "heads", "key_value_heads")
    relevant += ("head_dim", "length", "host_steps", "host_batch", "host_learning_rate")
    values = asdict(settings)
    return {
        **{name: values[name] for name in relevant},
        "corpus": corpus.digest,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _read_record(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
