"""A gated feed-forward layer of which only each token's chosen blocks of neurons are computed.

    h = activation(z_gate W_gate' + b_gate) * (z_up W_up' + b_up),   y = h W_down'

where `h` is 0 outside the chosen blocks. The inputs `z` are those of the layer, or of the second
factors of its maps where they are low-rank. All implementations give the numbers of the dense layer
with a mask, up to rounding, and the gradients of inputs, weights and biases:

- "rows": token by token, the views of its blocks. For a token or a few on a CPU.
- "gathered": each token's weights are copied together, then batched products. Without looking at
  the choice on the host: for a token or a few on a GPU.
- "grouped": block by block, the tokens that chose it (as a mixture of experts does it); without
  second derivatives. The groups are padded to a multiple of eight rows: as measured with MKL, one
  row's result then depends neither on how many rows there are nor on its place, so that a token's
  numbers do not depend on which others chose with it, to the last bit; blocks of fewer than four
  neurons excepted.
- "grouped_mm": the same in `torch.nn.functional.grouped_mm`, without looking at the choice on the
  host. bfloat16 on a CUDA device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATIONS = ("rows", "gathered", "grouped", "grouped_mm")
_MULTIPLE = 8


class BlockWeights(NamedTuple):
    """Weights of the maps whose blocks are chosen, or their gradients: None where none is needed.

    gate, up: `[F, a]`, `[F, c]`; down: `[o, F]`; gate_bias, up_bias: `[F]` or None.
    """

    gate: Any
    up: Any
    down: Any
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    def block(self, index: int, size: int) -> BlockWeights:
        """Views of block `index` of `size` neurons."""
        rows = slice(index * size, (index + 1) * size)
        gate, up, gate_bias, up_bias = (
            None if x is None else x[rows]
            for x in (self.gate, self.up, self.gate_bias, self.up_bias)
        )
        down = None if self.down is None else self.down[:, rows]
        return BlockWeights(gate, up, down, gate_bias, up_bias)


Activation = Callable[[Tensor], Tensor]


def block_feed_forward(
    gate_in: Tensor,
    up_in: Tensor,
    weights: BlockWeights,
    chosen: Tensor,
    *,
    block_size: int,
    activation: Activation,
    impl: str,
) -> Tensor:
    """`y` `[N, o]`, see the module.

    Args:
        gate_in, up_in: `[N, a]`, `[N, c]`, of the dtype of the weights.
        chosen: `[N, keep]` integers, the blocks of each token, each at most once.
        activation: elementwise.
        impl: one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: another `impl`; sizes that do not fit.
    """
    if impl not in _RUN:
        raise ValueError(
            f"block_feed_forward: impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
        )
    if weights.gate.shape[0] % block_size or len(gate_in) != len(chosen):
        raise ValueError(
            "block_feed_forward: expected a multiple of block_size neurons and a choice per token, "
            f"got {weights.gate.shape[0]} neurons, block_size {block_size}, {len(gate_in)} tokens "
            f"and {len(chosen)} choices"
        )
    if not len(gate_in):
        return gate_in.new_zeros(0, weights.down.shape[0])
    return _RUN[impl](gate_in, up_in, weights, chosen, block_size, activation)


def _one_block(
    gate_in: Tensor, up_in: Tensor, weights: BlockWeights, activation: Activation
) -> Tensor:
    gate = F.linear(gate_in, weights.gate, weights.gate_bias)
    return F.linear(activation(gate) * F.linear(up_in, weights.up, weights.up_bias), weights.down)


def _rows(
    gate_in: Tensor,
    up_in: Tensor,
    weights: BlockWeights,
    chosen: Tensor,
    block_size: int,
    activation: Activation,
) -> Tensor:
    outputs = []
    tokens = zip(gate_in.split(1), up_in.split(1), chosen.tolist(), strict=True)
    for gate_row, up_row, blocks in tokens:
        parts = [
            _one_block(gate_row, up_row, weights.block(b, block_size), activation) for b in blocks
        ]
        outputs.append(torch.stack(parts).sum(0))
    return torch.cat(outputs)


def _gathered(
    gate_in: Tensor,
    up_in: Tensor,
    weights: BlockWeights,
    chosen: Tensor,
    block_size: int,
    activation: Activation,
) -> Tensor:
    tokens = len(chosen)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken = weight.unflatten(0, (-1, block_size))[chosen].flatten(1, 2)
        result = torch.bmm(taken, rows.unsqueeze(-1)).squeeze(-1)
        if bias is None:
            return result
        return result + bias.unflatten(0, (-1, block_size))[chosen].flatten(1)

    hidden = activation(product(gate_in, weights.gate, weights.gate_bias))
    hidden = hidden * product(up_in, weights.up, weights.up_bias)
    # [o, N, keep, block_size]
    down = weights.down.unflatten(1, (-1, block_size))[:, chosen]
    return torch.bmm(
        down.reshape(-1, tokens, hidden.shape[1]).transpose(0, 1), hidden.unsqueeze(-1)
    ).squeeze(-1)


class _Groups(NamedTuple):
    """Tokens in the order of their blocks. `tokens` `[padded]`: token 0 where a group is padded.
    `counts`, `padded`: of each block."""

    tokens: Tensor
    counts: list[int]
    padded: list[int]

    def of_blocks(self) -> Iterator[tuple[int, Tensor, int]]:
        """(block, its tokens with padding, how many are real), blocks without any left out."""
        starts = itertools.accumulate(self.padded, initial=0)
        for block, (start, count) in enumerate(zip(starts, self.counts, strict=False)):
            if count:
                yield block, self.tokens[start : start + self.padded[block]], count


def _grouped_tokens(chosen: Tensor, blocks: int) -> _Groups:
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=blocks)
    padded = (counts + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    shift = (padded - counts).cumsum(0) - (padded - counts)
    places = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    sizes = padded.tolist()
    tokens = flat.new_zeros(sum(sizes))
    tokens[places] = order // chosen.shape[1]
    return _Groups(tokens, counts.tolist(), sizes)


class _Grouped(torch.autograd.Function):
    """Block by block, forward and backward: neither keeps more than a block's intermediates."""

    @staticmethod
    def forward(
        ctx: Any, groups: _Groups, size: int, activation: Activation, *tensors: Tensor | None
    ) -> Tensor:
        ctx.groups, ctx.size, ctx.activation = groups, size, activation
        ctx.save_for_backward(*tensors)
        gate_in, up_in, *rest = tensors
        weights = BlockWeights(*rest)
        y = gate_in.new_zeros(len(gate_in), weights.down.shape[0])
        for block, tokens, count in groups.of_blocks():
            gate_rows = gate_in.index_select(0, tokens)
            up_rows = gate_rows if up_in is gate_in else up_in.index_select(0, tokens)
            part = _one_block(gate_rows, up_rows, weights.block(block, size), activation)
            y.index_add_(0, tokens[:count], part[:count])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # With create_graph=True; torch's `once_differentiable` lets `torch.autograd.grad` pass.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'block_feed_forward: impl "grouped" has no second derivatives, got a backward pass '
                'with create_graph=True. Use impl "rows", or the policy "masked" of the layer'
            )
        # Read once: under gradient checkpointing they can be had once only.
        saved = ctx.saved_tensors
        gate_in, up_in, *rest = saved
        needed = ctx.needs_input_grad[3:]
        sums = [
            torch.zeros_like(x) if need else None for x, need in zip(saved, needed, strict=True)
        ]
        weight_sums = BlockWeights(*sums[2:])
        for block, tokens, count in ctx.groups.of_blocks():
            real = tokens[:count]
            leaves = [gate_in.index_select(0, real), up_in.index_select(0, real)]
            leaves += BlockWeights(*rest).block(block, ctx.size)
            found = _local_gradients(leaves, needed, grad.index_select(0, real), ctx.activation)
            for total, part in zip(sums[:2], found[:2], strict=True):
                if total is not None:
                    total.index_add_(0, real, part)
            for total, part in zip(weight_sums.block(block, ctx.size), found[2:], strict=True):
                if total is not None:
                    total.add_(part)
        return None, None, None, *sums


