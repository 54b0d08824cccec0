"""What a hard cutoff saves by skipping tiles out of reach: time and share of tiles, by radius.

    python scripts/benchmark/cutoff_blocks.py            # CUDA: results/cutoff_blocks.json
    python scripts/benchmark/cutoff_blocks.py --quick    # tiny, also on a CPU; writes nothing

Coordinates: `ordered` along the sequence, as positions are, `clusters` of 128 neighbouring tokens,
`random` ones, where no tile is out of reach until hardly a pair is left. The law is the force with
masses, float32 coordinates 16 wide and values 64 wide in bfloat16, causal. A radius is given by the
share of causal pairs that it leaves. Compared with: the same call without a cutoff (`none`), with
the cutoff but no skipping (`kept`), and SDPA with heads 64 wide (`sdpa`). ms, median and 20th and
80th percentile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timing
from results import conditions
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.hub.card_public import public
from gravity_hf.ops.cutoff import Cutoff
from gravity_hf.ops.triton import gravity_attention_triton, reach
from gravity_hf.training.files import write_json

OUTPUT = Path(__file__).resolve().parent / "results" / "cutoff_blocks.json"
KINDS = ("ordered", "clusters", "random")
LENGTHS = (512, 1024, 2048, 4096, 8192)
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02)
TOKENS, HEADS = 16384, 8
COORDINATES, VALUES, TILE, CLUSTER = 16, 64, 64, 128
Leaves = dict[str, Tensor]


def coordinates(
    kind: str, batch: int, length: int, heads: int, generator: torch.Generator
) -> Tensor:
    """`[B, T, H, 16]`."""
    noise = torch.randn(batch, length, heads, COORDINATES, generator=generator)
    if kind == "random":
        return noise
    place = torch.arange(length)
    if kind == "clusters":
        count = -(-length // CLUSTER)
        centres = torch.randn(batch, count, heads, COORDINATES, generator=generator)
        return 4.0 * centres[:, place // CLUSTER] + 0.5 * noise
    path = torch.zeros(length, COORDINATES)
    path[:, 0] = place / 64.0
    return path[None, :, None, :] + 0.1 * noise


def radii(c: Tensor, shares: tuple[float, ...]) -> list[float]:
    """For each share the radius that leaves it of the causal pairs, from some rows of one head."""
    points = c[0, :, 0].double()
    rows = torch.linspace(1, len(points) - 1, min(256, len(points) - 1)).long()
    seen = torch.arange(len(points)) <= rows[:, None]
    distances = torch.cdist(points[rows], points)[seen]
    return [distances.quantile(share).item() for share in shares]


def leaves_of(kind: str, length: int, device: str) -> Leaves:
    generator = torch.Generator().manual_seed(0)
    # The interpreter, on a CPU, takes seconds for a tile.
    batch, heads = (1, 1) if device == "cpu" else (max(1, TOKENS // length), HEADS)
    c = coordinates(kind, batch, length, heads, generator)
    v = torch.randn(batch, length, heads, VALUES, generator=generator).bfloat16()
    masses = 0.5 + torch.rand(batch, heads, length, generator=generator)
    tensors = {"c": c, "v": v, "mass": torch.ones(heads), "masses": masses}
    return {name: x.to(device).requires_grad_() for name, x in tensors.items()}


def gravity(leaves: Leaves, radius: float | None) -> Callable[[], Tensor]:
    q, v, masses = leaves["c"].transpose(1, 2), leaves["v"].transpose(1, 2), leaves["masses"]
    eps = torch.full_like(leaves["mass"], 0.1)
    cutoff = None
    if radius is not None:
        cutoff = Cutoff(torch.full_like(leaves["mass"], radius).requires_grad_(), "hard")
    terms = {"query_mass": masses, "key_mass": masses, "cutoff": cutoff, "causal": True}
    return lambda: gravity_attention_triton(q, q, v, leaves["mass"], eps=eps, **terms)


def sdpa(leaves: Leaves) -> Callable[[], Tensor]:
    # Values in all three places: what is compared is time.
    v = leaves["v"].transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(v, v, v, is_causal=True)


def times(run: Callable[[], Tensor], leaves: Leaves, device: str, budget: float) -> dict[str, Any]:
    """Of the forward alone and of forward and backward; that computes all gradients, whichever are
    asked for."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(),)

    def step() -> tuple[Tensor, ...]:
        output = run()
        return torch.autograd.grad(output, leaves["v"], torch.ones_like(output))

    found: dict[str, Any] = {}
    for what, call in (("forward", forward), ("step", step)):
        measured = timing.milliseconds(call, device, budget, 1 if device == "cpu" else 20)
        names = (f"{what}_ms", f"{what}_p20_ms", f"{what}_p80_ms")
        found |= dict(zip(names, measured, strict=True))
    return found


