"""Time and memory of gravity attention's implementations, beside torch's dot-product attention."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import gate  # noqa: E402
import timing  # noqa: E402
from cpu_memory import extra_mib_in_a_fresh_process  # noqa: E402
from presets import table_cases  # noqa: E402
from problems import EPS, LAUNCHES, MASS, WORKS, Case, Problem, Shape, make_problem  # noqa: E402
from providers import (  # noqa: E402
    DEFAULTS,
    FORWARD_ONLY,
    PEERS,
    PROVIDERS,
    backend_of,
    chosen_backend,
    prepare,
    score_bytes,
    triton_interpreter,
)
from results import conditions, save  # noqa: E402
from targets import attention_lines, show_lines  # noqa: E402

EPILOG = """\
What is measured: one call without gradients (forward), the gradients of q, k, v and, for gravity,
the masses (backward), or both. Fewer queries than keys is decoding. Times are the median with the
20th and 80th percentile; on CUDA of events around calls that find a cold L2 cache. Memory is what a
call needs beyond its inputs and outputs: the allocator's peak on CUDA, the resident set of a fresh
process on a CPU. A correctness gate runs first: every provider against float64 at a short length. A
provider that fails is reported and not timed. Rows that cannot run say why in `note`. Nothing is
left out for being slow.

Providers named gravity_eager and gravity_reference hold all scores: eager is what a model's author
writes (products in the dtype of the inputs), reference the definition in float32.

  python scripts/benchmark/attention.py --lengths 1024 4096
  python scripts/benchmark/attention.py --device cuda --preset table --output kernels_table.csv
  python scripts/benchmark/attention.py --device cuda --dtype bfloat16 --batch 4 --heads 16 \\
      --kv-heads 2 --width 128 --lengths 512 1024 2048 4096 8192 16384 32768 \\
      --passes forward backward --output kernels_lengths.csv --plot
  python scripts/benchmark/attention.py --device cuda --dtype bfloat16 --batch 8 --heads 32 \\
      --kv-heads 4 --width 128 --queries 1 --lengths 8192 32768 --launches eager graph

Written: one row per provider, law, distance, pass and shape to OUTPUT (.csv); conditions, gate and,
with --preset table, the targets to the same name with .json.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of q, k, v (default float32)")
    add(
        "--preset",
        choices=["table"],
        help="the rows of the table of targets, bfloat16; options of shape, law and pass are not "
        "read, --providers narrows it",
    )
    add("--batch", type=int, default=1)
    add("--tokens", type=int, help="batch = tokens / keys, at least 1, instead of --batch")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, default=8, help="key heads; fewer = grouped queries")
    add("--width", type=int, default=64, help="width of a head")
    add("--lengths", type=int, nargs="+", default=[1024, 4096], help="keys")
    add("--queries", type=int, help="queries per call (default: as many as keys); 1 = decoding")
    add("--full", action="store_true", help="every key visible (default: causal)")
    add("--laws", nargs="+", default=["force", "power"], choices=["force", "power"])
    add("--distances", nargs="+", default=["euclidean"], choices=["euclidean", "lifted"])
    add(
        "--passes", nargs="+", choices=WORKS, help="default: forward and backward; decoding forward"
    )
    add("--launches", nargs="+", default=["eager"], choices=LAUNCHES, help="graph: CUDA replays")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--mass", type=float, default=MASS, help="mass of a head, about (default %(default)s)")
    add("--eps", type=float, default=EPS, help="softening (default %(default)s)")
    add("--milliseconds", type=float, default=100, help="timed calls of a row take, together")
    add("--repeats", type=int, default=5, help="timed calls of a row, at least")
    add("--quick", action="store_true", help="20 milliseconds, 2 repeats")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--no-memory", action="store_true", help="skip the memory measurement")
    add("--gate-only", action="store_true", help="stop after the correctness gate")
    add("--output", type=Path, metavar="FILE.csv", help="write the rows here")
    add("--plot", action="store_true", help="draw time against length beside the output, as SVG")
    add("--commit", help="commit measured, where the tree is a copy without git")
    options = parser.parse_args(arguments)
    if options.quick:
        options.milliseconds, options.repeats = 20, 2
    if options.dtype is None:
        options.dtype = "bfloat16" if options.preset else "float32"
    _refuse(parser, options)
    return options


def _refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What cannot run is said before anything does."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; use --device cpu")
    if options.device == "cpu" and options.preset:
        parser.error("--preset table: expected --device cuda, got cpu; its shapes are too large")
    named = options.providers or ()
    if options.device == "cpu" and "gravity_triton" in named and not triton_interpreter():
        parser.error(
            "gravity_triton on a CPU: expected triton installed and TRITON_INTERPRET=1, which "
            "interprets the kernels; set it, at tiny shapes, or use --device cuda"
        )
    if options.device == "cpu" and "graph" in options.launches:
        parser.error("--launches graph: expected --device cuda, got cpu")
    if options.output is not None and options.output.suffix != ".csv":
        parser.error(f"--output: expected a name that ends in .csv, got {options.output}")
    if options.plot and options.output is None:
        parser.error("--plot: expected --output FILE.csv too; the plot is written beside it")
    if options.queries and options.queries > min(options.lengths):
        parser.error(f"--queries: expected at most {min(options.lengths)}, got {options.queries}")
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads: expected a divisor of {options.heads}, got {options.kv_heads}")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The rows, those of one shape together."""
    if options.preset:
        wanted = options.providers or PROVIDERS
        return [case for case in table_cases() if case.provider in wanted]
    return list(_swept(options))


