"""Where skipping blocks of neurons takes less time than computing all of them.

Measured by `scripts/benchmark/feed_forward.py`. On one core of an AMD EPYC in float32 the time of
"grouped" against that of the masked layer goes by the products that a block saves over all tokens,
whatever the shape: a block costs some calls, and has to save enough. The smallest number of tokens
from which it was faster at sparsity 0.8, by the width of the maps that are cut into blocks (of
low-rank maps their rank) and the size of a block:

    width   block 32   block 64   block 128
    64         1024       1024         256
    512         256         64          64

For a single token "rows" was 1.9 times as fast as the masked layer with blocks of 64 at 512/2048,
2.3 times with blocks of 32 at 896/4864, and slower with low-rank maps of rank 64 and 112.
`CROSSOVERS` holds what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Crossover:
    """A device's rules. A product is one multiplication of a weight.

    many: the implementation for many tokens; many_products: that a block has to save, over all
    tokens, before it is used. few: the implementation for up to `few_tokens`; few_products: that
    every block which is kept has to save for each token; fixed_products: that each token has to
    save, besides.
    """

    many: str
    many_products: float
    few: str
    few_tokens: int
    few_products: float
    fixed_products: float


CROSSOVERS = {
    "cpu": Crossover("grouped", 4.8e6, "rows", 1, 1.2e5, 1e6),
    # Not measured yet: everything is computed.
    "cuda": Crossover("grouped_mm", math.inf, "gathered", 16, math.inf, math.inf),
}
# The fewest neurons of a block with which "grouped" gives a token the same bits beside any others.
_LEAST_BLOCK = 4
# These look at the choice on the host, which a graph that is being traced has not got.
_ON_THE_HOST = ("rows", "grouped")


def choose_implementation(
    device: str,
    dtype: torch.dtype,
    *,
    tokens: int,
    width: int,
    neurons: int,
    block_size: int,
    keep: int,
    traced: bool = False,
    aligned: bool = True,
) -> str | None:
    """The implementation of `block_feed_forward` for a call; None where the dense layer is faster.

    It depends on shapes alone, so that a token's numbers depend on no other token's choice.

    Args:
        device: its type. dtype: of the weights.
        tokens: rows of the call.
        width: of the maps' inputs and outputs other than neurons; the largest.
        neurons, block_size, keep: of the layer, and how many blocks a token keeps.
        traced: whether the call is being compiled.
        aligned: whether the inputs' and outputs' widths are multiples of 8.
    """
    rules = CROSSOVERS.get(device)
    if rules is None or not tokens or block_size < _LEAST_BLOCK:
        return None
    blocks = neurons // block_size
    # Of gate, up and down.
    saved = 3.0 * width * block_size * (blocks - keep)
    if tokens <= rules.few_tokens and saved >= rules.fixed_products + rules.few_products * keep:
        how = rules.few
    elif tokens * saved >= rules.many_products * blocks:
        how = rules.many
    else:
        return None
    # Its rows begin at multiples of 16 bytes.
    if how == "grouped_mm" and (dtype != torch.bfloat16 or block_size % 8 or not aligned):
        how = "grouped"
    return None if traced and how in _ON_THE_HOST else how
