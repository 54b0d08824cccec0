"""README's tables of what LeanFormer brings to any model: sparse attention and feed-forward layers,
maps of low rank, caches of few bits, governed training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from governed_report import governed_table
from table_text import NONE, Rows, benchmark_conditions, experiment_conditions, markdown

DEVICES = ("cuda", "cpu")
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


def contents(folder: Path, stem: str, command: str, kinds: Iterable[str] = DEVICES) -> Rows:
    """What was measured on each device; `kinds` ends the name of each file, "" is the bare name.

    Raises:
        FileNotFoundError: on none; with the command that measures.
    """
    names = [f"{stem}_{kind}.json" if kind else f"{stem}.json" for kind in kinds]
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{' or '.join(names)}: has not been measured yet: make it with `python {command}`"
        )
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


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
    cases = dict.fromkeys((r["level"], r["work"], r["law"], r["length"]) for r in rows)
    table = []
    for case in cases:
        if case[3] not in _LENGTHS[device]:
            continue
        mine = [r for r in rows if (r["level"], r["work"], r["law"], r["length"]) == case]
        dense = [r for r in mine if r["kind"] == "dense"]
        if not dense:
            continue
        level, work, law, length = case
        cells = [_fastest(mine, budget) for budget in budgets]
        name = f"{level}, {work}, {law}, {length}"
        table.append([name, _ms(min(r["median_ms"] for r in dense)), *cells])
    heads = [f"{top_k} keys, blocks of {block}" for top_k, block in budgets]
    return markdown(["what, keys", "dense", *heads], table) + _below(content)


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


def sparse_loss(folder: Path) -> str:
    """What a budget costs trained hosts, by how its keys are chosen, and the time of a forward."""
    found = contents(folder, "sparse_attention", "scripts/experiments/sparse_attention.py")
    return _joined(_loss_part(content) for content in found if content["rows"])


def _loss_part(content: dict[str, Any]) -> str:
    table = []
    for row in content["rows"]:
        recall = row.get("recall_screening")
        times = row["dense_seconds"]["median"] / row["seconds"]["median"]
        table.append(
            [
                f"{row['top_k']} keys, blocks of {row['block_size']}, by {row['screening']}",
                f"{row['loss']['median']:.4f}",
                _spread(row["change"], "+.4f"),
                NONE if recall is None else f"{recall['median']:.3f}",
                f"{times:.2f}x",
            ]
        )
    headers = ["budget", "loss", "above dense, lowest and highest", "weight kept", "forward"]
    seeds = len(content["rows"][0]["seeds"])
    kept = [
        f"{line['screening']} {line['budget'][0]}/{line['budget'][1]} ({line['over_dense']:.2f}x)"
        for line in content["kept"]
        if line["budget"]
    ]
    tolerance = content["kept"][0]["tolerance"] if content["kept"] else 0.0
    note = (
        f"Medians over {seeds} seeds, nats per byte. Fastest with at most {tolerance} above dense "
        f"at every seed: {', '.join(kept) or 'none'}.\n"
    )
    return markdown(headers, table) + f"\n{note}" + experiment_conditions([content])


def _spread(value: dict[str, float], form: str = ".4f") -> str:
    middle, low, high = (f"{value[name]:{form}}" for name in ("median", "lowest", "highest"))
    return f"{middle} ({low} to {high})"


def sparse_native(folder: Path) -> str:
    """LeanFormers trained densely and sparsely, each measured both ways."""
    found = contents(folder, "sparse_attention", "scripts/experiments/sparse_attention.py")
    parts = []
    for content in (one for one in found if one["native"]):
        table = [
            [
                f"{row['attention']}, trained {row['trained']}, {length} tokens",
                *(_spread(losses[how]) for how in ("dense", "sparse")),
            ]
            for row in content["native"]
            for length, losses in row["losses"].items()
        ]
        headers = ["LeanFormer", "loss, dense", "loss, sparse"]
        parts.append(markdown(headers, table) + experiment_conditions([content]))
    return _joined(parts)


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


def feed_forward_loss(folder: Path) -> str:
    """What it costs that each token uses a share of the neurons, and what training for it mends."""
    command = "scripts/experiments/sparse_feed_forward.py --device cuda"
    (content,) = contents(folder, "sparse_feed_forward", command, [""])
    table = []
    for row in content["summary"]["hosts"]:
        order = ", reordered" if row["reordered"] else ""
        name = f"blocks of {row['block_size']}, {row['sparsity']:.0%} left out{order}, {row['arm']}"
        table.append([name, *_excess(row)])
    table += [[f"LeanFormer, {r['arm']}, 80% left out", *_excess(r)] for r in _native_rows(content)]
    headers = ["what, chosen by", "loss", "above dense, lowest and highest", "energy kept"]
    note = f"Nats per byte; means over {_seeds_of(content)} seeds.\n"
    return markdown(headers, table) + f"\n{note}" + experiment_conditions([content])


def _native_rows(content: dict[str, Any]) -> Rows:
    return content["summary"].get("native", [])


def _seeds_of(content: dict[str, Any]) -> int:
    return max(row["seeds"] for part in content["summary"].values() for row in part)


def _excess(row: dict[str, Any]) -> list[str]:
    excess = row["excess"]
    spread = f"{excess['mean']:+.4f} ({excess['min']:+.4f} to {excess['max']:+.4f})"
    return [f"{row['loss']['mean']:.4f}", spread, f"{row['energy_recall']['mean']:.3f}"]


def compression(folder: Path) -> str:
    """Parameters and loss of maps of low rank, before and after a little training."""
    found = contents(folder, "compression", "scripts/experiments/compression.py")
    parts = []
    for content in found:
        table = [_compressed(row) for row in content["rows"]]
        headers = ["arm", "layers", "model", "loss", "healed", "above the host, healed", "forward"]
        seeds = len(content["rows"][0]["seeds"])
        note = f"\nMedians over {seeds} seeds, {content['unit']}.\n"
        parts.append(markdown(headers, table) + note + experiment_conditions([content]))
    return _joined(parts)


def _compressed(row: dict[str, Any]) -> list[str]:
    middle = {name: value["median"] for name, value in row.items() if isinstance(value, dict)}
    change = row.get("healed_change")
    return [
        row["arm"] if row["energy"] is None else f"{row['arm']}, energy {row['energy']}",
        f"{middle['layer_parameters'] / 1e6:.2f} M",
        f"{middle['parameters'] / 1e6:.2f} M",
        f"{middle['loss']:.4f}",
        f"{middle['healed_loss']:.4f}",
        NONE if change is None else _spread(change, "+.4f"),
        f"{middle['dense_seconds'] / middle['seconds']:.2f}x",
    ]


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


def kv_loss(folder: Path) -> str:
    """What codes of few bits cost a trained model in its loss, and in copying from afar."""
    command = "scripts/experiments/kv_cache.py --device cuda"
    (content,) = contents(folder, "kv_cache", command, [""])
    table = []
    for attention, arm in dict.fromkeys((r["attention"], r["arm"]) for r in content["rows"]):
        mine = [r for r in content["rows"] if (r["attention"], r["arm"]) == (attention, arm)]
        changes = [row["change"] for row in mine]
        spread = f"{_mean(changes):+.5f} ({min(changes):+.5f} to {max(changes):+.5f})"
        errors = [row["key_error"] for row in mine if row["key_error"] is not None]
        table.append(
            [
                f"{attention}, {arm}",
                f"{_mean(row['ratio'] for row in mine):.2f}x",
                spread,
                f"{_mean(errors):.4f}" if errors else NONE,
                f"{_mean(row['copied'] for row in mine):.0%}",
            ]
        )
    headers = ["attention, cache", "float16 over it", "loss above its own", "key error", "copied"]
    length = content["rows"][0]["length"]
    note = f"{length} tokens; nats per byte; means over seeds, lowest and highest.\n"
    return markdown(headers, table) + f"\n{note}" + experiment_conditions([content])


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


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
