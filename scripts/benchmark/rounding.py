"""How many digits of the score survive: the expanded distance under different roundings, on a CPU.

Prints the tables of gravity_hf/ops/README.md, section "Rounding". TF32 and bfloat16 products are
emulated: operands rounded to 10 or 7 stored bits of mantissa, products and sums in float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gravity_hf.ops.chunked import augment  # noqa: E402

WIDTH, ROWS = 64, 512


def keep_bits(x: Tensor, bits: int) -> Tensor:
    """float32 rounded to nearest (ties to even) with `bits` stored bits of mantissa."""
    if bits == 23:
        return x
    drop = 23 - bits
    raw = x.contiguous().view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return ((raw + half) >> drop << drop).view(torch.float32)


def expanded(q: Tensor, k: Tensor, eps: float, bits: int = 23) -> Tensor:
    """`max(|q|^2 + |k|^2 - 2 q.k, 0) + eps`, operands of the product rounded to `bits`."""
    product = keep_bits(q, bits) @ keep_bits(k, bits).mT
    norms = q.square().sum(-1)[:, None] + k.square().sum(-1)[None]
    return (norms - 2 * product).clamp(min=0) + eps


def augmented(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """The chunked implementation's single product."""
    eps_h = torch.tensor([eps], dtype=q.dtype)
    query, key = augment(q[None, None], k[None, None], eps_h, None)
    return (query @ key.mT)[0, 0].clamp(min=eps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    q = torch.randn(ROWS, WIDTH, generator=generator)
    noise = torch.randn(ROWS, WIDTH, generator=generator)
    families = {
        "random": noise,
        "k = q + 0.1 noise": q + 0.1 * noise,
        "k = q + 0.01 noise": q + 0.01 * noise,
        "k = q": q.clone(),
    }
    columns = {
        "float32": lambda k, e: expanded(q, k, e),
        "float32, augmented": lambda k, e: augmented(q, k, e),
        "TF32 products": lambda k, e: expanded(q, k, e, bits=10),
        "bfloat16 products": lambda k, e: expanded(q, k, e, bits=7),
    }
    print(
        f"torch {torch.__version__}, CPU, width {WIDTH}, {ROWS} queries and keys, standard normal"
    )
    print("Largest relative error of the force score M^2 / (d^2 + eps):\n")
    print("| keys | eps | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for family, k in families.items():
        for eps in (0.1, 1e-3, 1e-6):
            exact = (q.double()[:, None] - k.double()[None]).square().sum(-1) + eps
            errors = [(exact / f(k, eps).double() - 1).abs().max().item() for f in columns.values()]
            print(f"| {family} | {eps:g} | " + " | ".join(f"{x:.0e}" for x in errors) + " |")


if __name__ == "__main__":
    main()
