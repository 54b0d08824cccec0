"""Which tile sizes are fastest: every kernel with many, for `gravity_hf/ops/triton/tiles.py`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gravity_hf.ops.triton.forward import SAVED, forward  # noqa: E402
from gravity_hf.ops.triton.gradients import gather_inputs  # noqa: E402
from gravity_hf.ops.triton.key_gradients import key_gradients  # noqa: E402
from gravity_hf.ops.triton.problem import Problem  # noqa: E402
from gravity_hf.ops.triton.query_gradients import query_gradients  # noqa: E402

KERNELS = ("forward", "query", "key")
EPILOG = """\
Needs a CUDA device. Compiles all candidates first, in parallel processes that fill Triton's cache,
then times each (median of triton.testing.do_bench) and prints them from fastest to slowest. One
candidate is rows x keys x warps x stages.

  python scripts/benchmark/tiles.py --width 128 --heads 16 --kv-heads 2 --length 4096
  python scripts/benchmark/tiles.py --ngt --batch 16 --heads 8 --kv-heads 8 --length 512 --width 64
  python scripts/benchmark/tiles.py --kernels key --tiles 32x64x4x2 32x64x4x3 64x64x4x2
"""


class Job(NamedTuple):
    kernel: str
    tiles: tuple[int, int, int, int]

    def sizes(self) -> dict[str, int]:
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        return dict(zip(names, self.tiles, strict=True))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument(
        "--tiles",
        nargs="+",
        default=[
            "64x64x4x2", "64x64x4x3", "64x32x4x2", "32x64x4x2", "32x64x4x3", "128x64x8x2",
            "128x64x8x3", "128x128x8x2",
        ],
        help="candidates, rows x keys x warps x stages",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--law", default="force", choices=["force", "power"])
    parser.add_argument("--lifted", action="store_true", help="lifted keys")
    parser.add_argument("--masses", action="store_true", help="per-token masses: the general code")
    parser.add_argument(
        "--ngt", action="store_true", help="NGT's call: float32 coordinates 16 wide, power law, "
        "token masses, the token itself excluded"
    )  # fmt: skip
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention weights")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128, help="width of a head")
    parser.add_argument("--processes", type=int, default=12, help="that compile at the same time")
    return parser.parse_args(arguments)


def make_problem(options: argparse.Namespace) -> Problem:
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, options.dtype)

    def normal(heads: int) -> torch.Tensor:
        shape = (options.batch, heads, options.length, options.width)
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    q, k, v = normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)
    heads = torch.ones(options.heads, device="cuda")
    problem = Problem(
        q=q, k=k, v=v, strength=heads, eps=0.1 * heads, key_radius_sq=None, query_mass=None,
        key_term=None, head_bias=None, radius=None, table=None, sink=None, mask=None,
        key_ranges=None, seed=None, law=options.law, causal=True, window=0, exclude_self=False,
        repulsive=False, cutoff="none", width=1.0, max_force=float("inf"), dropout_p=0.0,
    )  # fmt: skip
    if options.lifted:
        radius_sq = k.float().square().sum(-1).amax((0, 2))
        problem = replace(problem, key_radius_sq=radius_sq, eps=2.0 * options.width * heads)
    if options.masses:
        problem = replace(problem, key_term=torch.rand(q.shape[:3], device="cuda"))
    if options.ngt:
        q, k = (x[..., :16].float().contiguous() for x in (q, k))
        masses = torch.rand(q.shape[:3], device="cuda")
        terms = {"key_term": masses, "law": "power", "exclude_self": True}
        problem = replace(problem, q=q, k=k, **terms)
    if options.dropout > 0:
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        problem = replace(problem, seed=seed, dropout_p=options.dropout)
    return problem


def prepare(problem: Problem) -> Callable[[Job], Callable[[], Any]]:
    """What a job times."""
    padded = -(-problem.queries // 4) * 4
    planes = SAVED + (problem.dropout_p > 0)
    saved = torch.empty(planes, problem.batch, problem.heads, padded, device="cuda")
    out, norms = forward(problem, saved)
    inputs = gather_inputs(problem, saved, torch.randn_like(out), norms)
    query_gradients(problem, out, inputs, 2)  # fills what the kernel for keys reads

    def call(job: Job) -> Callable[[], Any]:
        if job.kernel == "forward":
            return lambda: forward(problem, saved, job.sizes())
        if job.kernel == "query":
            return lambda: query_gradients(problem, out, inputs, 2, job.sizes())
        return lambda: key_gradients(problem, inputs, job.sizes())

    return call


def compile_one(work: tuple[argparse.Namespace, Job]) -> str | None:
    """In a process of its own: a candidate that fails must not take the device with it."""
    options, job = work
    small = argparse.Namespace(**{**vars(options), "batch": 1})
    try:
        prepare(make_problem(small))(job)()
        torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler or a launch can raise is a result here
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    tiles = [tuple(int(x) for x in candidate.split("x")) for candidate in options.tiles]
    jobs = [Job(kernel, candidate) for kernel in options.kernels for candidate in tiles]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        failures = pool.map(compile_one, [(options, job) for job in jobs], chunksize=1)
    from triton.testing import do_bench

    print({name: value for name, value in vars(options).items() if name != "tiles"})
    call = prepare(make_problem(options))
    for kernel in options.kernels:
        rows = []
        for job, failure in zip(jobs, failures, strict=True):
            if job.kernel == kernel:
                time = float("inf") if failure else do_bench(call(job), return_mode="median")
                rows.append((time, "x".join(map(str, job.tiles)), failure or ""))
        for time, label, failure in sorted(rows):
            print(f"{kernel:8s} {label:14s} {time:9.3f} ms {failure}", flush=True)


if __name__ == "__main__":
    main()
