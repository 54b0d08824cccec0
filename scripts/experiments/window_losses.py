"""Losses of single windows, with logits in float32 that are never all there at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gravity_hf.training.measures import evaluating

# Tokens whose logits are held at a time.
ROWS = 1024
_TOLERANCE = 1e-3


def window_losses(model: Any, batches: Iterable[Tensor], rows: int = ROWS) -> list[float]:
    """Next-token loss of each window, in nats per token; logits are products in float32.

    Args:
        model: a causal language model whose logits are its head's, of any dtype.
        batches: ids `[B, T]`.
        rows: tokens whose logits are held at a time, `rows * vocabulary` numbers.

    Raises:
        ValueError: a model that does more to its logits than its head does.
    """
    found: list[float] = []
    with evaluating(model), wide_head(model) as head:
        for ids in batches:
            ids = ids.to(model.device)
            states, last = _states(model, ids)
            if not torch.allclose(head(states[:, -1:]).float(), last, atol=_TOLERANCE, rtol=1e-3):
                raise ValueError(
                    f"window_losses: expected logits that are those of the head, got a "
                    f"{type(model).__name__}, which scales or caps them"
                )
            for of_window, of_text in zip(states[:, :-1], ids[:, 1:], strict=True):
                total = sum(
                    nn.functional.cross_entropy(head(x).float(), asked, reduction="sum").double()
                    for x, asked in zip(of_window.split(rows), of_text.split(rows), strict=True)
                )
                found.append(float(total) / of_text.numel())
    return found


@contextlib.contextmanager
def wide_head(model: Any) -> Iterator[nn.Module]:
    """The model's head, which for a while multiplies in float32, whatever its weights are in."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a head that is a linear map, got {type(head).__name__}")

    def widened(module: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.float()
        return nn.functional.linear(given[0].float(), module.weight.float(), bias)

    narrow = head.weight.dtype in (torch.bfloat16, torch.float16)
    handle = head.register_forward_hook(widened) if narrow else None
    try:
        yield head
    finally:
        if handle is not None:
            handle.remove()


def _states(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states `[B, T, d]`, and the model's own logits of the last token."""
    seen = []
    hook = model.base_model.register_forward_hook(lambda *given: seen.append(given[-1][0]))
    try:
        output = model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[-1], output.logits.float()
