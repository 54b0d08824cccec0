"""What few keys cost: held-out loss of trained hosts, dense and sparse, by budget and screening.

    python scripts/experiments/sparse_attention.py                       # CPU, hosts of 3 M, 4096
    python scripts/experiments/sparse_attention.py --device cuda         # hosts of 13 M, 8192
    python scripts/experiments/sparse_attention.py --preset gpu --context 4096  # those, on the CPU
    python scripts/experiments/sparse_attention.py --parts native        # LeanFormers alone
    python scripts/experiments/sparse_attention.py --parts hosts --pretrained MODEL --text one.txt
    python scripts/experiments/sparse_attention.py --quick --out try.json

Hosts are those of lean_hosts.py, or with --pretrained a causal model from any folder; they were
trained densely and are not changed. Keys are chosen by queries and keys themselves, by their
principal directions, or by projections that learnt from dense attention; controls of the same size
are the last keys alone ("window") and blocks by lot ("random"). Beside the loss stand the standard
error of its change over windows, the share of dense attention's weights on the chosen keys, the
share of causal pairs that is computed, and the seconds of a forward pass, called in turns with the
dense one, on a GPU with its peak memory.

The hosts of 3 M parameters are hardly trained and may lose nothing without context, which the
controls show; where those of a GPU are in --hosts, --preset gpu measures them on a CPU, too.

The native part trains LeanFormers, by dot products and by gravity, densely or sparsely from the
first step on, and measures each both ways.

What is done is kept in --runs and not done again; no run is started after --minutes, and the same
command does what is left. Hosts that are not there are trained first.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from geolip_runs import named, over_seeds, show
from lean_hosts import add_host_options, place_of, result_name, text_of
from paired_changes import pooled_error
from pool import run_all

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("hosts", "native")
# So much more loss, in the unit of the losses, counts as none.
TOLERANCE = 0.01
NUMBERS = ("loss", "change", "seconds", "dense_seconds", "peak_mib", "dense_peak_mib")


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    from sparse_arms import NATIVE, SIZES

    usual = "cpu" if options.device == "cpu" else "gpu"
    size = "quick" if options.quick else usual
    # Native models are trained on bytes, whatever the tokens of a pretrained host are.
    files = list(text_of(options.data)[1])
    own = {"size": size, "device": options.device, "data": options.data, "files": files}
    runs = []
    if "hosts" in options.parts:
        of_host = {**place_of(options), "size": size, "context": options.context}
        for seed in options.seeds:
            for top_k, block_size in SIZES[size]["budgets"]:
                settings = {"part": "hosts", "top_k": top_k, "block_size": block_size, **of_host}
                runs.append(named(f"host {top_k}/{block_size}", seed, settings))
    if "native" in options.parts:
        for seed in options.seeds:
            for attention, trained in NATIVE:
                settings = {"part": "native", "attention": attention, "trained": trained, **own}
                runs.append(named(f"native {attention} {trained}", seed, settings))
    return runs


def work(run: dict[str, Any]) -> dict[str, Any]:
    from sparse_arms import host_run, native_run
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return host_run(run) if run["part"] == "hosts" else native_run(run)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows over seeds, and for each screening the fastest budget that keeps the loss."""
    hosts = [run for run in runs if run["kind"] == "host"]
    native = [run for run in runs if run["kind"] == "native"]
    budgets = list(dict.fromkeys((run["top_k"], run["block_size"]) for run in hosts))
    rows = []
    for top_k, block_size in budgets:
        mine = [run for run in hosts if (run["top_k"], run["block_size"]) == (top_k, block_size)]
        for number, first in enumerate(mine[0]["rows"]):
            found = [run["rows"][number] for run in mine]
            row = {"top_k": top_k, "block_size": block_size, "screening": first["screening"]}
            row["seeds"] = [run["seed"] for run in mine]
            row |= {n: over_seeds([x[n] for x in found]) for n in NUMBERS if n in first}
            row |= _errors(mine, found)
            if "recall" in first:
                names = tuple(first["recall"])
                row |= {f"recall_{n}": over_seeds([x["recall"][n] for x in found]) for n in names}
            rows.append(row)
    host = {"host": hosts[0]["host"], "unit": hosts[0]["unit"]} if hosts else {}
    return {
        **host,
        "rows": rows,
        "kept": kept(rows),
        "native": _native(native),
        "dense_loss": {str(run["seed"]): run["dense_loss"] for run in hosts},
        "runs": [brief(run) for run in runs],
    }


def brief(run: dict[str, Any]) -> dict[str, Any]:
    """Without what is the same for all, and stands above them."""
    return {name: x for name, x in run.items() if name not in ("run", "host", "conditions")}


