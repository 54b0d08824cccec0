"""Which implementation a call gets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exporting import is_exporting
from .flex import flex_refusal
from .masked import needs_gradient
from .scores import Score
from .selecting import Selection
from .triton import FEW_QUERIES, routed_refusal

# Blocks of fewer keys than this make products too thin for `routed`.
THIN_BLOCK = 8
# From this many keys on, what is not selected costs more than selecting, on a CPU.
LONG = 1024


def choose_implementation(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> str:
    """What `impl="auto"` means.

    On a CPU. Measured on one core of an AMD EPYC, 8 heads of width 64 in float32, random vectors
    that screen themselves, as multiples of the time of dense attention without a mask:

    | keys | block_size, top_k | dot product | gravity, law "power" |
    |---|---|---|---|
    | 2048 | 32, 256 | 1.4 | 0.9 |
    | 4096 | 32, 256 / 32, 512 / 64, 512 | 0.9 / 1.2 / 0.8 | 0.5 / 0.8 / 0.5 |
    | 8192 | 32, 256 / 32, 512 / 64, 512 | 0.5 / 0.7 / 0.6 | 0.2 / 0.4 / 0.3 |

    Below 1024 keys dense attention under a mask is faster than `routed`; blocks of single keys save
    nothing at these lengths, as choosing them alone takes as long as dense attention. A decoding
    step takes a seventh of the dense one at 32768 keys, where the cache keeps `means`, and as long
    as it at 4096. `KeyBudget.min_length` keeps shorter contexts dense.

    On a GPU few queries go to `fused` before this is asked, which chooses and attends in two
    kernels, and `triton` does the work of the chosen pairs alone, its gradients too. At 8192 tokens
    in bfloat16 on an H200, 16 heads to 4, 256 keys in blocks of 32, dot product and gravity
    (`scripts/benchmark/sparse_attention.py`): a decoding step of one layer took 0.34 and 0.22 ms
    with `fused`, a training step 3.4 and 3.5 ms with `triton`; at earlier commits they took 2.1 and
    1.8 ms with `gathered`, and 21 ms with `flex` and 20 ms with `masked`. The tiles of `flex` hold
    the choices of 128 queries together, which are most of a few thousand keys. Whatever neither
    serves is dense attention under the selection as a mask: the numbers are those of the chosen
    keys, time and arithmetic those of all. `routed` starts thousands of small kernels there and
    waits for each head: a training step of gravity at 8192 tokens took 2.4 s with it.
    """
    if is_exporting():
        return "reference"
    budget, queries, keys = selection.budget, q.shape[2], k.shape[2]
    if queries <= FEW_QUERIES:
        return "gathered"
    if torch.compiler.is_compiling():
        return "masked"
    if q.device.type == "cuda":
        call = (q, k, v, score, selection, dropout_p)
        if budget.block_size >= THIN_BLOCK and routed_refusal(*call) is None:
            return "triton"
        if flex_refusal(*call) is None:
            return "flex"
    if q.device.type != "cpu":
        return "masked"
    if keys < LONG:
        return "masked"
    if budget.block_size >= THIN_BLOCK:
        plain = selection.visible.bias is None and dropout_p == 0
        return "routed" if plain else "masked"
    # What is gathered would be kept for the gradient.
    return "masked" if needs_gradient(q, k, v, score) else "gathered"
