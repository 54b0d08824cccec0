"""What to train on, as settings: for the command line, for YAML, for Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# No imports of libraries here: command lines read this file before they know what to do.
PACKINGS = ("blocks", "documents", "none")
CHAT_LOSSES = ("assistant", "all")
TEXT_UNITS = ("file", "paragraph")
_SOURCES = ("dataset", "text_files", "chat_files")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class DataArguments:
    """Give one of dataset, text_files, chat_files; without any of them the examples come from text
    that every Python carries: its help topics and the source of its standard library."""

    dataset: str | None = field(
        default=None,
        metadata=_help("Dataset on the Hub, or a folder of data files that `datasets` reads."),
    )
    dataset_config: str | None = field(
        default=None, metadata=_help("Configuration of the dataset, such as wikitext-2-raw-v1.")
    )
    dataset_split: str = field(default="train", metadata=_help("Split to train on."))
    dataset_validation_split: str | None = field(
        default=None, metadata=_help("Split to validate on, instead of a share of the first.")
    )
    text_column: str = field(
        default="text",
        metadata=_help("Column with text, or with lists of messages (role, content): chats."),
    )
    text_files: list[str] | None = field(
        default=None, metadata=_help("Text files, UTF-8. See text_unit.")
    )
    text_unit: Literal["file", "paragraph"] = field(
        default="file",
        metadata=_help(
            "What one document is. file: a text file, its last part held out; paragraph: text "
            "between blank lines (of Python's own text: prose in its help topics)."
        ),
    )
    chat_files: list[str] | None = field(
        default=None,
        metadata=_help('JSONL, a chat a line: {"messages": [{"role": ..., "content": ...}, ...]}'),
    )
    chat_loss: Literal["assistant", "all"] = field(
        default="assistant",
        metadata=_help("Learn what the assistant writes, or every token of the chat."),
    )
    length: int = field(default=1024, metadata=_help("Tokens in an example."))
    packing: Literal["blocks", "documents", "none"] = field(
        default="blocks",
        metadata=_help(
            "blocks: documents one after the other, cut anywhere; documents: several whole ones "
            "in an example that do not see each other; none: one in an example, padded."
        ),
    )
    validation_share: float = field(
        default=0.1, metadata=_help("Share of the documents to hold out; 0 holds nothing out.")
    )
    validation_files: list[str] | None = field(
        default=None,
        metadata=_help("Files to validate on, instead of a share: text, or JSONL for chats."),
    )
    max_train_tokens: int | None = field(
        default=None, metadata=_help("Train on at most so many tokens.")
    )
    max_validation_tokens: int | None = field(
        default=None, metadata=_help("Validate on at most so many tokens.")
    )
    seed: int = field(default=0, metadata=_help("Chooses what is held out, and the order."))

    def __post_init__(self) -> None:
        given = [name for name in _SOURCES if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"data: expected one source, got {' and '.join(given)}. Keep one of them"
            )
        for name in ("text_files", "chat_files", "validation_files"):
            _check_list(name, getattr(self, name))
        if not self.dataset and (self.dataset_config or self.dataset_validation_split):
            raise ValueError(
                "dataset_config, dataset_validation_split: expected a dataset that they belong to, "
                "got none. Set dataset, or leave them out"
            )
        if self.dataset_validation_split and self.validation_files:
            raise ValueError(
                "validation_files: expected at most one thing to validate on, got "
                "dataset_validation_split too. Leave one out"
            )
        _check_choice("packing", self.packing, PACKINGS)
        _check_choice("text_unit", self.text_unit, TEXT_UNITS)
        _check_choice("chat_loss", self.chat_loss, CHAT_LOSSES)
        _check_count("length", self.length, 2)
        _check_count("seed", self.seed, 0)
        for name in ("max_train_tokens", "max_validation_tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), self.length)
        share = self.validation_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(
                f"validation_share: expected a number from 0 to below 1, got {share!r}"
            )


def _check_list(name: str, value: Any) -> None:
    fits = value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    if not fits:
        raise ValueError(f"{name}: expected a list of file names, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
