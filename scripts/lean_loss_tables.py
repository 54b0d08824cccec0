"""README's tables of what sparse attention, sparse feed-forward layers, maps of low rank and caches
of few bits cost in loss: of hosts that were trained for it, and of a pretrained one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paired_changes import pooled_error
from table_text import NONE, Rows, contents, experiment_conditions, markdown

PRETRAINED = "pretrained"
_BYTES = "nats per byte of held-out text"
_ABOVE = "above dense, lowest and highest"


def sparse_loss(folder: Path) -> str:
    """What a budget costs hosts, by how its keys are chosen, and time and memory of a forward."""
    command = "scripts/experiments/sparse_attention.py"
    found = contents(folder, "sparse_attention", command, (PRETRAINED, "cuda", "cpu"))
    measured = [content for content in found if content["rows"]]
    if not measured:
        raise FileNotFoundError(
            f"sparse_attention: hosts have not been measured yet: make it with `python {command}`"
        )
    return "\n".join(_sparse_part(content) for content in measured)


def _sparse_part(content: dict[str, Any]) -> str:
    table = []
    for row in content["rows"]:
        recall = row.get("recall_screening")
        times = row["dense_seconds"]["median"] / row["seconds"]["median"]
        table.append(
            [
                f"{row['top_k']} keys, blocks of {row['block_size']}, by {row['screening']}",
                f"{row['loss']['median']:.4f}",
                _change(row["change"], row.get("change_error")),
                NONE if recall is None else f"{recall['median']:.3f}",
                f"{times:.2f}x",
                _memory(row),
            ]
        )
    headers = ["budget", "loss", _ABOVE, "weight kept", "forward", "peak MiB, dense"]
    kept = [
        f"{line['screening']} {line['budget'][0]}/{line['budget'][1]} "
        f"({line['change']:+.4f}, {line['over_dense']:.2f}x)"
        for line in content["kept"]
        if line["budget"]
    ]
    tolerance = content["kept"][0]["tolerance"] if content["kept"] else 0.0
    note = (
        f"Fastest with at most {tolerance} above dense at every seed: {', '.join(kept) or 'none'}. "
        "By window: the last keys alone; by random: blocks by lot."
    )
    seeds = len(content["rows"][0]["seeds"])
    return (
        markdown(headers, table)
        + f"\n{_host(content, seeds, 'medians')} {note}\n"
        + _conditions(content)
    )


def _memory(row: dict[str, Any]) -> str:
    """Of a forward, sparse and dense, above what was there before; on a GPU."""
    if "peak_mib" not in row:
        return NONE
    return f"{row['peak_mib']['median']:.0f}, {row['dense_peak_mib']['median']:.0f}"


def sparse_native(folder: Path) -> str:
    """LeanFormers trained densely and sparsely, each measured both ways."""
    command = "scripts/experiments/sparse_attention.py --parts native"
    found = contents(folder, "sparse_attention", command, ("cuda", "cpu", PRETRAINED))
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
        first = content["native"][0]
        top_k, block = first["budget"]
        note = (
            f"Sparse: {top_k} keys, blocks of {block}. Medians over {len(first['seeds'])} seeds, "
            f"lowest and highest, {_BYTES}."
        )
        headers = ["LeanFormer", "loss, dense", "loss, sparse"]
        parts.append(markdown(headers, table) + f"\n{note}\n" + _conditions(content))
    if not parts:
        raise FileNotFoundError(
            f"sparse_attention: LeanFormers have not been measured yet: make it with `python "
            f"{command}`"
        )
    return "\n".join(parts)


def feed_forward_loss(folder: Path) -> str:
    """What it costs that each token uses a share of the neurons, and what training for it mends."""
    command = "scripts/experiments/sparse_feed_forward.py --device cuda"
    found = contents(folder, "sparse_feed_forward", command, (PRETRAINED, ""))
    return "\n".join(_feed_forward_part(content) for content in found)


def _feed_forward_part(content: dict[str, Any]) -> str:
    table = []
    for row in content["summary"]["hosts"]:
        order = ", reordered" if row["reordered"] else ""
        name = f"blocks of {row['block_size']}, {row['sparsity']:.0%} left out{order}, {row['arm']}"
        table.append([name, *_excess(row)])
    native = content["summary"].get("native", [])
    table += [[f"LeanFormer, {r['arm']}, 80% left out", *_excess(r)] for r in native]
    seeds = max(row["seeds"] for part in content["summary"].values() for row in part)
    headers = ["what, chosen by", "loss", _ABOVE, "energy kept"]
    return markdown(headers, table) + f"\n{_host(content, seeds)}\n" + _conditions(content)


def _excess(row: dict[str, Any]) -> list[str]:
    excess = _mean_change(row["excess"], row.get("excess_error"))
    return [f"{row['loss']['mean']:.4f}", excess, f"{row['energy_recall']['mean']:.3f}"]


def compression(folder: Path) -> str:
    """Parameters and loss of maps of low rank, before and after a little training."""
    command = "scripts/experiments/compression.py"
    found = contents(folder, "compression", command, (PRETRAINED, "cuda", "cpu"))
    return "\n".join(_compression_part(content) for content in found)


def _compression_part(content: dict[str, Any]) -> str:
    table = [_compressed(row) for row in content["rows"]]
    headers = ["arm", "layers", "model", "loss", "above the host"]
    headers += ["healed", "above the host, healed", "forward"]
    steps, rows, length, rate = content["heal"]
    seeds = len(content["rows"][0]["seeds"])
    healed = (
        f"Healed: all weights trained for {steps} steps of {rows} windows of {length} tokens at a "
        f"rate of {rate:.1g}, the host's too."
    )
    note = f"{_host(content, seeds, 'medians')} {healed if steps else 'Nothing was healed.'}"
    return markdown(headers, table) + f"\n{note}\n" + _conditions(content)


def _compressed(row: dict[str, Any]) -> list[str]:
    middle = {name: value["median"] for name, value in row.items() if isinstance(value, dict)}
    change, healed = row["change"], row.get("healed_change")
    return [
        row["arm"] if row["energy"] is None else f"{row['arm']}, energy {row['energy']}",
        f"{middle['layer_parameters'] / 1e6:.2f} M",
        f"{middle['parameters'] / 1e6:.2f} M",
        f"{middle['loss']:.4f}",
        NONE if row["arm"] == "dense" else _change(change, row.get("change_error")),
        f"{middle['healed_loss']:.4f}" if "healed_loss" in middle else NONE,
        NONE if healed is None else _change(healed, row.get("healed_change_error")),
        f"{middle['dense_seconds'] / middle['seconds']:.2f}x",
    ]


def kv_loss(folder: Path) -> str:
    """What codes of few bits cost a model in its loss, and in copying from afar."""
    command = "scripts/experiments/kv_cache.py --device cuda"
    found = contents(folder, "kv_cache", command, (PRETRAINED, ""))
    return "\n".join(_kv_part(content) for content in found)


def _kv_part(content: dict[str, Any]) -> str:
    table = []
    rows, apart = content["rows"], content.get("host", {}).get("apart", False)
    for attention, arm in dict.fromkeys((row["attention"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["attention"], row["arm"]) == (attention, arm)]
        errors = [row["key_error"] for row in mine if row["key_error"] is not None]
        table.append(
            [
                f"{attention}, {arm}",
                f"{_mean(row['ratio'] for row in mine):.2f}x",
                NONE if arm == "dynamic" else _over_rows(mine, "change", apart, "+.5f"),
                f"{_mean(errors):.4f}" if errors else NONE,
                f"{_mean(row['copied'] for row in mine):.0%}",
            ]
        )
    headers = ["attention, cache", "float16 over it", "loss above its own", "key error", "copied"]
    seeds = len({row["seed"] for row in rows})
    note = (
        f"{_host(content, seeds)} Losses are of the last {rows[0]['tail']} tokens of each window."
    )
    patched = [row for row in rows if "conversion" in row]
    if patched:
        cost = _over_rows(patched, "conversion", apart, "+.5f")
        note += f" Gravity's own cache is {cost} above the host that was patched: no training."
    return markdown(headers, table) + f"\n{note}\n" + _conditions(content)


def _over_rows(rows: Rows, name: str, apart: bool, form: str) -> str:
    """Mean of a change over seeds, standard error and spread."""
    values = [row[name] for row in rows]
    spread = {"mean": _mean(values), "min": min(values), "max": max(values)}
    error = pooled_error([row.get(f"{name}_error") for row in rows], apart)
    return _mean_change(spread, error, form)


def _change(value: dict[str, float], error: float | None, form: str = "+.4f") -> str:
    """Median, standard error where it is known, lowest and highest."""
    names = {"mean": "median", "min": "lowest", "max": "highest"}
    return _mean_change({short: value[name] for short, name in names.items()}, error, form)


def _mean_change(value: dict[str, float], error: float | None, form: str = "+.4f") -> str:
    middle, low, high = (f"{value[name]:{form}}" for name in ("mean", "min", "max"))
    spread = f" ({low} to {high})" if low != high else ""
    return f"{middle} ± {error:{form[1:]}}{spread}" if error else f"{middle}{spread}"


def _spread(value: dict[str, float], form: str = ".4f") -> str:
    middle, low, high = (f"{value[name]:{form}}" for name in ("median", "lowest", "highest"))
    return f"{middle} ({low} to {high})"


def _host(content: dict[str, Any], seeds: int, middle: str = "means") -> str:
    """Of whom the losses are, on how much text, in what unit, and what ± means."""
    host, unit = content.get("host"), content.get("unit", _BYTES)
    if host is None:
        return f"{unit.partition(' of ')[0].capitalize()}; {_over(seeds, middle)}."
    rows = content["rows"]
    count = _windows(rows["hosts"] if isinstance(rows, dict) else rows, host["apart"])
    digest = f", weights {host['digest'][:8]}" if "digest" in host else ""
    length = _first(rows).get("length", host["length"])
    sizes = f" ({host['bytes_per_token']:.2f} bytes)" if "bytes_per_token" in host else ""
    return (
        f"{host['name']}, {host['parameters'] / 1e6:.1f} M parameters{digest}; {count} windows of "
        f"{length} tokens; {unit.replace('token', f'token{sizes}', 1)}; {_over(seeds, middle)}, "
        "± the standard error over windows."
    )


def _over(seeds: int, middle: str) -> str:
    return "one seed" if seeds == 1 else f"{middle} over {seeds} seeds"


def _first(rows: Any) -> dict[str, Any]:
    return rows["hosts"][0] if isinstance(rows, dict) else rows[0]


def _windows(rows: Rows, apart: bool) -> int:
    """Of a row that has been summed up already, or of one arm over its seeds."""
    first = rows[0]
    if "seed" not in first:
        return first["windows"]
    same = ("attention", "arm", "block_size", "sparsity", "reordered")
    mine = [row for row in rows if all(row.get(n) == first.get(n) for n in same)]
    counts = [row["windows"] for row in mine]
    return sum(counts) if apart else max(counts)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _conditions(content: dict[str, Any]) -> str:
    return experiment_conditions([content])
