"""Sparse attention beside dense: time and peak memory of prefill, decoding and training steps.

    python scripts/benchmark/sparse_attention.py                   # CPU: sparse_attention_cpu.json
    python scripts/benchmark/sparse_attention.py --device cuda     # bfloat16, lengths to 32768
    python scripts/benchmark/sparse_attention.py --quick           # to see that it works

One layer alone (`sparse_attention` with its choice of keys, against torch's SDPA and against the
dense operator of gravity) and a whole Llama around it. Rows at one shape are called in turns, so
that a busy machine is busy for all of them. `over_dense` is the dense median over the row's: below
1 sparse attention loses, and such rows stay. Peak memory is above what was there before the call.

How much of the loss a budget costs is not measured here: scripts/experiments/sparse_attention.py.
Cases are written as they are done; the same command goes on after the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lgt_calls import calls_in_turns, peak_mib
from results import conditions
from rich.progress import track
from sparse_calls import Call, Case, Subject, prepare
from timing import as_graph

from gravity_hf.hub.card_public import public
from gravity_hf.training.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = {
    "cpu": (512, 1024, 2048, 4096, 8192),
    "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768),
}
# Longer than this neither gradients nor a host with gravity are measured.
STEP_LENGTHS = {"cpu": (4096,), "cuda": (8192,)}
SHAPES = {
    "cpu": {"batch": 1, "heads": 4, "kv_heads": 2, "width": 64, "dtype": "float32"},
    "cuda": {"batch": 1, "heads": 16, "kv_heads": 4, "width": 64, "dtype": "bfloat16"},
}
BUDGETS = ((128, 16), (256, 32), (512, 32), (1024, 64), (256, 1))
QUICK = {"lengths": (256, 512), "budgets": ((128, 16),)}
LAUNCHES = ("eager", "graph")
SECONDS = {"cpu": 1.0, "cuda": 0.2}


def cases(
    device: str, lengths: tuple[int, ...], levels: list[str], launch: str = "eager"
) -> Iterator[Case]:
    shape = {**SHAPES[device], "launch": launch}
    if "layer" in levels:
        for law in ("dot", "gravity"):
            for work in ("prefill", "decode"):
                for length in lengths:
                    yield Case("layer", work, law, length, **shape)
            for length in lengths:
                if length in STEP_LENGTHS[device] or lengths == QUICK["lengths"]:
                    yield Case("layer", "step", law, length, **shape)
    if "host" in levels:
        for law in ("dot", "gravity"):
            for work in ("prefill", "decode"):
                for length in lengths:
                    yield Case("host", work, law, length, **shape)


def subjects(case: Case, budgets: tuple[tuple[int, int], ...], impls: list[str]) -> list[Subject]:
    """Dense first. Budgets that cover all keys are dense attention, and are left out."""
    decode = case.work == "decode"
    caches = ("dynamic", "screened") if decode else (None,)
    dense_caches = caches if case.level == "host" else caches[:1]
    found = [Subject("dense", cache=cache) for cache in dense_caches]
    for top_k, block_size in budgets:
        if top_k >= case.length:
            continue
        for cache in caches:
            for impl in impls if case.level == "layer" else ["auto"]:
                found.append(Subject("sparse", top_k, block_size, "keys", cache, impl))
    # What a choice in fewer dimensions saves, for one budget.
    last = [s for s in found if s.kind == "sparse" and s.block_size > 1 and s.impl == impls[0]]
    return found + [dataclasses.replace(s, screen="projected") for s in last[-len(caches) :]]


def measure(case: Case, asked: list[Subject], device: str, seconds: float) -> list[dict[str, Any]]:
    """One row for each subject. One that cannot run has its error as `note`. Memory is that of an
    eager call: a graph's is the graph's."""
    calls: dict[Subject, Call] = {}
    known: dict[Subject, dict[str, Any]] = {}
    for subject in asked:
        try:
            call = prepare(case, subject, device)
            call()
            known[subject] = {"peak_mib": peak_mib(call, device)}
            calls[subject] = as_graph(call) if case.launch == "graph" else call
        except (RuntimeError, ValueError, NotImplementedError) as error:
            note = " ".join(str(error).split())[:160] or type(error).__name__
            known[subject] = {"note": note}
            if device != "cpu":
                torch.cuda.empty_cache()
    times: dict[Any, dict[str, Any]] = calls_in_turns(calls, device, seconds) if calls else {}
    dense = times.get(asked[0], {}).get("median_ms")
    rows = []
    for subject in asked:
        row = {**dataclasses.asdict(case), **dataclasses.asdict(subject), **known[subject]}
        row |= times.get(subject, {})
        if dense is not None and subject in times:
            row["over_dense"] = dense / times[subject]["median_ms"]
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--lengths", type=int, nargs="+", help="tokens [CPU: 512 to 8192, GPU: to 32768]")
    add("--levels", nargs="+", choices=("layer", "host"), default=["layer", "host"])
    add("--budgets", nargs="+", metavar="TOP_K,BLOCK", help=f"[{_as_text(BUDGETS)}]")
    add("--launches", nargs="+", default=["eager"], choices=LAUNCHES, help="graph: CUDA replays")
    add("--impls", nargs="+", default=["auto"], help="of one layer's sparse operator [auto]")
    add("--seconds", type=float, help="of timing, for each case [CPU: 1, GPU: 0.2]")
    add("--threads", type=int, default=1, help="of torch on the CPU [1]")
    add("--commit", help="where the tree is a copy without git")
    add("--quick", action="store_true", help="short rows, to see that it works")
    add("--out", type=Path, help="JSON [results/sparse_attention_DEVICE.json]")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    device = options.device
    if device == "cpu" and "graph" in options.launches:
        parser.error("--launches graph: expected --device cuda, got cpu")
    if options.quick and options.out is None:
        parser.error("--quick: expected --out too: what is measured then is not to be kept")
    torch.set_num_threads(options.threads)
    lengths = tuple(options.lengths or (QUICK["lengths"] if options.quick else LENGTHS[device]))
    budgets = _budgets(options.budgets) or (QUICK["budgets"] if options.quick else BUDGETS)
    seconds = (
        (0.0 if options.quick else SECONDS[device])
        if options.seconds is None
        else (options.seconds)
    )
    settings = {
        "lengths": lengths,
        "levels": options.levels,
        "launches": options.launches,
        "budgets": budgets,
        "impls": options.impls,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
    }
    known = conditions(device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/sparse_attention.py", *given]),
        "settings": json.loads(json.dumps(settings)),
    }
    out = options.out or RESULTS / f"sparse_attention_{device}.json"
    rows = _done_before(out, public({"conditions": known})["conditions"])
    done = {_case_of(row) for row in rows}
    asked = (cases(device, lengths, options.levels, launch) for launch in options.launches)
    todo = [case for some in asked for case in some if case not in done]
    for case in track(todo, "sparse attention", disable=not sys.stderr.isatty()):
        rows += measure(case, subjects(case, budgets, options.impls), device, seconds)
        write_json(out, public({"conditions": known, "rows": rows}))
        for row in rows:
            if _case_of(row) == case:
                print(_in_words(row), flush=True)
    print(f"written to {out}")


def _budgets(given: list[str] | None) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, _, b in (x.partition(",") for x in given or ()))


def _as_text(budgets: tuple[tuple[int, int], ...]) -> str:
    return " ".join(f"{top_k},{block}" for top_k, block in budgets)


def _done_before(out: Path, known: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run that was cut short: of the same code on the same device."""
    if not out.is_file():
        return []
    content = json.loads(out.read_text(encoding="utf-8"))
    names = ("device", "commit", "versions", "settings", "uncommitted_changes")
    same = all(content["conditions"].get(name) == known.get(name) for name in names)
    return content["rows"] if same else []


def _case_of(row: dict[str, Any]) -> Case:
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def _in_words(row: dict[str, Any]) -> str:
    what = f"{row['level']:<5} {row['law']:<8} {row['work']:<8} {row['length']:>6} {row['launch']}"
    who = "dense" if row["kind"] == "dense" else f"{row['top_k']}/{row['block_size']}"
    who += "".join(f" {row[name]}" for name in ("screen", "cache", "impl") if row[name])
    if "median_ms" not in row:
        return f"{what} {who:<32} {row.get('note')}"
    times = f"{row['median_ms']:9.3f} ms x{row['over_dense']:5.2f} {row['peak_mib']:9.1f} MiB"
    return f"{what} {who:<32} {times}"


if __name__ == "__main__":
    main()
