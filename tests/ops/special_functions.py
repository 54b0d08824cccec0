"""The kernels' approximations, each over a vector."""

import torch
import triton
import triton.language as tl

from gravity_hf.ops.triton.score import (
    cosine,
    logarithm,
    power_of_two,
    reciprocal,
    sine,
    square_root,
)


@triton.jit
def _evaluate(x, y, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if FUNCTION == "reciprocal":
        value = reciprocal(value, True)
    elif FUNCTION == "power_of_two":
        value = power_of_two(value, True)
    elif FUNCTION == "square_root":
        value = square_root(value, True)
    elif FUNCTION == "cosine":
        value = cosine(value, True)
    elif FUNCTION == "sine":
        value = sine(value, True)
    else:
        value = logarithm(value, True)
    tl.store(y + at, value)


def evaluate(function: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _evaluate[(x.numel() // 1024,)](x, y, FUNCTION=function, BLOCK=1024)
    return y
