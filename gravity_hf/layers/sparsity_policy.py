"""One switch for everything sparse in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .sparse_feed_forward import POLICIES, SparseFeedForward

ATTENTION_POLICIES = ("dense", "sparse")


@contextmanager
def sparsity(
    model: nn.Module, *, feed_forward: str | None = None, attention: str | None = None
) -> Iterator[nn.Module]:
    """Other policies inside; afterwards each module has the one it had.

    >>> with sparsity(model, feed_forward="dense", attention="dense"):
    ...     reference = model(**batch).logits

    Args:
        feed_forward: "dense", "masked" or "block", of every `SparseFeedForward`.
        attention: "dense" or "sparse", of every module with an `attention_policy`.

    Yields:
        The model.

    Raises:
        ValueError: another policy, or one for what the model has none of.
    """
    _check("feed_forward", feed_forward, POLICIES)
    _check("attention", attention, ATTENTION_POLICIES)
    layers = [m for m in model.modules() if isinstance(m, SparseFeedForward)]
    heads = [m for m in model.modules() if hasattr(m, "attention_policy")]
    for name, policy, found, how in (
        ("feed_forward", feed_forward, layers, "sparsify_feed_forward"),
        ("attention", attention, heads, "sparsify_attention"),
    ):
        if policy is not None and not found:
            raise ValueError(
                f"sparsity: {name}={policy!r}: expected a model with sparse {name} layers, got "
                f"{type(model).__name__} without any. Call {how}(model) first"
            )
    before = [(m, "policy", m.policy) for m in layers if feed_forward is not None]
    before += [(m, "attention_policy", m.attention_policy) for m in heads if attention is not None]
    try:
        for module, name, _ in before:
            setattr(module, name, feed_forward if name == "policy" else attention)
        yield model
    finally:
        for module, name, policy in before:
            setattr(module, name, policy)


def _check(name: str, policy: str | None, known: tuple[str, ...]) -> None:
    if policy is not None and policy not in known:
        raise ValueError(
            f"sparsity: {name}: expected one of {', '.join(known)} or None, got {policy!r}"
        )
