"""Text cut into model inputs: some to calibrate on, as many others to measure on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..training.text import disjoint_samples, prose_paragraphs

Batches = list[dict[str, Tensor]]

_WINDOWS_AT_ONCE = 4
_TEXTS_AT_ONCE = 16
# Far more than the characters of one token; the rest of a long book need not be tokenized.
_CHARACTERS_PER_TOKEN = 64


def pieces_of_text(
    host: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    writes: bool,
    samples: int,
    length: int,
    seed: int,
) -> tuple[Batches, Batches]:
    """Batches to calibrate on and batches to measure on, from different text.

    Decoders get windows of running text, encoders whole paragraphs. `length` is in tokens, at
    most what the host was made for.
    """
    length = min(length, getattr(host.config, "max_position_embeddings", None) or length)
    if writes:
        pieces = token_windows(tokenizer, corpus, samples, length, seed)
    else:
        parts = disjoint_samples(prose_paragraphs(corpus), samples, seed)
        pieces = tuple(padded_batches(tokenizer, texts, length) for texts in parts)
    _require_fitting_ids(host, tokenizer, [*pieces[0], *pieces[1]])
    return pieces


def token_windows(
    tokenizer: PreTrainedTokenizerBase, corpus: str, samples: int, length: int, seed: int
) -> tuple[Batches, Batches]:
    """Two disjoint sets of `samples` windows of `length` tokens."""
    wanted = 2 * samples * length
    start = corpus[: max(_CHARACTERS_PER_TOKEN * wanted, 1 << 18)]
    ids = tokenizer(start, add_special_tokens=False)["input_ids"]
    available = len(ids) // length
    if available < 2 * samples:
        raise ValueError(
            f"--text: expected at least {wanted} tokens for 2 x {samples} pieces of {length}, got "
            f"{len(ids)} from {len(start)} characters. Give more text, lower --samples or "
            f"--length, or check that {type(tokenizer).__name__} is the model's own tokenizer"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    windows = torch.tensor(ids[: available * length]).view(available, length)[order[: 2 * samples]]
    sets = (windows[:samples], windows[samples:])
    first, second = ([{"input_ids": w} for w in s.split(_WINDOWS_AT_ONCE)] for s in sets)
    return first, second


def padded_batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Batches:
    """`texts` cut at `length` tokens, padded within each batch."""
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    return [dict(tokenizer(texts[i : i + _TEXTS_AT_ONCE], **options)) for i in starts]


def _require_fitting_ids(
    host: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Batches
) -> None:
    known = host.get_input_embeddings().num_embeddings
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if largest >= known:
        raise ValueError(
            f"MODEL: expected token ids below {known}, the model's vocabulary, got {largest} from "
            f"{type(tokenizer).__name__}. The tokenizer beside the model is not its own"
        )
