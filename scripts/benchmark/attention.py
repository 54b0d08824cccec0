"""Time and memory of gravity attention's implementations, beside torch's dot-product attention."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gravity_hf.ops import gravity_attention  # noqa: E402

PROVIDERS = ("sdpa", "reference", "chunked", "flex")
EPILOG = """\
What is measured: one attention call (forward), and one call with the gradients of q, k, v and, for
gravity, the masses (forward+backward). Times are medians with the 20th and 80th percentile. Memory
is what a call needs beyond its inputs: the allocator's peak on CUDA, the resident set of a fresh
process on a CPU. A correctness gate runs first: every provider against float64 at a short length; a
provider that fails is reported and not timed. Rows that cannot run say why. Nothing is left out for
being slow.

  python scripts/benchmark/attention.py --lengths 1024 4096
  python scripts/benchmark/attention.py --device cuda --dtype bfloat16 --batch 4 --heads 16 \\
      --kv-heads 2 --width 128 --lengths 4096 --output scripts/benchmark/results/h100.json
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of q, k, v"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument(
        "--kv-heads", type=int, default=8, help="key heads; fewer = grouped queries"
    )
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="keys")
    parser.add_argument(
        "--queries", type=int, help="queries per call (default: as many as keys); 1 = decoding"
    )
    parser.add_argument("--full", action="store_true", help="every key visible (default: causal)")
    parser.add_argument("--laws", nargs="+", default=["force", "power"], choices=["force", "power"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed calls per row, after 3 others"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--commit", help="commit measured, where the tree is a copy without git")
    parser.add_argument("--one-memory-row", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_inputs(options: argparse.Namespace, length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = min(options.queries or length, length)
    shapes = [(options.heads, queries), (options.kv_heads, length), (options.kv_heads, length)]
    tensors = [
        torch.randn(options.batch, heads, n, options.width, generator=generator).to(dtype)
        for heads, n in shapes
    ]
    mass = torch.rand(options.heads, generator=generator) + 0.5
    tensors.append(mass.to(torch.promote_types(dtype, torch.float32)))
    return [x.to(options.device) for x in tensors]


def call(provider: str, law: str, options: argparse.Namespace, tensors: list[Tensor]) -> Tensor:
    q, k, v, mass = tensors
    causal = not options.full
    if provider == "sdpa":
        # Its causal flag is aligned at the first key; for fewer queries than keys gravity's is not,
        # and a single last query sees every key anyway.
        flag = causal and q.shape[2] == k.shape[2]
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=flag, enable_gqa=grouped)
    return gravity_attention(q, k, v, mass, eps=0.1, law=law, causal=causal, impl=provider)


def one_pass(
    provider: str, law: str, options: argparse.Namespace, tensors: list[Tensor], backward: bool
) -> None:
    if not backward:
        with torch.no_grad():
            call(provider, law, options, tensors)
        return
    wanted = tensors[:3] if provider == "sdpa" else tensors
    for x in wanted:
        x.requires_grad_()
    output = call(provider, law, options, tensors)
    torch.autograd.grad(output, wanted, torch.ones_like(output))


def gate(provider: str, law: str, options: argparse.Namespace) -> str | None:
    """None, or what is wrong: error against float64 at most 2 times the plain computation's."""
    dtype = getattr(torch, options.dtype)
    tensors = make_inputs(options, 200, dtype)
    exact = [x.double() for x in tensors]
    plain = "reference" if provider != "sdpa" else "sdpa"
    with torch.no_grad():
        truth = call(plain, law, options, exact)
        peer = call(plain, law, options, tensors).double()
        error = (call(provider, law, options, tensors).double() - truth).abs().max().item()
    unit = torch.finfo(dtype).eps * truth.abs().max().item()
    budget = 2 * ((peer - truth).abs().max().item() + unit)
    return None if error <= budget else f"error {error:.1e} above its budget {budget:.1e}"


def milliseconds(run: Callable[[], None], device: str, repeats: int) -> list[float]:
    """[20th percentile, median, 80th percentile]."""

    def synchronize() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    if len(times) < 2:
        return times * 3
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return [tenths[1], statistics.median(times), tenths[7]]


def peak_mib(
    provider: str, law: str, options: argparse.Namespace, length: int, backward: bool
) -> float:
    """Most memory in use during a call, less what was in use before it, in MiB."""
    if options.device == "cpu":
        row = f"{provider},{law},{length},{int(backward)}"
        command = [sys.executable, __file__, *sys.argv[1:], "--one-memory-row", row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout)
    tensors = make_inputs(options, length, getattr(torch, options.dtype))
    one_pass(provider, law, options, tensors, backward)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_pass(provider, law, options, tensors, backward)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def one_memory_row(options: argparse.Namespace) -> None:
    """In a fresh process: a process's peak never falls, so each row needs its own."""
    provider, law, length, backward = options.one_memory_row.split(",")
    dtype = getattr(torch, options.dtype)
    one_pass(provider, law, options, make_inputs(options, 16, dtype), bool(int(backward)))
    tensors = make_inputs(options, int(length), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_kib("VmRSS")
    one_pass(provider, law, options, tensors, bool(int(backward)))
    print((resident_kib("VmHWM") - before) / 1024)


def resident_kib(field: str) -> int:
    """Linux's own count. `ru_maxrss` will not do: a new process inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(
    provider: str, law: str, options: argparse.Namespace, length: int, backward: bool
) -> dict:
    row = {"provider": provider, "law": law, "keys": length}
    row["pass"] = "forward+backward" if backward else "forward"
    try:
        tensors = make_inputs(options, length, getattr(torch, options.dtype))
        times = milliseconds(
            lambda: one_pass(provider, law, options, tensors, backward),
            options.device,
            options.repeats,
        )
        row.update(zip(("p20_ms", "median_ms", "p80_ms"), times, strict=True))
        if not options.no_memory:
            row["extra_mib"] = peak_mib(provider, law, options, length, backward)
    except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        row["failed"] = str(error).splitlines()[0][:200]
    return row


def conditions(options: argparse.Namespace) -> dict:
    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip()

    on_cpu = options.device == "cpu"
    name = platform.processor() or platform.machine()
    if on_cpu and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": name if on_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": options.commit or git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": None if options.commit else bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "dtype": options.dtype,
        "shape": {name: getattr(options, name) for name in ("batch", "heads", "kv_heads", "width")},
        "queries": options.queries or "as keys",
        "causal": not options.full,
        "repeats": options.repeats,
    }


def show(row: dict) -> None:
    label = f"{row['keys']:>7} {row['pass']:<17} {row['provider']:<10} {row['law']:<6}"
    if "failed" in row:
        print(f"{label} {row['failed']}", flush=True)
        return
    memory = f"{row['extra_mib']:10.1f}" if "extra_mib" in row else ""
    times = f"{row['median_ms']:10.3f} {row['p20_ms']:10.3f} {row['p80_ms']:10.3f}"
    print(f"{label} {times} {memory}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one_memory_row:
        one_memory_row(options)
        return
    report = {"conditions": conditions(options), "gate": {}, "rows": []}
    print(json.dumps(report["conditions"], indent=2))
    cases = [
        (provider, law)
        for provider in options.providers
        for law in (options.laws if provider != "sdpa" else ["dot"])
    ]
    for provider, law in cases:
        problem = gate(provider, law, options)
        report["gate"][f"{provider} {law}"] = problem or "passed"
    print(json.dumps(report["gate"], indent=2))
    head = f"{'keys':>7} {'pass':<17} {'provider':<10} {'law':<6}"
    print(f"{head} {'median ms':>10} {'p20':>10} {'p80':>10} {'extra MiB':>10}")
    for length in options.lengths:
        for backward in (False, True):
            for provider, law in cases:
                if report["gate"][f"{provider} {law}"] != "passed":
                    continue
                row = measure(provider, law, options, length, backward)
                report["rows"].append(row)
                show(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
