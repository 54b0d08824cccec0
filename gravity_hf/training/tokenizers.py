"""Tokenizers for models trained from scratch, saved like any other: bytes, characters, BPE."""

from __future__ import annotations

import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

BYTES = 256


def byte_tokenizer() -> Qwen2Tokenizer:
    """Token i is byte i; byte 0 pads and ends. Text in normal form (NFC) round-trips exactly.

    It is Qwen2's own class without merges: beside a Qwen2 config, AutoTokenizer takes that class
    whatever the folder declares.
    """
    letters = _byte_letters()
    end = letters[0]
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=end, pad_token=end)


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte, as GPT-2 introduced it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """One token for each distinct character of `text`, in code point order; others are unknown."""
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    unknown = "[UNK]"
    vocabulary[unknown] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown)


def train_bpe(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens, trained on `text`; every string round-trips."""
    end = "<|endoftext|>"
    smallest = BYTES + 1
    if size < smallest:
        raise ValueError(f"tokenizer: expected at least {smallest} BPE tokens, got {size}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
