"""The operator as NGT calls it, beside torch's SDPA: device time and time with the host.

    python scripts/benchmark/ngt_calls.py                             # needs a CUDA device
    python scripts/benchmark/ngt_calls.py --precision bf16x6 tf32x3  # ways of q.k
    python scripts/benchmark/ngt_calls.py --quick                     # CPU: to see that it works

v2: power law, token masses, the token itself excluded. reference: repulsive force, bias, masses on
both sides, hard cutoff. Both take float32 coordinates 16 wide, one tensor for queries and keys, and
values 64 wide in bfloat16; SDPA has heads 64 wide in bfloat16. All are causal. "graph" is a replay
of a CUDA graph, which is what the device takes; "eager" has Python's time in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timing
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.ops.cutoff import Cutoff
from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import attention, problem

Implementation = Callable[..., Any]
SHAPES = ((16, 8, 512), (32, 8, 512), (4, 8, 2048))
COORDINATES, VALUES = 16, 64
NAMES = ("v2", "reference", "sdpa")


class Case(NamedTuple):
    """Leaves in the order of `names`, the output that they give, and the gradient of that."""

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    run: Callable[[], Tensor]
    direction: Tensor

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self.run(),)

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(), self.leaves, self.direction)


def make_case(
    name: str,
    shape: tuple[int, int, int],
    device: str,
    implementation: Implementation = attention.gravity_attention_triton,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.bfloat16),
) -> Case:
    """`shape`: B, H, T. `dtypes`: of geometry and of values."""
    batch, heads, length = shape
    generator = torch.Generator().manual_seed(0)
    exact, half = dtypes

    def leaf(value: Tensor, dtype: torch.dtype = exact) -> Tensor:
        return value.to(device, dtype).requires_grad_()

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    # Rounded as the kernels' values are, also where they are float64.
    v = leaf(normal(batch, length, heads, VALUES).bfloat16(), half)
    direction = normal(batch, length, heads, VALUES).to(device, torch.bfloat16).to(half)
    direction = direction.transpose(1, 2)
    if name == "sdpa":
        q, k = (leaf(normal(batch, length, heads, VALUES), half) for _ in "qk")
        run = lambda: F.scaled_dot_product_attention(  # noqa: E731
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        )
        return Case(("q", "k", "v"), (q, k, v), run, direction)
    c = leaf(normal(batch, length, heads, COORDINATES))
    key_mass = leaf(0.5 + normal(batch, heads, length).abs())
    mass = leaf(torch.full((heads,), 1.4 if name == "v2" else 0.8))
    leaves = {"c": c, "v": v, "mass": mass, "key_mass": key_mass}
    options: dict[str, Any] = {"causal": True}
    if name == "v2":
        leaves["eps"] = leaf(torch.full((heads,), 0.1))
        options |= {"law": "power", "exclude_self": True}
    else:
        leaves["head_bias"] = leaf(0.1 * normal(heads))
        leaves["radius"] = leaf(torch.full((heads,), 5.0))
        options |= {"law": "force", "repulsive": True, "query_mass": key_mass}
        options["eps"] = torch.full((heads,), 1e-6, device=device, dtype=exact)

    def run() -> Tensor:
        q, values = c.transpose(1, 2), v.transpose(1, 2)
        given = {n: leaves[n] for n in ("key_mass", "eps", "head_bias") if n in leaves}
        if "radius" in leaves:
            given["cutoff"] = Cutoff(leaves["radius"], "hard")
        result = implementation(q, q, values, mass, **given, **options)
        return getattr(result, "output", result)

    return Case(tuple(leaves), tuple(leaves.values()), run, direction)


def errors(name: str, length: int, device: str) -> dict[str, float]:
    """Of the output and of each gradient against float64, relative to the largest element."""
    shape = (1, 2, length)
    case = make_case(name, shape, device)
    exact = make_case(name, shape, device, gravity_attention_reference, (torch.float64,) * 2)
    found = zip(
        ("output", *case.names),
        (*case.forward(), *case.step()),
        (*exact.forward(), *exact.step()),
        strict=True,
    )
    return {
        n: ((mine.double() - truth).abs().max() / truth.abs().max()).item()
        for n, mine, truth in found
    }


def measure(case: Case, device: str, budget_ms: float) -> Iterator[tuple[str, float]]:
    """(what, median ms) of a forward and of a step, by replay and with the host."""
    for what, call in (("forward", case.forward), ("step", case.step)):
        least = 1 if device == "cpu" else 20
        if device != "cpu":
            yield (
                f"{what} graph",
                timing.milliseconds(timing.as_graph(call), device, budget_ms, 20)[0],
            )
        yield f"{what} eager", timing.milliseconds(call, device, budget_ms, least)[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ("bf16x6", "tf32x3", "ieee")
    parser.add_argument("--precision", nargs="+", choices=choices, default=["bf16x6"])
    parser.add_argument("--calls", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--budget", type=float, default=200.0, help="ms for each number (200)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, also on a CPU")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit(
            "ngt_calls: expected a CUDA device, got a CPU; --quick shows that it works"
        )
    shapes = ((1, 2, 48),) if options.quick else SHAPES
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}; ms, medians")
    for precision in options.precision:
        problem.MIXED_PRECISION = precision
        print(f"q.k by {precision}")
        for call in options.calls:
            if call != "sdpa":
                found = errors(call, 48 if options.quick else 384, device)
                print(f"  {call} errors: " + ", ".join(f"{n} {e:.1e}" for n, e in found.items()))
        for shape in shapes:
            for call in options.calls:
                times = measure(make_case(call, shape, device), device, options.budget)
                row = ", ".join(f"{what} {ms:.4f}" for what, ms in times)
                print(f"  {shape!s:16s} {call:10s} {row}", flush=True)


if __name__ == "__main__":
    main()