def skipped_share(leaves: Leaves, radius: float) -> float:
    """Of the tiles that a causal mask leaves."""
    q = leaves["c"].detach().transpose(1, 2)
    limits = torch.full_like(leaves["mass"], radius)
    _, counts = reach.lists_of(q, q, limits, TILE, TILE, causal=True)
    blocks = -(-q.shape[2] // TILE)
    return 1.0 - counts.double().sum().item() / (counts[..., 0].numel() * blocks * (blocks + 1) / 2)


def measure(kind: str, length: int, device: str, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of one kind and length."""
    leaves = leaves_of(kind, length, device)
    shares = SHARES[-1:] if options.quick else SHARES
    batch, _, heads, _ = leaves["c"].shape
    shape = {"kind": kind, "batch": batch, "heads": heads, "length": length}

    def row(call: str, run: Callable[[], Tensor], **known: Any) -> dict[str, Any]:
        return {**shape, "call": call, **known, **times(run, leaves, device, options.budget)}

    yield row("sdpa", sdpa(leaves))
    yield row("none", gravity(leaves, None))
    usual = reach.LEAST_KEYS
    try:
        for share, radius in zip(shares, radii(leaves["c"].detach().cpu(), shares), strict=True):
            known = {"visible_share": share, "radius": radius}
            reach.LEAST_KEYS = 1 << 30
            yield row("kept", gravity(leaves, radius), **known)
            reach.LEAST_KEYS = 0
            known["skipped_share"] = skipped_share(leaves, radius)
            yield row("skipped", gravity(leaves, radius), **known)
    finally:
        reach.LEAST_KEYS = usual


def in_words(row: dict[str, Any]) -> str:
    what = f"{row['kind']:9s} {row['length']:6d} {row['call']:8s}"
    if "visible_share" in row:
        what += f" {row['visible_share']:4.0%} of pairs,"
    if "skipped_share" in row:
        what += f" {row['skipped_share']:4.0%} of tiles skipped,"
    return f"{what} forward {row['forward_ms']:.3f} ms, step {row['step_ms']:.3f} ms"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=100.0, help="ms for each number (100)")
    parser.add_argument("--commit", help="where the tree is a copy without git")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--output", type=Path, help=f"JSON (default: {OUTPUT.name} in results/)")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit("cutoff_blocks: expected a CUDA device, got a CPU; try --quick")
    cases = [("ordered", 130)] if options.quick else [(k, n) for k in KINDS for n in LENGTHS]
    rows = []
    for kind, length in track(cases, "cutoff", disable=not sys.stderr.isatty()):
        for row in measure(kind, length, device, options):
            print(in_words(row), flush=True)
            rows.append(row)
    known = conditions(device, options.commit) | {
        "command": shlex.join(["python", "scripts/benchmark/cutoff_blocks.py", *given]),
        "settings": {"coordinates": COORDINATES, "values": VALUES, "tile": TILE},
        "quick": options.quick,
    }
    if output := options.output or (None if options.quick else OUTPUT):
        print(f"written to {write_json(output, public({'conditions': known, 'rows': rows}))}")


if __name__ == "__main__":
    main()
