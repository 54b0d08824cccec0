"""How many requests a second `gravity-hf serve` answers, and how long a client waits."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx  # noqa: E402
import torch  # noqa: E402
from results import conditions  # noqa: E402

from gravity_hf.hub.card_public import public  # noqa: E402
from gravity_hf.knowledge.delta import (  # noqa: E402
    LowRankDelta,
    in_out_features,
    target_modules,
)
from gravity_hf.knowledge.facts import load_facts  # noqa: E402
from gravity_hf.knowledge.server.opening import load_base  # noqa: E402
from gravity_hf.knowledge.store import BeliefStore  # noqa: E402
from gravity_hf.training.files import write_json  # noqa: E402

EPILOG = """\
A server in a process of its own, with beliefs whose factors are random (what they cost does not
depend on what they say); clients in this one, each sending its next request when it has the answer.
`named`: each request names one belief. `routed`: the text finds its beliefs. `base`: none. Greedy,
so that all texts are as long as allowed. Requests/s and tokens/s are over the whole run; latencies
are of requests, from sending to the last byte; `first` to the first piece of a streamed answer.

  python scripts/benchmark/serve_beliefs.py MODEL --output scripts/benchmark/results/serve_cpu.json
  python scripts/benchmark/serve_beliefs.py MODEL --quick     # to see that it works
"""
READY_WITHIN = 300


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", type=Path, metavar="MODEL", help="folder of a causal language model")
    add("--clients", nargs="+", type=int, default=[1, 4, 16], help="at once (default 1 4 16)")
    add("--batch", nargs="+", type=int, default=[1, 8], help="rows of a forward pass")
    add("--ways", nargs="+", default=["named", "routed", "base"],
        choices=["named", "routed", "base"])  # fmt: skip
    add("--requests", type=int, default=64, help="of each row (default 64)")
    add("--tokens", type=int, default=32, help="written for each (default 32)")
    add("--beliefs", type=int, default=64, help="in the store (default 64)")
    add("--device", default="auto")
    add("--dtype", default="float32")
    add("--threads", type=int, help="CPU threads of the server")
    add("--commit", help="where the tree is a copy without git")
    add("--note", help="what else there is to say of the machine")
    add("--quick", action="store_true", help="few requests, to see that it works")
    add("--output", type=Path, metavar="FILE.json", help="write rows and conditions here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.batch, options.ways = [2], [1], ["named"]
        options.requests, options.tokens, options.beliefs = 4, 4, 2
    if min(*options.clients, *options.batch, options.requests, options.tokens) < 1:
        parser.error("expected counts of at least 1")
    return options


def make_store(folder: Path, options: argparse.Namespace) -> list[Any]:
    """A store with the first facts of a bank and random deltas of rank 2; those facts."""
    model, tokenizer = load_base(options.base, device="cpu", dtype=options.dtype)
    store = BeliefStore.create(folder, model, tokenizer)
    facts = load_facts("general")[: options.beliefs]
    generator = torch.Generator().manual_seed(0)
    with store.transaction():
        for fact in facts:
            factors = {}
            for name in target_modules(model):
                wide, out = in_out_features(model.get_submodule(name))
                pair = (
                    torch.randn(2, wide, generator=generator),
                    torch.randn(out, 2, generator=generator),
                )
                factors[name] = (pair[0] * 0.01, pair[1] * 0.01)
            store.add_delta(fact.id, LowRankDelta(factors), fact=fact)
    return facts


@contextmanager
def server(kb: Path, options: argparse.Namespace, batch: int) -> Iterator[str]:
    """`gravity-hf serve` on a free port; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "gravity_hf.cli.main", "serve", str(options.base), str(kb)]
    command += ["--port", str(port), "--device", options.device, "--dtype", options.dtype]
    command += ["--batch", str(batch), "--active", "16", "--queue", "64", "--timeout", "600"]
    command += ["--route-threshold", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


async def load(
    url: str, way: str, clients: int, facts: list[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One row: every client sends its share, one request after the other."""
    waiting = iter(range(options.requests))
    took: list[tuple[float, float, int]] = []
    async with httpx.AsyncClient(base_url=url, timeout=900) as http:

        async def client() -> None:
            for number in waiting:
                took.append(await request(http, way, facts[number % len(facts)], options.tokens))

        await request(http, way, facts[0], 2)
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - started
    tokens = sum(count for _, _, count in took)
    return {
        "way": way,
        "clients": clients,
        "requests": len(took),
        "requests_per_s": len(took) / seconds,
        "tokens_per_s": tokens / seconds,
        "latency_ms": percentiles([1e3 * whole for whole, _, _ in took]),
        "first_ms": percentiles([1e3 * first for _, first, _ in took]),
    }


async def request(
    http: httpx.AsyncClient, way: str, fact: Any, tokens: int
) -> tuple[float, float, int]:
    """Seconds to the end and to the first piece, and tokens written."""
    body: dict[str, Any] = {
        "prompt": fact.prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if way == "named":
        body["beliefs"] = [fact.id]
    elif way == "base":
        body["use_knowledge"] = False
    started, first, written = time.perf_counter(), None, 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line:
                first = time.perf_counter() - started
            if '"usage"' in line:
                written = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return time.perf_counter() - started, first or 0.0, written


def percentiles(values: list[float]) -> dict[str, float]:
    """By the nearest rank."""
    ordered = sorted(values)
    return {
        f"p{p}": round(ordered[max(0, -(-len(ordered) * p // 100) - 1)], 2) for p in (50, 95, 99)
    }


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    known = conditions("cpu" if device == "auto" else device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/serve_beliefs.py", *given]),
        "threads": options.threads or torch.get_num_threads(),
        "settings": {"tokens": options.tokens, "beliefs": options.beliefs, "dtype": options.dtype},
        "note": options.note,
        "quick": options.quick,
    }
    rows = []
    with tempfile.TemporaryDirectory() as home:
        facts = make_store(Path(home) / "kb", options)
        for batch in options.batch:
            with server(Path(home) / "kb", options, batch) as url:
                for way in options.ways:
                    for clients in options.clients:
                        row = asyncio.run(load(url, way, clients, facts, options))
                        rows.append({"batch": batch, **row})
                        print(said(rows[-1]))
    if options.output:
        report = public({"conditions": known, "rows": rows})
        print(f"written to {write_json(options.output, report)}")


def said(row: dict[str, Any]) -> str:
    """A row in words."""
    wait, first = row["latency_ms"], row["first_ms"]
    return (
        f"batch {row['batch']:<3} {row['way']:<7} {row['clients']:>3} clients: "
        f"{row['requests_per_s']:7.2f} requests/s {row['tokens_per_s']:8.1f} tokens/s, "
        f"latency p50 {wait['p50']:.0f} p95 {wait['p95']:.0f} ms, first p50 {first['p50']:.0f} ms"
    )


if __name__ == "__main__":
    main()
