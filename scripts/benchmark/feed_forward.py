"""A gated feed-forward layer whole, masked, and with the blocks that a token leaves out skipped."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from gate import first_line  # noqa: E402
from results import conditions  # noqa: E402
from rich.progress import track  # noqa: E402
from timing import Run, as_graph, extra_mib, milliseconds  # noqa: E402
from torch import nn  # noqa: E402

from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.layers.low_rank import linear  # noqa: E402
from gravity_hf.layers.neuron_selection import blocks_kept  # noqa: E402
from gravity_hf.layers.sparse_feed_forward import SparseFeedForward  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

SHAPES = {"512/2048": (512, 2048), "896/4864": (896, 4864), "2048/8192": (2048, 8192)}
TOKENS = (1, 2, 4, 16, 64, 256, 1024, 8192)
SPARSITIES = (0.5, 0.8, 0.9)
BLOCKS = (32, 64, 128)
# Of d, F 512, 2048 it is 64, as LeanFormer's.
RANK_SHARE = 8
GATE_RANK = 16
FEW = 16
# A row whose dense layer multiplies more than this on a CPU takes seconds, and is left out.
MOST_CPU_PRODUCTS = 6e10
LEAST_REPEATS = 5

EPILOG = """\
A row is one layer, one number of tokens and one way:

  dense            all neurons, no predictor
  masked           predictor and choice, all neurons, a mask
  block:<how>      predictor and choice, the other blocks skipped; on a CPU also "auto", what the
                   layer does by itself: "masked" where that was measured to be faster

