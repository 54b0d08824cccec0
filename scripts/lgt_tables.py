"""README's tables of LGT: sizes, counted, and what `scripts/benchmark` measured of its speed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from table_text import NONE, Rows, Table, benchmark_conditions, markdown, result_json

from gravity_hf.hub.edge import PUBLISHED_CLAIMS
from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig, LGTForCausalLM, LGTModel

# The vocabulary and whether the head is tied to it; None: continuous inputs, no head.
_VOCABULARIES = ((None, False), (1000, False), (1000, True), (32000, False), (32000, True))
_BITS = ("float32", "float16", "int8")
_CUDA_PATHS = ("triton", "flex")
_CPU_COMMAND = "python scripts/benchmark/lgt.py"
_CUDA_COMMAND = f"{_CPU_COMMAND} --device cuda"
_MIRROR_COMMAND = (
    "python scripts/benchmark/mirror.py --threads 1 --output scripts/benchmark/results/mirror.json"
)


def presets_text() -> str:
    """True sizes of LGT's presets beside what was published of them: counted now, not measured."""
    headers = ["preset", "published", "no vocabulary"]
    headers += [f"V = {size}{', tied' * tied}" for size, tied in _VOCABULARIES[1:]]
    table = []
    for name, claim in PUBLISHED_CLAIMS.items():
        counts = (count(name, size, tied) for size, tied in _VOCABULARIES)
        cells = [f"{parameters:,} ({parameters * 4 / 1e6:.1f} MB)" for parameters in counts]
        table.append([name, f"{claim.parameters}, {claim.size}", *cells])
    positions = {LGTConfig.from_preset(name).max_position_embeddings for name in LGT_PRESETS}
    places = " or ".join(f"{length}" for length in sorted(positions))
    return f"{markdown(headers, table)}\nParameters (float32 megabytes), with {places} positions.\n"


def count(preset: str, vocabulary: int | None, tied: bool) -> int:
    """Parameters of a preset with that vocabulary."""
    config = LGTConfig.from_preset(preset, vocab_size=vocabulary, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LGTModel(config) if vocabulary is None else LGTForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def speed_text(folder: Path) -> str:
    """LGT beside an encoder of its size on a CPU: medians, memory, and how many times as much."""
    return _measured(speed, result_json(folder, "lgt_cpu.json", _CPU_COMMAND))


def bits_text(folder: Path) -> str:
    """Weights and one forward in fewer bits, on a CPU."""
    return _measured(bits, result_json(folder, "lgt_cpu.json", _CPU_COMMAND))


def cuda_text(folder: Path) -> str:
    """The same comparison as `speed_text` on a GPU, at its lengths, by path."""
    return _measured(cuda, result_json(folder, "lgt_cuda.json", _CUDA_COMMAND))


def mirror_text(folder: Path) -> str:
    """What it costs to watch a forward."""
    return _measured(mirror, result_json(folder, "mirror.json", _MIRROR_COMMAND))


def _measured(table: Any, result: dict[str, Any]) -> str:
    return f"{markdown(*table(result['rows']))}\n{benchmark_conditions(result['conditions'])}\n"


def speed(rows: Rows) -> Table:
    """By preset and sight: an LGT beside the encoder, in milliseconds and MiB."""
    headers = ["LGT / SDPA encoder", "sees", "forward, 128 tokens", "forward, 512"]
    headers += ["training step, 8 x 128", "memory, forward 512", "memory, step"]
    table = []
    for preset, causal in ((p, c) for p in _names(rows, "preset") for c in (False, True)):
        mine = [r for r in rows if (r["preset"], r["causal"]) == (preset, causal)]
        mine = [r for r in mine if r["dtype"] == "float32"]
        forward = [_pair(mine, "forward", length) for length in (128, 512)]
        step = _pair(mine, "step", 128)
        times = [_both(pair, "median_ms", "ms") for pair in (*forward, step)]
        memory = [_both(pair, "peak_mib", "MiB") for pair in (forward[1], step)]
        table.append([preset, "before" if causal else "all", *times, *memory])
    return headers, table


def bits(rows: Rows) -> Table:
    """By preset: weights, and a forward of 128 tokens, in 32, 16 and 8 bits."""
    headers = ["LGT, causal, forward of 128 tokens", *(f"weights, {name}" for name in _BITS)]
    headers += [f"time, {name}" for name in _BITS]
    table = []
    for preset in _names(rows, "preset"):
        mine = [r for r in rows if r["preset"] == preset and r["model"] == "lgt" and r["causal"]]
        found = {r["dtype"]: r for r in mine if _is(r, "forward", 128)}
        sizes = [_cell(found.get(name), "weights_bytes", "MB", 1e6) for name in _BITS]
        times = [_cell(found.get(name), "median_ms", "ms") for name in _BITS]
        table.append([preset, *sizes, *times])
    return headers, table


def cuda(rows: Rows) -> Table:
    """By preset and path: times beside the encoder, and how memory grows with twice the tokens."""
    headers = ["LGT / SDPA encoder, causal, bfloat16", "path", "forward, 2048 tokens"]
    headers += ["forward, 16384", "training step, 8192", "memory, forward 16384"]
    headers += ["over that of 8192"]
    table = []
    for preset in _names(rows, "preset"):
        for path in _CUDA_PATHS:
            mine = [r for r in rows if r["preset"] == preset and r["path"] in ("sdpa", path)]
            works = (("forward", 2048), ("forward", 16384), ("step", 8192))
            pairs = [_pair(mine, *work) for work in works]
            times = [_both(pair, "median_ms", "ms") for pair in pairs]
            memory = _both(pairs[1], "peak_mib", "MiB")
            growth = _growth(_pair(mine, "forward", 8192), pairs[1])
            table.append([preset, path, *times, memory, growth])
    return headers, table


def mirror(rows: Rows) -> Table:
    """By model: at every length the forward, and what the ways to watch it add."""
    lengths = _names(rows, "length")
    headers = ["forward"]
    for length in lengths:
        headers += [f"{length} tokens", "same again", "watched", "with a report"]
    table = []
    for name in _names(rows, "model"):
        found = {row["length"]: row for row in rows if row["model"] == name}
        cells = [cell for length in lengths for cell in _watched(found.get(length))]
        table.append([name, *cells])
    return headers, table


def _watched(row: dict[str, Any] | None) -> Iterator[str]:
    if row is None:
        yield from [NONE] * 4
        return
    yield f"{row['forward_ms']['p50']:.3g} ms"
    for cost in ("again", "watched", "reported"):
        yield f"{row[f'{cost}_percent']:+.1f} %"


def _names(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _is(row: dict[str, Any], work: str, length: int) -> bool:
    return row["work"] == work and row["length"] == length


def _pair(rows: Rows, work: str, length: int) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in rows if _is(row, work, length)}


def _both(pair: dict[str, dict[str, Any]], key: str, unit: str) -> str:
    values = [pair.get(model, {}).get(key) for model in ("lgt", "sdpa")]
    if None in values:
        return NONE
    mine, other = values
    return f"{mine:.3g} / {other:.3g} {unit} ({mine / other:.2f})"


def _growth(short: dict[str, dict[str, Any]], long: dict[str, dict[str, Any]]) -> str:
    values = [pair.get("lgt", {}).get("peak_mib") for pair in (short, long)]
    return NONE if None in values else f"{values[1] / values[0]:.2f}"


def _cell(row: dict[str, Any] | None, key: str, unit: str, over: float = 1.0) -> str:
    value = (row or {}).get(key)
    return NONE if value is None else f"{value / over:.3g} {unit}"
