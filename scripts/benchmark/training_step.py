"""Whole training steps of one model under gravity and under dot product (SDPA), in one run."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from gate import first_line  # noqa: E402
from problems import EPS  # noqa: E402
from results import conditions  # noqa: E402
from targets import show_lines, training_lines  # noqa: E402
from timing import quantiles, synchronize  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config  # noqa: E402

from gravity_hf import GravityConfig, gravity_status  # noqa: E402
from gravity_hf.config import IMPLEMENTATIONS  # noqa: E402
from gravity_hf.integration.patching import patch_structure  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

SHAPES = {
    "qwen2-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
}
ARMS = ("sdpa", "force", "power", "force-lifted", "power-lifted")
AGAIN = "sdpa-again"
_RADIUS_MARGIN = 1.5  # of the longest key, squared: keys grow while a model trains

EPILOG = """\
A step is forward, loss, backward and AdamW. Every arm starts from the same random weights and sees
the same random tokens; masses and softenings are Gravity-2's constants. SDPA is measured first and,
to show how far two measurements of the same thing differ, again at the end. Times are the median
with the 20th and 80th percentile. Memory is the peak of a step, weights and optimizer included.

  python scripts/benchmark/training_step.py --device cuda --output training_step.json
  python scripts/benchmark/training_step.py --shape tiny --steps 3
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="qwen2-0.5b", help="tiny: to see that it runs")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the weights")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    add(
        "--implementation",
        default="auto",
        choices=IMPLEMENTATIONS,
        help="of gravity; the result says what auto came to",
    )
    add("--batch", type=int, default=4, help="sequences per step (default 4)")
    add("--length", type=int, help="tokens of a sequence (default 2048; tiny 64)")
    add("--steps", type=int, default=20, help="timed steps of an arm, after 3 others")
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--loss-chunk", type=int, default=0, help="logits of so many tokens at a time; 0: of all")
    add("--mass-init", type=float, default=0.5, help="before softplus (default 0.5)")
    add("--epsilon", type=float, default=EPS, help="softening (default %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--output", type=Path, metavar="FILE.json", help="write rows, targets, conditions here")
    add("--commit", help="commit measured, where the tree is a copy without git")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.length is None:
        options.length = 64 if options.shape == "tiny" else 2048
    longest = SHAPES[options.shape]["max_position_embeddings"]
    if not 1 < options.length <= longest:
        parser.error(f"--length: expected 2 to {longest}, got {options.length}")
    return options


def build(arm: str, options: argparse.Namespace, tokens: Tensor) -> PreTrainedModel:
    """The model of an arm; the same weights for all."""
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[options.shape], use_cache=False)
    dtype = getattr(torch, options.dtype)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if not arm.startswith("sdpa"):
        law, _, lifted = arm.partition("-")
        settings = GravityConfig(
            epsilon=options.epsilon,
            mass_init=options.mass_init,
            law=law,
            distance="lifted" if lifted else "euclidean",
            implementation=options.implementation,
        )
        radii = _squared_key_radii(model, tokens) if lifted else None
        patch_structure(model, settings)
        if radii is not None:
            for layer, radius in zip(model.model.layers, radii, strict=True):
                layer.self_attn.gravity.key_radius_sq.copy_(radius)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@torch.no_grad()
def _squared_key_radii(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """`R^2` `[Hkv]` of every layer. Rotating a key does not change its length."""
    found: list[Tensor] = []
    width = model.config.hidden_size // model.config.num_attention_heads

    def watch(module: nn.Module, inputs: Any, keys: Tensor) -> None:
        lengths = keys.float().unflatten(-1, (-1, width)).square().sum(-1)
        found.append(_RADIUS_MARGIN * lengths.flatten(0, -2).amax(0))

    hooks = [x.self_attn.k_proj.register_forward_hook(watch) for x in model.model.layers]
    model.model(tokens[:1])
    for hook in hooks:
        hook.remove()
    return found


def loss_of(model: PreTrainedModel, tokens: Tensor, chunk: int) -> Tensor:
    """Mean cross entropy of the next token."""
    if not chunk:
        return model(input_ids=tokens, labels=tokens).loss
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten()

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(rows).float(), wanted, reduction="sum")

    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    # Logits are computed again in the backward, so that one chunk of them exists at a time.
    total = sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces)
    return total / labels.numel()


def measure(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of an arm."""
    row: dict[str, Any] = {"arm": arm, "note": ""}
    try:
        row.update(_measured(arm, options))
    except Exception as error:
        row["note"] = f"failed: {first_line(error)}"
    gc.collect()
    if options.device != "cpu":
        torch.cuda.empty_cache()
    return row


def _measured(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, options.length)
    tokens = torch.randint(SHAPES[options.shape]["vocab_size"], size, generator=generator)
    tokens = tokens.to(options.device)
    model = build(arm, options, tokens)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.1, fused=options.device != "cpu"
    )
    losses: list[Tensor] = []

    def step() -> None:
        loss = loss_of(model, tokens, options.loss_chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    peak = _warm(step, options.device)
    median, low, high = quantiles(_times(step, options.steps, options.device))
    row = {
        "implementation": gravity_status(model).implementation,
        "p50_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "tokens_per_second": tokens.numel() / median * 1e3,
        "peak_gib": peak,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }
    if not all(torch.stack(losses).isfinite().tolist()):
        row["note"] = "a loss is not finite"
    return row


def _warm(step: Callable[[], None], device: str) -> float | None:
    """Three steps; the peak of the last one in GiB, on CUDA."""
    step()
    step()
    if device == "cpu":
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 2**30


def _times(step: Callable[[], None], steps: int, device: str) -> list[float]:
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def show(row: dict[str, Any]) -> None:
    if "p50_ms" not in row:
        print(f"{row['arm']:<13} {row['note']}", flush=True)
        return
    peak = "–" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    print(
        f"{row['arm']:<13} {row['implementation']:<10} {row['p50_ms']:10.1f} {row['p20_ms']:10.1f} "
        f"{row['p80_ms']:10.1f} {row['tokens_per_second']:10.0f} {peak:>9} "
        f"{row['last_loss']:8.3f} {row['note']}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("shape", "dtype", "batch", "length", "steps", "checkpointing", "loss_chunk")
    settings = {name: getattr(options, name) for name in (*names, "mass_init", "epsilon")}
    settings["model"] = SHAPES[options.shape]
    known = {**conditions(options.device, options.commit), "settings": settings}
    print(json.dumps(known, indent=2), flush=True)
    head = f"{'arm':<13} {'by':<10} {'p50 ms':>10} {'p20':>10} {'p80':>10} {'tokens/s':>10}"
    print(f"{head} {'peak GiB':>9} {'loss':>8}")
    rows: list[dict[str, Any]] = []
    arms = list(options.arms)
    if "sdpa" in arms and len(arms) > 1:
        arms.append(AGAIN)
    for arm in arms:
        rows.append(measure(arm, options))
        show(rows[-1])
        report = {"conditions": known, "rows": rows, "targets": training_lines(rows)}
        if options.output:  # after every arm: a run that is cut short leaves what it has
            write_json(options.output, report)
    print(show_lines(report["targets"]))


if __name__ == "__main__":
    main()
