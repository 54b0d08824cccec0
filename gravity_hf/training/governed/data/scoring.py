"""How hard each sample is for a model: its loss, its tier, and how many tokens it counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ....layers.modes import in_evaluation
from .tiers import TierSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
COLUMNS = ("loss", "tier", "n_tokens")


class SampleLosses(NamedTuple):
    """`losses`: nats per token, NaN where nothing is predicted; `tokens`: how many were."""

    losses: np.ndarray
    tokens: np.ndarray


def score_samples(
    model: nn.Module,
    dataset: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_column: str = "text",
    max_length: int | None = None,
    batch_size: int = 32,
    settings: TierSettings | None = None,
    progress: bool | None = None,
) -> Any:
    """`dataset` with the columns `loss` (nats per token), `tier` and `n_tokens`.

    Each sample is scored alone: padding counts nothing, labels of -100 neither. The model is in
    evaluation while it runs, and as it was afterwards; no random number is drawn.

    Args:
        model: gives logits `[B, T, V]` that predict the next token.
        dataset: of `datasets`, or a list or torch dataset of mappings, with `input_ids` and, if it
            has them, `labels` and `attention_mask`; or with text, where `tokenizer` is given.
        tokenizer: for text.
        text_column: where it is.
        max_length: tokens of a text that are read; None: all.
        batch_size: samples at a time; they are sorted by length first.
        settings: where tiers begin.
        progress: a bar; None: in a terminal.

    Returns:
        For a dataset of `datasets` one of these, otherwise a list of mappings.

    Raises:
        ValueError: a sample without `input_ids` or text; columns that are there already.
    """
    rows = _Rows(dataset, tokenizer, text_column, max_length)
    names = set(getattr(dataset, "column_names", None) or ())
    if taken := sorted(names & set(COLUMNS)):
        raise ValueError(
            f"score_samples: expected a dataset without the columns {list(COLUMNS)}, got {taken}. "
            f"Score it anew: dataset.remove_columns({taken})"
        )
    found = _scored(model, rows, range(len(dataset)), batch_size, progress)
    tiers = (settings or TierSettings()).tiers(found.losses)
    if hasattr(dataset, "add_column"):
        for name, values in zip(COLUMNS, (found.losses, tiers, found.tokens), strict=True):
            dataset = dataset.add_column(name, values)
        return dataset
    return [
        {**dataset[i], "loss": float(loss), "tier": int(tier), "n_tokens": int(tokens)}
        for i, (loss, tier, tokens) in enumerate(
            zip(found.losses, tiers, found.tokens, strict=True)
        )
    ]


def sample_losses(
    model: nn.Module,
    dataset: Any,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    progress: bool | None = False,
) -> SampleLosses:
    """Losses of some samples, in the order of `indices`; arguments as in `score_samples`."""
    return _scored(model, _Rows(dataset, None, "", None), indices, batch_size, progress)


class _Rows:
    """Token ids and labels of samples."""

    def __init__(
        self,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        text_column: str,
        max_length: int | None,
    ) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer
        self.text_column, self.max_length = text_column, max_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.dataset[index]
        if not isinstance(sample, Mapping):
            raise self._wrong(index, sample)
        if self.tokenizer is not None and self.text_column in sample:
            cut = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
            sample = self.tokenizer(sample[self.text_column], **cut)
        if "input_ids" not in sample:
            raise self._wrong(index, sorted(sample))
        ids = torch.as_tensor(sample["input_ids"]).long().flatten()
        labels = sample.get("labels")
        labels = ids.clone() if labels is None else torch.as_tensor(labels).long().flatten()
        mask = sample.get("attention_mask")
        if mask is not None:
            seen = torch.as_tensor(mask).flatten().bool()
            # Padding on any side: what is not seen is neither read nor predicted.
            ids, labels = ids[seen], labels[seen]
        return ids, labels

    def _wrong(self, index: int, got: object) -> ValueError:
        wanted = "input_ids" if self.tokenizer is None else f"{self.text_column!r} or input_ids"
        return ValueError(
            f"score_samples: sample {index}: expected a mapping with {wanted}, got {got!r:.100}. "
            "Pass tokenizer= for text"
        )


def _scored(
    model: nn.Module,
    rows: _Rows,
    indices: Sequence[int],
    batch_size: int,
    progress: bool | None,
) -> SampleLosses:
    if batch_size < 1:
        raise ValueError(f"score_samples: batch_size: expected 1 or more, got {batch_size!r}")
    losses = np.full(len(indices), np.nan)
    tokens = np.zeros(len(indices), dtype=np.int64)
    disable = None if progress is None else not progress
    with in_evaluation(model), tqdm(total=len(indices), desc="scoring", disable=disable) as bar:
        for places, batch in _batches(rows, indices, batch_size):
            loss, count = _batch_losses(model, batch)
            losses[places], tokens[places] = loss, count
            bar.update(len(places))
    return SampleLosses(losses, tokens)


def _batches(
    rows: _Rows, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], list[tuple[Tensor, Tensor]]]]:
    """Places in `indices` and their samples, of like length: within a window of many batches, so
    that no whole dataset is held."""
    window = batch_size * 32
    for start in range(0, len(indices), window):
        places = range(start, min(start + window, len(indices)))
        held = {place: rows[int(indices[place])] for place in places}
        order = sorted(places, key=lambda place: (len(held[place][0]), place))  # noqa: B023
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            yield chosen, [held[place] for place in chosen]


@torch.no_grad()
def _batch_losses(
    model: nn.Module, batch: list[tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss `[B]`, NaN where nothing is predicted, and predicted tokens `[B]`."""
    device = next(model.parameters()).device
    length = max(max(len(ids) for ids, _ in batch), 1)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, (sample, wanted) in enumerate(batch):
        ids[row, : len(sample)], labels[row, : len(sample)] = sample, wanted
        mask[row, : len(sample)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    targets = labels[:, 1:].to(device)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    counts = (targets != IGNORED).sum(-1)
    # 0 / 0 is NaN: such a sample has no loss.
    return (losses.sum(-1) / counts).double().cpu().numpy(), counts.cpu().numpy()
