"""Names of the files that turn what a user has into what a model reads."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

# Of slow and fast tokenizers of every family that transformers has, and their chat templates.
_TOKENIZER = frozenset(
    (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe", "encoder.json"),
        *("merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "spm.model"),
        *("sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
        *("tekken.json", "normalizer.json", "chat_template.jinja", "chat_template.json"),
    )
)
_TEMPLATES = "additional_chat_templates"
_PROCESSOR = frozenset(
    ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
)
# What says that a folder has its tokenizer or processor already.
_MAIN = frozenset(("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"))

# One of these has whatever has a tokenizer or processor, the usual ones first.
MARKS = (
    *("tokenizer_config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json"),
    *("vocab.txt", "tokenizer.model", "spiece.model", "processor_config.json"),
    "sentencepiece.bpe.model",
)


def is_tokenizer_file(path: str) -> bool:
    """Whether a file of a repository belongs to a tokenizer."""
    return path in _TOKENIZER or posixpath.dirname(path) == _TEMPLATES


def is_processor_file(path: str) -> bool:
    """Whether a file of a repository belongs to a processor of pictures, sounds or films."""
    return path in _PROCESSOR


def has_tokenizer(paths: Iterable[str]) -> bool:
    """Whether a tokenizer can be loaded from these files."""
    return not {"tokenizer.json", "tokenizer_config.json"}.isdisjoint(paths)


def has_inputs(paths: Iterable[str]) -> bool:
    """Whether a tokenizer or processor can be loaded from these files."""
    return not _MAIN.isdisjoint(paths)
