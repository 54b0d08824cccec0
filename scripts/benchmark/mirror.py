"""What it costs to watch a forward: the same forward without a mirror, with one, and its report."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from results import conditions  # noqa: E402
from rich.progress import track  # noqa: E402
from timing import quantiles  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402

from gravity_hf import GravityConfig, patch_with_gravity  # noqa: E402
from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig, LGTForCausalLM  # noqa: E402
from gravity_hf.runtime import MirrorLayer  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

VOCABULARY = 1000
HOST = "llama"
_HOST_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_WARM_UP = 3

EPILOG = """\
In every round, in an order that changes, one forward runs in each of four ways: plain; plain again,
which shows how far two measurements of the same thing differ; watched, inside mirror.watch; and
watched with mirror.report() after it, which reads --rows query rows of every layer. Costs are the
median over rounds of a round's ratio to its plain forward, less 1, in per cent. Entering and
leaving mirror.watch is timed by itself. Batch 1, float32, no gradients.

  python scripts/benchmark/mirror.py --threads 1 --output scripts/benchmark/results/mirror.json
  python scripts/benchmark/mirror.py --quick         # one short row, to see that it works
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, [*LGT_PRESETS, HOST]
    add("--models", nargs="+", default=names, choices=names, help="LGT presets, and a Llama")
    add("--lengths", nargs="+", type=int, default=[128, 512], help="tokens (default 128 512)")
    add("--rows", type=int, default=64, help="query rows of a report (default 64)")
    add("--rounds", type=int, default=60, help="timed rounds of a row, after 3 others")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="one preset, 8 tokens, 1 round: to see that it works")
    add("--output", type=Path, metavar="FILE.json", help="write rows and conditions here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.lengths, options.rounds = ["edge_150k"], [8], 1
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if not all(1 < length <= 512 for length in options.lengths):
        parser.error(f"--lengths: expected 2 to 512, got {options.lengths}")
    return options


def build(name: str) -> PreTrainedModel:
    """A random model, in eval mode."""
    torch.manual_seed(0)
    if name != HOST:
        return LGTForCausalLM(LGTConfig.from_preset(name, vocab_size=VOCABULARY)).eval()
    return patch_with_gravity(LlamaForCausalLM(LlamaConfig(**_HOST_SIZES)).eval(), GravityConfig())


def measure(name: str, length: int, rows: int, rounds: int) -> dict[str, Any]:
    """One row: times in ms, costs in per cent of a forward."""
    model, mirror = build(name), MirrorLayer(rows=rows)
    ids = torch.randint(0, VOCABULARY, (1, length))
    times: dict[str, list[float]] = {name: [] for name in ("plain", "again", "watched", "reported")}
    entering: list[float] = []
    for round_number in range(_WARM_UP + rounds):
        ways = [*times]
        turn = round_number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            spent = one(way, model, mirror, ids, entering)
            if round_number >= _WARM_UP:
                times[way].append(spent)
    ratios = {
        way: [a / b for a, b in zip(times[way], times["plain"], strict=True)] for way in times
    }
    return {
        "model": name,
        "length": length,
        "forward_ms": spread(times["plain"]),
        "again_percent": percent(ratios["again"]),
        "watched_percent": percent(ratios["watched"]),
        "reported_percent": percent(ratios["reported"]),
        "enter_ms": statistics.median(entering[2 * _WARM_UP :]),
    }


@torch.no_grad()
def one(
    way: str, model: PreTrainedModel, mirror: MirrorLayer, ids: torch.Tensor, entering: list[float]
) -> float:
    """Milliseconds of one forward; of entering and leaving the watch: appended to `entering`."""
    if way in ("plain", "again"):
        return timed(lambda: model(ids))
    started = time.perf_counter()
    with mirror.watch(model):
        entered = time.perf_counter()
        spent = timed(lambda: model(ids))
        if way == "reported":
            spent += timed(mirror.report)
        left = time.perf_counter()
    entering.append((entered - started + time.perf_counter() - left) * 1e3)
    return spent


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def spread(times: list[float]) -> dict[str, float]:
    return dict(zip(("p50", "p20", "p80"), quantiles(times), strict=True))


def percent(ratios: list[float]) -> float:
    return 100.0 * (statistics.median(ratios) - 1.0)


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    known = conditions("cpu", options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/mirror.py", *given]),
        "threads": torch.get_num_threads(),
        "settings": {"rows": options.rows, "rounds": options.rounds, "vocabulary": VOCABULARY},
        "quick": options.quick,
    }
    cases = [(name, length) for name in options.models for length in options.lengths]
    rows = []
    for name, length in track(cases, "mirror", disable=not sys.stderr.isatty()):
        row = measure(name, length, options.rows, options.rounds)
        rows.append(row)
        costs = ("again", "watched", "reported")
        words = ", ".join(f"{cost} {row[f'{cost}_percent']:+6.1f} %" for cost in costs)
        forward, enter = row["forward_ms"]["p50"], row["enter_ms"]
        print(f"{name:<12} N={length:<4} forward {forward:8.2f} ms, {words}, enter {enter:.2f} ms")
    if options.output:
        report = public({"conditions": known, "rows": rows})
        print(f"written to {write_json(options.output, report)}")


if __name__ == "__main__":
    main()