def _local_gradients(
    leaves: list[Tensor | None], needed: tuple[bool, ...], grad: Tensor, activation: Activation
) -> list[Tensor | None]:
    """Gradients of one block with respect to its leaves; None where none is needed."""
    inputs = [
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip(leaves, needed, strict=True)
    ]
    with torch.enable_grad():
        y = _one_block(inputs[0], inputs[1], BlockWeights(*inputs[2:]), activation)
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad))
    return [next(found) if need else None for need in needed]


def _grouped(
    gate_in: Tensor,
    up_in: Tensor,
    weights: BlockWeights,
    chosen: Tensor,
    block_size: int,
    activation: Activation,
) -> Tensor:
    groups = _grouped_tokens(chosen, weights.gate.shape[0] // block_size)
    return _Grouped.apply(groups, block_size, activation, gate_in, up_in, *weights)


def _grouped_mm(
    gate_in: Tensor,
    up_in: Tensor,
    weights: BlockWeights,
    chosen: Tensor,
    block_size: int,
    activation: Activation,
) -> Tensor:
    tokens, keep = chosen.shape
    blocks = weights.gate.shape[0] // block_size
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    # Without bincount, which waits for the device.
    ends = torch.zeros(blocks, dtype=torch.int32, device=flat.device)
    ends = ends.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0)
    ends = ends.to(torch.int32)
    rows, sorted_blocks = order // keep, flat[order]

    def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight.unflatten(0, (blocks, block_size)).transpose(1, 2)
        result = F.grouped_mm(inputs[rows], matrices, offs=ends)
        return result if bias is None else result + bias.unflatten(0, (blocks, -1))[sorted_blocks]

    hidden = activation(product(gate_in, weights.gate, weights.gate_bias))
    hidden = hidden * product(up_in, weights.up, weights.up_bias)
    matrices = weights.down.unflatten(1, (blocks, block_size)).permute(1, 2, 0)
    parts = F.grouped_mm(hidden, matrices, offs=ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    return parts[place].unflatten(0, (tokens, keep)).sum(1)


_RUN: dict[str, Callable[..., Tensor]] = {
    "rows": _rows,
    "gathered": _gathered,
    "grouped": _grouped,
    "grouped_mm": _grouped_mm,
}
