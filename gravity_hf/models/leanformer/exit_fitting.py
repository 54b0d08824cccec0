"""From which probability on a token may leave, found and measured on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...layers.modes import in_evaluation
from .causal_leanformer import LeanFormerForCausalLM

# How finely thresholds are looked for: so many shares of the probabilities that occur.
_CANDIDATES = 128


@dataclass(frozen=True)
class ExitReport:
    """What letting tokens leave changes, measured with tokens that leave.

    threshold: None: no token may leave. agreement: the share of tokens whose likeliest next token
    is that of all layers. mean_depth: layers that a token goes through, of `layers`. loss: in nats
    per token, and full_loss: that of all layers. tokens: how many it was measured on.
    """

    threshold: float | None
    agreement: float
    mean_depth: float
    layers: int
    loss: float
    full_loss: float
    tokens: int


@torch.no_grad()
def fit_exit_threshold(
    model: LeanFormerForCausalLM,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    agreement: float = 0.99,
    *,
    progress: bool | None = None,
) -> ExitReport:
    """Set `model.config.exit_threshold` to the lowest at which tokens still agree.

    One pass says which tokens would have left where, and rightly. As those who leave change what
    later tokens read, candidates are then tried with tokens that leave, until one agrees.

    Args:
        batches: token ids `[B, T]`, or dicts with `input_ids` and, for padding, `attention_mask`;
            text that the model was not trained on.
        agreement: the share of tokens, in (0, 1].
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: a model without an exit head, no batches, or another share.
    """
    if not 0 < agreement <= 1:
        raise ValueError(f"fit_exit_threshold: expected an agreement in (0, 1], got {agreement!r}")
    inputs = _inputs(model, batches, "fit_exit_threshold")
    with _bar("fit_exit_threshold", progress) as bar:
        candidates = _candidates(model, inputs, agreement, bar)
        # The higher the threshold the better they agree: the middle says where to go on.
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            report = _measured(model, inputs, candidates[middle], bar)
            low, high = (low, middle) if report.agreement >= agreement else (middle + 1, high)
        threshold = candidates[low] if low < len(candidates) else None
        model.config.exit_threshold = threshold
        return _measured(model, inputs, threshold, bar)


@torch.no_grad()
def measure_exits(
    model: LeanFormerForCausalLM,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    *,
    progress: bool | None = None,
) -> ExitReport:
    """What `model.config.exit_threshold` changes; arguments and errors as of
    `fit_exit_threshold`."""
    inputs = _inputs(model, batches, "measure_exits")
    with _bar("measure_exits", progress) as bar:
        return _measured(model, inputs, model.config.exit_threshold, bar)


def _candidates(
    model: LeanFormerForCausalLM, inputs: list[dict[str, Tensor]], agreement: float, bar: Any
) -> list[float]:
    """Rising thresholds, from the first on at which tokens that leave would have agreed, if all
    others had stayed."""
    found = []
    for batch in inputs:
        found.append(_sureness(model, batch))
        bar.update()
    sure, right = (torch.cat(x, 1) for x in zip(*found, strict=True))
    shares = torch.linspace(0, 1, _CANDIDATES)
    ordered = sure.flatten().sort().values
    places = (shares * (ordered.numel() - 1)).round().long()
    candidates = sorted(set(ordered[places].tolist()))
    for n, threshold in enumerate(candidates):
        leaves = sure >= threshold
        first = leaves.int().argmax(0, keepdim=True)
        agrees = right.gather(0, first)[0] | ~leaves.any(0)
        if agrees.double().mean() >= agreement:
            return candidates[n:]
    return []


def _sureness(model: LeanFormerForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """After each depth where tokens may leave: the head's probabilities, and whether the likeliest
    next token is that of all layers; `[n, tokens]`, on the CPU."""
    inner = model.model
    with in_evaluation(model), _leaving_at(model, None):
        states = inner(**batch, use_cache=False, output_hidden_states=True).hidden_states
    real = _real(batch)
    final = model.lm_head(states[-1]).argmax(-1)
    sure, right = [], []
    for depth in range(model.config.min_depth, model.config.num_hidden_layers):
        sure.append(inner.exit_head(states[depth], depth).float().sigmoid()[real])
        right.append((model.lm_head(inner.norm(states[depth])).argmax(-1) == final)[real])
    return torch.stack(sure).cpu(), torch.stack(right).cpu()


def _measured(
    model: LeanFormerForCausalLM,
    inputs: list[dict[str, Tensor]],
    threshold: float | None,
    bar: Any,
) -> ExitReport:
    totals = torch.zeros(6, dtype=torch.float64)
    for batch in inputs:
        totals += _totals(model, batch, threshold).cpu()
        bar.update()
    agreed, depth, tokens, loss, full_loss, predicted = totals.tolist()
    return ExitReport(
        threshold=threshold,
        agreement=agreed / tokens,
        mean_depth=depth / tokens,
        layers=model.config.num_hidden_layers,
        loss=loss / max(predicted, 1.0),
        full_loss=full_loss / max(predicted, 1.0),
        tokens=int(tokens),
    )


def _totals(
    model: LeanFormerForCausalLM, batch: dict[str, Tensor], threshold: float | None
) -> Tensor:
    real = _real(batch)
    with in_evaluation(model):
        with _leaving_at(model, None):
            full = model(**batch, use_cache=False).logits
        with _leaving_at(model, threshold):
            early = model(**batch, use_cache=False)
    depth = early.exit_layer
    if depth is None:
        depth = torch.full_like(batch["input_ids"], model.config.num_hidden_layers)
    agreed = (early.logits.argmax(-1) == full.argmax(-1))[real].sum()
    known = real[:, 1:] & real[:, :-1]
    targets = batch["input_ids"][:, 1:][known]
    losses = [
        F.cross_entropy(x[:, :-1][known].float(), targets, reduction="sum")
        for x in (early.logits, full)
    ]
    numbers = [agreed, depth[real].sum(), real.sum(), *losses, known.sum()]
    return torch.stack([x.double() for x in numbers])


@contextmanager
def _leaving_at(model: LeanFormerForCausalLM, threshold: float | None) -> Iterator[None]:
    """Another threshold for a while."""
    before = model.config.exit_threshold
    model.config.exit_threshold = threshold
    try:
        yield
    finally:
        model.config.exit_threshold = before


def _inputs(
    model: LeanFormerForCausalLM, batches: Iterable[Any], caller: str
) -> list[dict[str, Tensor]]:
    if model.model.exit_head is None:
        raise ValueError(
            f"{caller}: expected a model with an exit head (exit_heads=True, min_depth < "
            f"num_hidden_layers), got one without"
        )
    found = []
    for batch in batches:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        names = ("input_ids", "attention_mask")
        found.append({x: given[x].to(model.device) for x in names if x in given})
    if not found:
        raise ValueError(f"{caller}: expected at least one batch of token ids, got none")
    return found


def _real(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask != 0


def _bar(caller: str, progress: bool | None) -> Any:
    hidden = None if progress is None else not progress
    return tqdm(desc=caller, unit="batch", disable=hidden)
