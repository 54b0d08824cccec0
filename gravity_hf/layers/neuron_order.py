"""The order of a feed-forward layer's neurons: which of them share a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sparse_feed_forward import SparseFeedForward, input_factor, output_factor

# Attribute of a layer that is not in its first order: at each place, the neuron's first index.
_ORDER = "neuron_order"


def co_active_order(activity: Tensor, block_size: int, *, rounds: int = 4) -> Tensor:
    """An order `[F]` of neurons in which those that are active together share a block.

    First halves of halves: a set of neurons is cut at the middle of its projection onto the
    direction in which the activities of its members vary most, until it is one block. Then some
    rounds of k-means whose clusters are the blocks and keep their size: nearest pairs of a neuron
    and a block come first, and a block that is full takes no more. The order is the same each time.

    Args:
        activity: `[F, samples]`, at least 0, such as `|h|` of some tokens; computed in float32.
        block_size: divides F.
        rounds: of k-means; one looks at each pair of a neuron and a block, on the CPU.
    """
    neurons = activity.shape[0]
    if block_size < 1 or neurons % block_size:
        raise ValueError(
            f"co_active_order: block_size: expected a divisor of {neurons} neurons, got "
            f"{block_size!r}"
        )
    rows = activity.float()
    order = torch.cat(_halved(torch.arange(neurons, device=rows.device), rows, block_size))
    for _ in range(rounds):
        centres = rows[order].unflatten(0, (-1, block_size)).mean(1)
        improved = _filled(torch.cdist(rows, centres), block_size)
        if torch.equal(improved, order):
            break
        order = improved
    return order


def reorder(layer: SparseFeedForward, order: Tensor) -> None:
    """Put neuron `order[i]` at place i, in place: rows of gate and up, columns of down. The layer
    computes what it did, up to rounding; its predictor has to be fitted again.

    Raises:
        ValueError: no order of its neurons, or maps that are not plain ones.
    """
    neurons = torch.arange(layer.intermediate_size, device=order.device)
    if order.shape != neurons.shape or not torch.equal(order.sort().values, neurons):
        raise ValueError(
            f"reorder: order: expected every index below {layer.intermediate_size} once, got "
            f"{tuple(order.shape)} others"
        )
    if not layer.can_skip():
        raise ValueError(
            "reorder: expected gate, up and down to be nn.Linear or LowRankLinear, got adapters, "
            "quantized or watched maps. Reorder first"
        )
    _permute(layer, order)
    before = vars(layer).get(_ORDER)
    vars(layer)[_ORDER] = order.clone() if before is None else before[order]


def restore_order(layer: SparseFeedForward) -> None:
    """Undo every `reorder`, bit for bit; nothing where there was none."""
    order = vars(layer).pop(_ORDER, None)
    if order is not None:
        _permute(layer, order.argsort())


@torch.no_grad()
def _permute(layer: SparseFeedForward, order: Tensor) -> None:
    for linear in (output_factor(layer.gate_proj), output_factor(layer.up_proj)):
        for parameter in (linear.weight, linear.bias):
            if isinstance(parameter, nn.Parameter):
                parameter.copy_(parameter[order.to(parameter.device)])
    down = input_factor(layer.down_proj).weight
    down.copy_(down[:, order.to(down.device)])


def _halved(members: Tensor, activity: Tensor, block_size: int) -> list[Tensor]:
    blocks = len(members) // block_size
    if blocks <= 1:
        return [members]
    rows = activity[members]
    # The longest axis of the cloud of neurons, in the space of samples.
    centred = rows - rows.mean(0)
    axis = _first_axis(centred)
    ranked = members[(centred @ axis).argsort(stable=True)]
    cut = blocks // 2 * block_size
    return [
        *_halved(ranked[:cut], activity, block_size),
        *_halved(ranked[cut:], activity, block_size),
    ]


def _filled(distances: Tensor, block_size: int) -> Tensor:
    """An order of neurons with the blocks filled from the nearest pair on; `[F, blocks]`."""
    neurons, blocks = distances.shape
    block_of, room = [-1] * neurons, [block_size] * blocks
    for pair in distances.flatten().argsort(stable=True).tolist():
        neuron, block = divmod(pair, blocks)
        if block_of[neuron] < 0 < room[block]:
            block_of[neuron] = block
            room[block] -= 1
    return torch.tensor(block_of, device=distances.device).argsort(stable=True)


def _first_axis(centred: Tensor, steps: int = 30) -> Tensor:
    """The leading right singular vector, by power iteration from the longest row: the exact one is
    not needed, and would cost far more."""
    axis = centred[centred.square().sum(1).argmax()]
    for _ in range(steps):
        axis = centred.T @ (centred @ axis)
        axis = axis / axis.norm().clamp(min=torch.finfo(axis.dtype).tiny)
    return axis
