"""README's tables of LGT, from what `scripts/benchmark/lgt.py` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table_text import benchmark_conditions, markdown

Table = tuple[list[str], list[list[str]]]
Rows = list[dict[str, Any]]

_BITS = ("float32", "float16", "int8")
_PATHS = ("sdpa", "triton", "flex", "chunked")
_NONE = "–"


def presets_text(folder: Path) -> str:
    """True sizes of LGT's presets beside what was published of them."""
    return markdown(*presets(_read(folder, "cpu")))


def speed_text(folder: Path) -> str:
    """LGT beside an encoder of its size: on a CPU, in fewer bits, and on a GPU where measured."""
    result = _read(folder, "cpu")
    text = "\n".join(markdown(*table) for table in (speed(result), bits(result)))
    text += f"\n{benchmark_conditions(result['conditions'])}\n"
    if (folder / "lgt_cuda.json").is_file():
        result = _read(folder, "cuda")
        text += f"\n{markdown(*lengths(result))}"
        text += f"\n{benchmark_conditions(result['conditions'])}\n"
    return text


def _read(folder: Path, device: str) -> dict[str, Any]:
    return json.loads((folder / f"lgt_{device}.json").read_text(encoding="utf-8"))


def presets(result: dict[str, Any]) -> Table:
    """True sizes beside what was published."""
    headers = ["preset", "published", "no vocabulary", "V = 1000", "tied", "V = 32000", "tied"]
    table = []
    for row in result["presets"]:
        counts = row["parameters"]
        order = ("core", "v1000", "v1000_tied", "v32000", "v32000_tied")
        cells = [f"{counts[name]:,} ({counts[name] * 4 / 1e6:.1f} MB)" for name in order]
        claim = row["published"]
        table.append([row["preset"], f"{claim['parameters']}, {claim['size']}", *cells])
    return headers, table


def speed(result: dict[str, Any]) -> Table:
    """An LGT beside the encoder: milliseconds of both, and how many times as much it takes."""
    headers = ["LGT / SDPA encoder", "sees", "forward, 128 tokens", "forward, 512"]
    headers += ["training step, 8 x 128", "memory, forward 512", "memory, step"]
    table = []
    for preset in _names(result["rows"]):
        for causal in (False, True):
            mine = [r for r in result["rows"] if r["preset"] == preset and r["causal"] == causal]
            whole = [r for r in mine if r["dtype"] == "float32"]
            forward = [_pair(whole, "forward", n) for n in (128, 512)]
            step = _pair(whole, "step", 128)
            times = [_both(pair, "least_ms", "ms") for pair in (*forward, step)]
            memory = [_both(pair, "peak_mib", "MiB") for pair in (forward[1], step)]
            table.append([preset, "before" if causal else "all", *times, *memory])
    return headers, table


def bits(result: dict[str, Any]) -> Table:
    """Weights and one forward of 128 tokens in fewer bits."""
    headers = ["LGT, causal", *(f"weights, {name}" for name in _BITS)]
    headers += [f"forward, {name}" for name in _BITS]
    table = []
    for preset in _names(result["rows"]):
        mine = [r for r in result["rows"] if r["preset"] == preset and r["model"] == "lgt"]
        found = {r["dtype"]: r for r in mine if _is(r, "forward", 128) and r["causal"]}
        sizes = [_cell(found.get(name), "weights_bytes", "MB", 1e6) for name in _BITS]
        table.append(
            [preset, *sizes, *(_cell(found.get(name), "least_ms", "ms") for name in _BITS)]
        )
    return headers, table


def lengths(result: dict[str, Any]) -> Table:
    """On a GPU: one forward at every length, by path."""
    headers = ["LGT, causal, bfloat16", "tokens", "SDPA encoder"]
    headers += [f"LGT, {path}" for path in _PATHS[1:]]
    table = []
    for preset in _names(result["rows"]):
        mine = [r for r in result["rows"] if r["preset"] == preset and r["work"] == "forward"]
        for length in sorted({r["length"] for r in mine}):
            found = {r["path"]: r for r in mine if r["length"] == length}
            cells = [_time_and_memory(found.get(path)) for path in _PATHS]
            table.append([preset, str(length), *cells])
    return headers, table


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["preset"] for row in rows))


def _is(row: dict[str, Any], work: str, length: int) -> bool:
    return row["work"] == work and row["length"] == length


def _pair(rows: Rows, work: str, length: int) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in rows if _is(row, work, length)}


def _both(pair: dict[str, dict[str, Any]], key: str, unit: str) -> str:
    values = [pair.get(model, {}).get(key) for model in ("lgt", "sdpa")]
    if None in values:
        return _NONE
    mine, other = values
    return f"{mine:.3g} / {other:.3g} {unit} ({mine / other:.2f})"


def _cell(row: dict[str, Any] | None, key: str, unit: str, over: float = 1.0) -> str:
    value = (row or {}).get(key)
    return _NONE if value is None else f"{value / over:.3g} {unit}"


def _time_and_memory(row: dict[str, Any] | None) -> str:
    if row is None or "least_ms" not in row:
        return _NONE
    return f"{row['least_ms']:.3g} ms, {row['peak_mib']:.0f} MiB"