def _errors(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows in all, and the standard error of their mean change."""
    apart = runs[0]["host"]["apart"]
    counts = [run["windows"] for run in runs]
    error = pooled_error([row["change_error"] for row in rows], apart)
    return {"windows": sum(counts) if apart else max(counts), "change_error": error}


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each screening the fastest budget whose loss, at the worst seed, is at most `TOLERANCE`
    higher; none where there is no such budget."""
    found = []
    for screening in dict.fromkeys(row["screening"] for row in rows):
        fitting = [
            row
            for row in rows
            if row["screening"] == screening and row["change"]["highest"] <= TOLERANCE
        ]
        entry: dict[str, Any] = {"screening": screening, "tolerance": TOLERANCE, "budget": None}
        if fitting:
            best = min(fitting, key=lambda row: row["seconds"]["median"])
            names = ("change", "seconds", "dense_seconds")
            entry |= {"budget": [best["top_k"], best["block_size"]]}
            entry |= {name: best[name]["median"] for name in names}
            entry["over_dense"] = entry["dense_seconds"] / entry["seconds"]
        found.append(entry)
    return found


def _native(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    arms = dict.fromkeys((run["attention"], run["trained"]) for run in runs)
    for attention, trained in arms:
        mine = [r for r in runs if (r["attention"], r["trained"]) == (attention, trained)]
        losses = {
            length: {
                how: over_seeds([run["losses"][length][how] for run in mine])
                for how in ("dense", "sparse")
            }
            for length in mine[0]["losses"]
        }
        row = {"attention": attention, "trained": trained, "budget": mine[0]["budget"]}
        row |= {"seeds": [run["seed"] for run in mine], "losses": losses}
        found.append({**row, "seconds": over_seeds([run["seconds"] for run in mine])})
    return found


def tables(content: dict[str, Any]) -> None:
    lines = []
    for row in content["rows"]:
        recall = row.get("recall_screening", {}).get("median")
        cells = [
            f"{row['top_k']}/{row['block_size']}",
            row["screening"],
            f"{row['loss']['median']:.4f}",
            f"{row['change']['median']:+.4f}",
            "–" if row["change_error"] is None else f"{row['change_error']:.4f}",
            "–" if recall is None else f"{recall:.3f}",
            f"{row['seconds']['median'] * 1e3:.1f}",
            f"{row['dense_seconds']['median'] * 1e3:.1f}",
        ]
        lines.append(cells)
    show(["budget", "keys by", "loss", "change", "error", "recall", "ms", "dense ms"], lines)
    lines = []
    for row in content["native"]:
        for length, losses in row["losses"].items():
            both = [f"{losses[how]['median']:.4f}" for how in ("dense", "sparse")]
            lines.append([row["attention"], row["trained"], length, *both])
    show(["attention", "trained", "length", "loss dense", "loss sparse"], lines)


def main(arguments: list[str] | None = None) -> None:
    from gravity_hf.hub.card_public import public
    from gravity_hf.training.files import write_json

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_host_options(parser)
    add = parser.add_argument
    add("--context", type=int, help="tokens that hosts are measured on [their longest windows]")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--minutes", type=float, help="start no run later than this [CPU: 60, GPU: 3.5]")
    add("--runs", type=Path, default=Path("runs/sparse_attention"), help="what is kept of runs")
    add("--out", type=Path, help="JSON [results/sparse_attention_DEVICE.json, _pretrained.json]")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.quick and options.out is None:
        parser.error("--quick: expected --out too: what is measured then is not to be kept")
    if options.commit:
        os.environ["GRAVITY_HF_COMMIT"] = options.commit
    try:
        runs = plan(options)
    except ValueError as error:
        parser.error(str(error))
    # One process has the whole machine: times are measured.
    gpus = 1 if options.device == "cuda" else 0
    file = options.runs / "runs.jsonl"
    minutes = options.minutes or (3.5 if gpus else 60.0)
    done = run_all(runs, work, file, workers=0, gpus=gpus, minutes=minutes)
    if not done:
        raise SystemExit("error: all runs failed or were left for later: see above")
    command = shlex.join(["python", "scripts/experiments/sparse_attention.py", *given])
    content = {"conditions": {**done[-1]["conditions"], "command": command}, **summary(done)}
    content = public(content)
    out = options.out or RESULTS / result_name("sparse_attention", options, options.device)
    print(f"written to {write_json(out, content)}")
    tables(content)
    if len(done) < len(runs):
        raise SystemExit(f"error: {len(runs) - len(done)} runs are left: run it again")


if __name__ == "__main__":
    main()