def _swept(options: argparse.Namespace) -> Iterator[Case]:
    for length in options.lengths:
        shape = Shape(
            batch=max(1, options.tokens // length) if options.tokens else options.batch,
            heads=options.heads,
            kv_heads=options.kv_heads,
            queries=options.queries or length,
            keys=length,
            width=options.width,
            causal=not options.full,
        )
        works = options.passes or (WORKS[:1] if shape.is_decoding else WORKS[:2])
        providers = options.providers or DEFAULTS[options.device]
        for work, launch, provider in itertools.product(works, options.launches, providers):
            if launch == "graph" and work == "backward":
                continue
            laws = [("dot", "-")]
            if provider not in PEERS:
                laws = list(itertools.product(options.laws, options.distances))
            for law, distance in laws:
                yield Case(provider, law, distance, work, shape, launch)


def gate_key(case: Case) -> str:
    """Cases of one key pass or fail the gate together."""
    shape = case.shape
    kind = "decoding" if shape.is_decoding else "all queries"
    if shape.queries < shape.keys and not shape.is_decoding:
        kind = f"{shape.queries} queries"
    heads = f"H{shape.heads} HKV{shape.kv_heads} D{shape.width}"
    return f"{case.provider} {case.law} {case.distance} {heads} {kind}"


def run_gate(cases: list[Case], options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """For every key, "passed" or what is wrong with forward and backward."""
    dtype = getattr(torch, options.dtype)
    first = {gate_key(case): case for case in reversed(cases)}
    verdicts = {}
    for key in dict.fromkeys(map(gate_key, cases)):
        with_gradients = any(gate_key(c) == key and c.work != "forward" for c in cases)
        found = gate.check(
            first[key], options.device, dtype, options.mass, options.eps, with_gradients
        )
        verdicts[key] = found
        for name, text in found.items():
            if text not in _FINE:
                print(f"gate: {key}, {name}: {text}", flush=True)
    clean = sum(all(text in _FINE for text in found.values()) for found in verdicts.values())
    print(f"gate: {clean} of {len(verdicts)} passed in all that they are asked", flush=True)
    return verdicts


_FINE = ("passed", "forward only", "not asked")


def obstacle(case: Case, options: argparse.Namespace, verdict: dict[str, str]) -> str:
    """Why a case is not run; "" if it is."""
    if verdict["forward"] != "passed":
        return f"gate, forward: {verdict['forward']}"
    if case.work != "forward" and case.provider in FORWARD_ONLY:
        return "forward only"
    if case.work != "forward" and verdict["backward"] != "passed":
        return f"gate, backward: {verdict['backward']}"
    needed, free = score_bytes(case, options.device), timing.free_bytes(options.device)
    if needed > free:
        return f"not run: its scores need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return ""


def measure(case: Case, options: argparse.Namespace, verdict: dict[str, str]) -> dict[str, Any]:
    """The row of a case."""
    row = {
        "provider": case.provider,
        "law": case.law,
        "distance": case.distance,
        "pass": case.work,
        "launch": case.launch,
        **dataclasses.asdict(case.shape),
        "note": obstacle(case, options, verdict),
    }
    if row["note"]:
        return row
    try:
        problem = _problem(case, options)
        with backend_of(case.provider):
            run = prepare(case, problem)
            if case.launch == "graph":
                run = timing.as_graph(run)
            times = timing.milliseconds(run, options.device, options.milliseconds, options.repeats)
            row.update(zip(("p50_ms", "p20_ms", "p80_ms"), times, strict=True))
            row["note"] = chosen_backend(case.provider, problem)
            # A graph's memory belongs to the graph.
            if not options.no_memory and case.launch == "eager":
                row["extra_mib"] = (
                    extra_mib_in_a_fresh_process(case, options.dtype)
                    if options.device == "cpu"
                    else timing.extra_mib(run, options.device)
                )
    except Exception as error:
        row["note"] = f"failed: {gate.first_line(error)}"
    return row


def _problem(case: Case, options: argparse.Namespace) -> Problem:
    dtype = getattr(torch, options.dtype)
    return make_problem(case, options.device, dtype, options.mass, options.eps)


def show(case: Case, row: dict[str, Any]) -> None:
    text = ""
    if "p50_ms" in row:
        text = f"{row['p50_ms']:10.3f} {row['p20_ms']:10.3f} {row['p80_ms']:10.3f} "
        text += f"{row['extra_mib']:10.1f} " if "extra_mib" in row else ""
    print(f"{case.label()} {text}{row['note']}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    known = conditions(options.device, options.commit)
    report: dict[str, Any] = {"conditions": {**known, "settings": _settings(options)}}
    print(json.dumps(report["conditions"], indent=2), flush=True)
    cases = cases_of(options)
    report["gate"] = run_gate(cases, options)
    if options.gate_only:
        return
    head = f"{'shape':<32} {'pass':<16} {'provider':<19} {'law':<5} {'distance':<9}"
    print(f"{head} {'p50 ms':>10} {'p20':>10} {'p80':>10} {'extra MiB':>10}")
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append(measure(case, options, report["gate"][gate_key(case)]))
        show(case, rows[-1])
        gc.collect()
        if options.preset:
            report["targets"] = attention_lines(rows)
        if options.output:  # after every row: a run that is cut short leaves what it has
            save(options.output, rows, report, options.dtype)
    if options.preset:
        print(show_lines(report["targets"]))
    if options.plot:
        from plotting import write_plot

        print(write_plot(options.output.with_suffix(".svg"), rows, known["device"], options.dtype))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("mass", "eps", "milliseconds", "repeats")
    return {"threads": torch.get_num_threads(), **{n: getattr(options, n) for n in names}}


if __name__ == "__main__":
    main()
