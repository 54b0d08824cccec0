"""README's tables of what LeanFormer brings to any model: sparse attention and feed-forward layers,
maps of low rank, caches of few bits, governed training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from governed_report import governed_table
from lean_loss_tables import compression, feed_forward_loss, kv_loss, sparse_loss, sparse_native
from table_text import NONE, Rows, benchmark_conditions, contents, experiment_conditions, markdown

# Of a benchmark's lengths and numbers of tokens, what a README has room for.
_LENGTHS = {"cuda": (2048, 8192, 32768), "cpu": (1024, 4096, 8192)}
_TOKENS = (1, 16, 256, 8192)
_SHARE = 0.8


def tables(benchmarks: Path, results: Path) -> dict[str, Callable[[], str]]:
    """Makers by the names of README's marks."""
    return {
        "lean-sparse-speed": lambda: sparse_speed(benchmarks),
        "lean-sparse-loss": lambda: sparse_loss(results),
        "lean-sparse-native": lambda: sparse_native(results),
        "lean-feed-forward-speed": lambda: feed_forward_speed(benchmarks),
        "lean-feed-forward-loss": lambda: feed_forward_loss(results),
        "lean-compression": lambda: compression(results),
        "lean-kv-speed": lambda: kv_speed(benchmarks),
        "lean-kv-loss": lambda: kv_loss(results),
        "lean-governed": lambda: governed(results),
    }


def _joined(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _below(content: dict[str, Any]) -> str:
    """The line under a benchmark's table."""
    return f"\n{benchmark_conditions(content['conditions'])}\n"


def sparse_speed(folder: Path) -> str:
    """Times of dense attention and of every budget, and how many times faster that is."""
    found = contents(folder, "sparse_attention", "scripts/benchmark/sparse_attention.py")
    return _joined(_speed_part(content) for content in found)


def _speed_part(content: dict[str, Any]) -> str:
    rows = [row for row in content["rows"] if "median_ms" in row]
    device = "cpu" if "cores" in content["conditions"]["device"] else "cuda"
    budgets = sorted({_budget(r) for r in rows if r["kind"] == "sparse" and r["screen"] == "keys"})
    cases = dict.fromkeys(map(_speed_case, rows))
    table = []
    for case in cases:
        if case[3] not in _LENGTHS[device]:
            continue
        mine = [r for r in rows if _speed_case(r) == case]
        dense = [r for r in mine if r["kind"] == "dense"]
        if not dense:
            continue
        level, work, law, length, launch = case
        cells = [_fastest(mine, budget) for budget in budgets]
        name = f"{level}, {work}, {law}, {length}" + (", graph" if launch == "graph" else "")
        table.append([name, _ms(min(r["median_ms"] for r in dense)), *cells])
    heads = [f"{top_k} keys, blocks of {block}" for top_k, block in budgets]
    return markdown(["what, keys", "dense", *heads], table) + _below(content)


def _speed_case(row: dict[str, Any]) -> tuple[str, str, str, int, str]:
    launch = row.get("launch", "eager")
    return row["level"], row["work"], row["law"], row["length"], launch


def _budget(row: dict[str, Any]) -> tuple[int, int]:
    return row["top_k"], row["block_size"]


def _fastest(rows: Rows, budget: tuple[int, int]) -> str:
    mine = [r for r in rows if r["kind"] == "sparse" and r["screen"] == "keys"]
    mine = [r for r in mine if _budget(r) == budget]
    if not mine:
        return NONE
    best = min(mine, key=lambda row: row["median_ms"])
    dense = min(r["median_ms"] for r in rows if r["kind"] == "dense")
    return f"{_ms(best['median_ms'])} ({dense / best['median_ms']:.2f}x)"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def feed_forward_speed(folder: Path) -> str:
    """A layer that skips four fifths of its blocks beside the whole one, by number of tokens."""
    command = "scripts/benchmark/feed_forward.py --device DEVICE --out FILE"
    return _joined(map(_feed_forward_part, contents(folder, "feed_forward", command)))


def _feed_forward_part(content: dict[str, Any]) -> str:
    rows = [row for row in content["rows"] if "ms" in row]
    tokens = [n for n in _TOKENS if any(row["tokens"] == n for row in rows)]
    table = []
    for shape, maps in dict.fromkeys((row["shape"], row["maps"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["maps"]) == (shape, maps)]
        dense = {row["tokens"]: row for row in mine if row["way"] == "dense"}
        name = f"{shape}, {maps}"
        table.append([f"{name}, whole", *(_time_of(dense.get(n)) for n in tokens)])
        blocks = [r for r in mine if r["way"].startswith("block:") and r["sparsity"] == _SHARE]
        for size in sorted({row["block_size"] for row in blocks}):
            cells = [_best_of(blocks, size, n) for n in tokens]
            table.append([f"{name}, blocks of {size}", *cells])
    headers = ["hidden/inner, maps", *(f"{n} tokens" for n in tokens)]
    return markdown(headers, table) + _below(content)


def _time_of(row: dict[str, Any] | None) -> str:
    return NONE if row is None else _ms(row["ms"]["p50"])


def _best_of(rows: Rows, size: int, tokens: int) -> str:
    """The fastest way of skipping, by its name and speed."""
    mine = [r for r in rows if (r["block_size"], r["tokens"]) == (size, tokens) and "speed" in r]
    if not mine:
        return NONE
    best = max(mine, key=lambda row: row["speed"])
    return f"{_ms(best['ms']['p50'])} ({best['speed']:.2f}x, {best['way'].partition(':')[2]})"


def kv_speed(folder: Path) -> str:
    """Bytes of a cache, and times of a prompt and of a token that read from it."""
    command = "scripts/benchmark/kv_cache.py --device DEVICE --out FILE"
    parts = []
    for content in contents(folder, "kv_cache", command):
        table = [_cached(row) for row in content["rows"] if not row["note"]]
        headers = ["model, tokens, cache", "MiB", "float16 over it", "prompt", "token"]
        parts.append(markdown(headers, table) + _below(content))
    return _joined(parts)


def _cached(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['shape']}, {row['length']}, {row['cache']}",
        f"{row['cache_bytes'] / 2**20:.1f}",
        f"{row['ratio']:.2f}x",
        _ms(row["prefill_ms"]["p50"]),
        _ms(row["decode_ms"]["p50"]),
    ]


def governed(folder: Path) -> str:
    """Governed against plain training, what each machine brings, and plain runs of equal cost."""
    parts = []
    for content in contents(folder, "governed", "scripts/experiments/governed.py"):
        first = content["rows"][0]
        note = (
            f"Nats per byte of held-out text after {first['steps']} steps; arithmetic and time of "
            "the whole training, over those of plain.\n"
        )
        table = markdown(*governed_table(content))
        parts.append(f"{table}\n{note}" + experiment_conditions([content]))
    return _joined(parts)
