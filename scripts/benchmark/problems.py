"""What is measured: shapes, cases, and the tensors of a case."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORKS = ("forward", "backward", "forward+backward")
LAUNCHES = ("eager", "graph")
# Gravity-2's constants: softplus(0.5) and 0.1.
MASS, EPS = 0.974, 0.1


@dataclass(frozen=True)
class Shape:
    """`q` `[batch, heads, queries, width]`, `k` and `v` `[batch, kv_heads, keys, width]`. Causal
    rows are aligned at the last key, as in generation."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    causal: bool = True

    @property
    def is_decoding(self) -> bool:
        return self.queries < self.keys and self.queries <= 16

    def label(self) -> str:
        queries = "" if self.queries == self.keys else f" Q{self.queries}"
        heads = f"H{self.heads} HKV{self.kv_heads}"
        return f"B{self.batch} {heads}{queries} T{self.keys} D{self.width}"


@dataclass(frozen=True)
class Case:
    """One row: `law` is "dot" and `distance` is "-" for dot-product attention. `launch` "graph"
    times replays of a CUDA graph, which leaves the host's part out."""

    provider: str
    law: str
    distance: str
    work: str
    shape: Shape
    launch: str = "eager"

    def label(self) -> str:
        name = f"{self.provider:<19} {self.law:<5} {self.distance:<9}"
        work = self.work if self.launch == "eager" else f"{self.work}, graph"
        return f"{self.shape.label():<32} {work:<16} {name}"


@dataclass
class Problem:
    """The tensors of a case. `eps` `[H]`; `key_radius_sq` `[Hkv]` for lifted keys; `cotangent` is
    the gradient that reaches the output."""

    shape: Shape
    law: str
    q: Tensor
    k: Tensor
    v: Tensor
    mass: Tensor
    eps: Tensor
    key_radius_sq: Tensor | None
    cotangent: Tensor

    def double(self) -> Problem:
        """The same numbers in float64."""
        tensors = {n: x.detach().double() for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def leaves(self) -> list[Tensor]:
        """What gets a gradient: q, k, v, and for gravity the masses."""
        named = [self.q, self.k, self.v]
        return named if self.law == "dot" else [*named, self.mass]


def make_problem(
    case: Case,
    device: str,
    dtype: torch.dtype,
    mass: float = MASS,
    eps: float = EPS,
    seed: int = 0,
) -> Problem:
    """Standard normal q, k, v; masses spread by a quarter around `mass`. Lifted keys: the radius is
    the longest key of the head."""
    shape = case.shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        size = (shape.batch, heads, length, shape.width)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    q, k = normal(shape.heads, shape.queries), normal(shape.kv_heads, shape.keys)
    spread = torch.rand(shape.heads, generator=generator, device=device) / 2 + 0.75
    lifted = case.distance == "lifted"
    return Problem(
        shape=shape,
        law=case.law,
        q=q,
        k=k,
        v=normal(shape.kv_heads, shape.keys),
        mass=mass * spread,
        eps=torch.full((shape.heads,), eps, device=device),
        key_radius_sq=k.float().square().sum(-1).amax((0, 2)) if lifted else None,
        cotangent=normal(shape.heads, shape.queries),
    )


def sharp_constants(law: str, width: int) -> tuple[float, float]:
    """Mass and softening under which the scores of a row differ by about 1.5, so that a wrong score
    shows in the output. `|q - k|^2` of normal vectors is 2 D, give or take `sqrt(2 / D)` of it."""
    strength = 1.5 * math.sqrt(width / 2)
    return math.sqrt(strength * (2 * width if law == "force" else 1)), 1.0


@functools.lru_cache(maxsize=2)
def visible(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool `[Tq, Tk]`: the keys that a causal row sees."""
    last = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device) <= last
