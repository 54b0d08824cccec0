"""Loading tiles of queries and keys, which may be one tensor for all heads or batch entries.

`SHARED` as `problem.Problem.shared` has it: 1 where all heads have the same vectors, 2 where all
batch entries do, 3 where both. Such dimensions are of size 1 in the descriptor.
"""

from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
@triton.jit
def load_vectors(
    desc, batch, head, first, SHARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """`[ROWS, WIDTH]` from row `first` on."""
    if SHARED >= 2:
        batch = batch * 0
    if SHARED % 2 == 1:
        head = head * 0
    return desc.load([batch, head, first, 0]).reshape(ROWS, WIDTH)


@triton.jit
def vectors_row(batch, head, heads, SHARED: tl.constexpr):
    """Which row of `[batch entries * heads, T]` belongs to these vectors."""
    if SHARED == 0:
        return batch * heads + head
    elif SHARED == 1:
        return batch
    elif SHARED == 2:
        return head
    else:
        return head * 0