Weights and inputs are random, so every block is chosen about as often as any other: where a trained
predictor prefers some, groups are uneven. Times are medians with the 20th and 80th percentile;
`speed` is dense time over the row's. On CUDA, rows that the host does not wait in are timed as a
CUDA graph as well. `crossovers` and `rules` of the output say where skipping pays, and
`gravity_hf/ops/block_linear_choice.py` what `auto` goes by. An output file that is
there is continued.

  python scripts/benchmark/feed_forward.py --device cpu --threads 1 --out ff_cpu.json
  python scripts/benchmark/feed_forward.py --device cuda --dtype bfloat16 --out ff_cuda.json
  python scripts/benchmark/feed_forward.py --quick     # some small rows, to see that it works
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default float32, on CUDA bfloat16")
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="hidden/intermediate")
    add("--maps", nargs="+", default=["full", "low-rank"], choices=["full", "low-rank"])
    add("--tokens", nargs="+", type=int, default=list(TOKENS))
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    add("--blocks", nargs="+", type=int, default=list(BLOCKS), help="neurons of a block")
    add("--budget", type=float, default=30.0, help="ms of timed calls of a row (default 30)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="one small layer, one call a row")
    add("--out", type=Path, metavar="FILE.json", help="write rows and conditions here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.quick:
        if options.tokens == list(TOKENS):
            options.tokens = [1, 64]
        options.shapes, options.blocks = ["512/2048"], [128]
        options.sparsities, options.budget = [0.8], 0.0
    if min(options.tokens) < 1:
        parser.error(f"--tokens: expected 1 or more, got {options.tokens}")
    return options


@functools.lru_cache(maxsize=1)
def maps_of(shape: str, maps: str, device: str, dtype: str) -> tuple[nn.Module, ...]:
    """Gate, up and down, random; the same for all rows of a layer."""
    width, neurons = SHAPES[shape]
    rank = width // RANK_SHARE if maps == "low-rank" else None
    torch.manual_seed(0)
    with torch.device(device):
        made = [linear(*sizes, rank, bias=False) for sizes in ((width, neurons),) * 2]
        made.append(linear(neurons, width, rank, bias=False))
    return tuple(part.to(getattr(torch, dtype)) for part in made)


def build(
    shape: str, maps: str, sparsity: float, block: int, options: argparse.Namespace
) -> SparseFeedForward:
    width, neurons = SHAPES[shape]
    layer = SparseFeedForward(
        *maps_of(shape, maps, options.device, options.dtype),
        activation=nn.SiLU(),
        hidden_size=width,
        intermediate_size=neurons,
        block_size=block,
        sparsity=sparsity,
        gate_rank=GATE_RANK,
    )
    layer = layer.to(options.device, getattr(torch, options.dtype))
    return layer.eval().requires_grad_(False)


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows to measure, all of one layer and number of tokens next to each other."""
    for shape, maps, tokens in itertools.product(options.shapes, options.maps, options.tokens):
        base = {"shape": shape, "maps": maps, "tokens": tokens}
        yield {**base, "way": "dense"}
        for block, sparsity in itertools.product(options.blocks, options.sparsities):
            row = {**base, "block_size": block, "sparsity": sparsity}
            if sparsity == options.sparsities[-1]:
                yield {**row, "way": "masked"}  # costs the same at every sparsity
            yield from ({**row, "way": f"block:{how}"} for how in ways(tokens, options))
        yield {**base, "way": "dense-again"}


def ways(tokens: int, options: argparse.Namespace) -> list[str]:
    few = tokens <= FEW
    if options.device == "cpu":
        return ["rows", "grouped", "auto"] if few else ["grouped", "auto"]
    found = ["gathered"] if few else []
    return [*found, "grouped_mm" if options.dtype == "bfloat16" else "grouped"]


@torch.no_grad()
def measure(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    row = {**case, "note": ""}
    width, neurons = SHAPES[case["shape"]]
    if options.device == "cpu" and 3 * width * neurons * case["tokens"] > MOST_CPU_PRODUCTS:
        return {**row, "note": "left out: takes seconds a call on a CPU"}
    sparsity, block = case.get("sparsity", 0.5), case.get("block_size", options.blocks[0])
    layer = build(case["shape"], case["maps"], sparsity, block, options)
    policy, _, how = case["way"].partition(":")
    layer.policy = policy.removesuffix("-again")
    layer.impl = how or "auto"
    x = torch.randn(case["tokens"], width).to(options.device, getattr(torch, options.dtype))

    def run() -> tuple[torch.Tensor, ...]:
        return (layer(x),)

    try:
        row["ms"] = _time(run, options)
        row["extra_mib"] = extra_mib(run, options.device) if options.device == "cuda" else None
        if options.device == "cuda" and how != "grouped":
            row["graph_ms"] = _time(as_graph(run), options)
    except Exception as error:
        row["note"] = f"failed: {first_line(error)}"
    return row


def _time(run: Run, options: argparse.Namespace) -> dict[str, float]:
    times = milliseconds(run, options.device, options.budget, 1 if options.quick else LEAST_REPEATS)
    return dict(zip(("p50", "p20", "p80"), times, strict=True))


def add_speed(rows: list[dict[str, Any]]) -> None:
    """`speed` and `graph_speed`: of the dense layer of the same shape and tokens, over the row."""
    dense = {_layer(row): row for row in rows if row["way"] == "dense"}
    for row in rows:
        peer = dense.get(_layer(row), {})
        for name, times in (("speed", "ms"), ("graph_speed", "graph_ms")):
            if times in row and times in peer:
                row[name] = peer[times]["p50"] / row[times]["p50"]


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every layer and way of skipping: at which numbers of tokens it was faster than dense."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if not row["way"].startswith("block:") or "speed" not in row:
            continue
        names = ("shape", "maps", "block_size", "sparsity", "way")
        line = found.setdefault(
            tuple(row[n] for n in names), {**{n: row[n] for n in names}, "faster": [], "slower": []}
        )
        line["faster" if row["speed"] > 1 else "slower"].append(row["tokens"])
    return list(found.values())


def rules(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """For every way of skipping the number of products, saved by a block over all tokens
    ("grouped" ways, `Crossover.many_products`) or by a token ("rows", "gathered":
    `Crossover.fixed_products` with no `few_products`), above which it gains most over the masked
    layer in the sum of log times. None where it gains nowhere."""
    masked = {(*_layer(r), r["block_size"]): r for r in rows if r["way"] == "masked" and "ms" in r}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        way = row["way"].removeprefix("block:")
        peer = masked.get((*_layer(row), row.get("block_size")))
        if way in ("auto", row["way"]) or peer is None or "ms" not in row:
            continue
        gain = math.log(peer["ms"]["p50"] / row["ms"]["p50"])
        found.setdefault(way, []).append((_products(row, way), gain))
    return {way: _threshold(sorted(seen)) for way, seen in found.items()}


def _products(row: dict[str, Any], way: str) -> float:
    width, neurons = SHAPES[row["shape"]]
    width = width if row["maps"] == "full" else width // RANK_SHARE
    blocks = neurons // row["block_size"]
    saved = 3.0 * width * row["block_size"] * (blocks - blocks_kept(row["sparsity"], blocks))
    return row["tokens"] * saved / blocks if way.startswith("grouped") else saved


def _threshold(seen: list[tuple[float, float]]) -> float | None:
    """The first of rising numbers from which on gains add up to most; one slow row by chance does
    not move it far."""
    sums = list(itertools.accumulate(gain for _, gain in reversed(seen)))[::-1]
    best = max(range(len(sums)), key=sums.__getitem__)
    return seen[best][0] if sums[best] > 0 else None


def _layer(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["maps"], row["tokens"]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*_layer(row), row.get("block_size"), row.get("sparsity"), row["way"])


def finished(file: Path | None, known: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of an earlier run under the same conditions, by what they measured."""
    if file is None or not file.exists():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    same = ("device", "versions", "commit", "settings")
    if any(before["conditions"].get(name) != known.get(name) for name in same):
        return {}
    return {_key(row): row for row in before["rows"] if not row["note"].startswith("failed")}


def show(row: dict[str, Any]) -> str:
    layer = f"{row['shape']:<10} {row['maps']:<9} N={row['tokens']:<5}"
    choice = f"block {row.get('block_size', '-'):>3} sparsity {row.get('sparsity', '-'):>3}"
    if "ms" not in row:
        return f"{layer} {choice} {row['way']:<17} {row['note']}"
    graph = f" graph {row['graph_ms']['p50']:8.3f} ms" if "graph_ms" in row else ""
    return f"{layer} {choice} {row['way']:<17} {row['ms']['p50']:10.3f} ms{graph}"


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads() if options.device == "cpu" else None
    settings = {"dtype": options.dtype, "threads": threads, "quick": options.quick}
    settings |= {"gate_rank": GATE_RANK, "rank": f"hidden / {RANK_SHARE}"}
    known = conditions(options.device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/feed_forward.py", *given]),
        "settings": settings,
    }
    before, rows = finished(options.out, public(known)), []
    todo = list(cases(options))
    for case in track(todo, "feed-forward", disable=not sys.stderr.isatty()):
        done = before.get(_key(case))
        rows.append(done or measure(case, options))
        if not done:
            print(show(rows[-1]), flush=True)
        if options.out and (not done or case is todo[-1]):
            add_speed(rows)
            report = {"conditions": known, "rows": rows}
            report |= {"crossovers": crossovers(rows), "rules": rules(rows)}
            write_json(options.out, public(report))


if __name__ == "__main__":
    main()
