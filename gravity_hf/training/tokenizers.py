"""Tokenizers for models trained from scratch, saved like any other: bytes, characters, BPE."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

BYTES = 256
END_OF_TEXT = "<|endoftext|>"


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
    end = END_OF_TEXT
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


def tiktoken_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """An encoding of OpenAI's tiktoken as a fast tokenizer, which is saved whole and needs neither
    tiktoken nor a network again.

    Ids are tiktoken's own; special tokens follow the others without the gaps that some encodings
    have before them.

    Args:
        source: name of an encoding, such as `"gpt2"`, whose vocabulary tiktoken fetches unless the
            folder in `TIKTOKEN_CACHE_DIR` has it; or a `.tiktoken` file of tokens and ranks, which
            is taken to split words as GPT-2's does.

    Raises:
        ImportError: without tiktoken.
        ValueError: an unknown name, a file of something else, or a vocabulary that cannot be had.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(
            "--tokenizer tiktoken:NAME needs the package tiktoken, which is not installed: "
            "pip install tiktoken"
        ) from error
    if Path(source).is_file():
        return _from_ranks(*_read_ranks(Path(source)))
    try:
        encoding = tiktoken.get_encoding(source)
    except OSError as error:
        raise ValueError(
            f"--tokenizer: expected the vocabulary of tiktoken:{source} at hand, and it could not "
            f"be fetched ({type(error).__name__}). Without a network give a file, tiktoken:FILE, "
            "or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"--tokenizer: expected a file or one of {tiktoken.list_encoding_names()} after "
            f"tiktoken:, got {source!r}"
        ) from error
    return _from_ranks(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)


def _read_ranks(file: Path) -> tuple[dict[bytes, int], str, dict[str, int]]:
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str

    # With the digest, a copy that tiktoken keeps of an older file under this name is not taken.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    ranks = load_tiktoken_bpe(str(file), digest)
    lacking = sum(bytes([byte]) not in ranks for byte in range(BYTES))
    if lacking or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"--tokenizer: expected tokens with ranks 0, 1, 2, ... and each of the {BYTES} bytes "
            f"among them, got {len(ranks)} tokens without {lacking} of the bytes in {str(file)!r}"
        )
    return ranks, r50k_pat_str, {END_OF_TEXT: len(ranks)}


def _from_ranks(
    ranks: dict[bytes, int], pattern: str, special: dict[str, int]
) -> PreTrainedTokenizerFast:
    class Ranks(TikTokenConverter):
        def load_tiktoken_bpe(self, tiktoken_url: Any) -> dict[bytes, int]:
            return ranks

    names = sorted(special, key=lambda name: special[name])
    core = Ranks(pattern=pattern, extra_special_tokens=names).converted()
    end = END_OF_TEXT if END_OF_TEXT in special else None
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
