"""Reading codes of `RotatedCodec` in one launch: taken apart, scaled, turned back, written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import interpreted
from .score import product

# The turning matrix of wider heads does not fit beside a tile.
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# fmt: off
@triton.jit
def read_codes_kernel(
    codes, codes_b, codes_h, codes_row, ranges, ranges_b, ranges_h, ranges_row, turn, out, out_b,
    out_h, out_row, heads, tokens, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    LOWEST: tl.constexpr, STEPS: tl.constexpr, IN_BYTE: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):
    """One program reads BLOCK tokens of one head."""
    batch_head = tl.program_id(1)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = rows[:, None] < tokens
    columns = tl.arange(0, WIDTH)
    # Byte j holds codes j, j + SIZE, ...
    SIZE: tl.constexpr = WIDTH * BITS // 8
    MOST: tl.constexpr = 2**BITS - 1
    at = codes + batch * codes_b + head * codes_h + rows[:, None] * codes_row
    byte = tl.load(at + (columns % SIZE)[None, :], mask=inside, other=0).to(tl.int32)
    code = (byte >> ((columns // SIZE) * BITS)[None, :]) & MOST  # [BLOCK, WIDTH]
    at = ranges + batch * ranges_b + head * ranges_h + rows[:, None] * ranges_row
    at += (columns // GROUP * 2)[None, :]
    first = tl.load(at, mask=inside, other=0).to(tl.float32)
    second = tl.load(at + 1, mask=inside, other=0).to(tl.float32)
    if IN_BYTE:
        first = tl.exp2(first / STEPS + LOWEST)
        second = second * first * (-MOST / 255)
    value = (code.to(tl.float32) * first + second).to(out.dtype.element_ty)
    if ROTATED:
        back = tl.load(turn + columns[None, :] * WIDTH + columns[:, None])  # transposed
        zeros = tl.zeros([BLOCK, WIDTH], tl.float32)
        value = product(value, back, zeros, "ieee", NATIVE).to(out.dtype.element_ty)
    at = out + batch * out_b + head * out_h + rows[:, None] * out_row + columns[None, :]
    tl.store(at, value, mask=inside)


# fmt: on


def read_codes(
    codes: Tensor,
    ranges: Tensor,
    turn: Tensor | None,
    out: Tensor,
    *,
    bits: int,
    group: int,
    lowest: int,
    steps: int,
) -> None:
    """`RotatedCodec.dequantize` into `out` `[B, H, T, width]`, whose rows may be those of something
    larger. turn: `[width, width]` in the dtype of `out`; None turns nothing. lowest, steps: of
    scales that are kept in a byte."""
    batch, heads, tokens, width = out.shape
    if not out.numel():
        return
    codes, ranges = codes.contiguous(), ranges.flatten(-2).contiguous()
    # Few bytes for each token, so that many tokens are read at once.
    block = 64 if width <= 64 else 32
    grid = (triton.cdiv(tokens, block), batch * heads)
    read_codes_kernel[grid](
        codes,
        *codes.stride()[:3],
        ranges,
        *ranges.stride()[:3],
        codes if turn is None else turn.contiguous(),
        out,
        *out.stride()[:3],
        heads,
        tokens,
        BITS=bits,
        WIDTH=width,
        GROUP=group,
        LOWEST=lowest,
        STEPS=steps,
        IN_BYTE=ranges.dtype == torch.uint8,
        ROTATED=turn is not None,
        BLOCK=block,
        NATIVE=not interpreted(),
        num_warps=4,
    )
