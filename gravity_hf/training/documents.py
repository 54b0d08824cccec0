"""The documents that examples are made of: from files, from `datasets`, from Python's own text."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from .chat import check_message, read_chats
from .corpus import split_by_file, stdlib_root
from .text import embedded_english, prose_paragraphs

# Part of every cache key here: raise it when reading changes.
_READING = 1
_TEXT = Features({"text": Value("string"), "where": Value("string")})
_CHAT = Features(
    {"messages": [{"role": Value("string"), "content": Value("string")}], "where": Value("string")}
)
_BLANK_LINES = re.compile(r"\n\s*\n")
_CHUNK = 1 << 20


class Documents(NamedTuple):
    """`train`: a document a row, in the column `text` or `messages`; `where` names it in errors.
    `validation`: the same, or None where `train` is still to be split. `origin`: one line."""

    train: Dataset
    validation: Dataset | None
    origin: str


def text_file_documents(files: Sequence[str], unit: str, share: float) -> Documents:
    """Documents of text files.

    Unit `"file"`: every file is one document, and the last `share` of each is held out, cut at
    that character. Unit `"paragraph"`: text between blank lines is a document; nothing is held out
    yet.
    """
    if unit == "paragraph" or not share:
        train = _cached(_texts, _TEXT, files, unit=unit)
        return Documents(train, None, f"{_count(files, 'text file')}, {unit} by {unit}")
    train, validation = (_cached(_texts, _TEXT, files, share=share, side=side) for side in (0, 1))
    origin = f"{_count(files, 'text file')}, the last {share:g} of each held out"
    return Documents(train, validation, origin)


def chat_file_documents(files: Sequence[str]) -> Documents:
    """Chats of JSONL files, a line each."""
    return Documents(_cached(_chats, _CHAT, files), None, _count(files, "chat file"))


def embedded_documents(unit: str) -> Documents:
    """Text that every machine has. Unit `"file"`: the topics of Python's help and the files of its
    standard library. Unit `"paragraph"`: the paragraphs of prose in the help topics."""
    version = ".".join(map(str, sys.version_info[:3]))
    train = _cached(_embedded, _TEXT, (), version=version, root=str(stdlib_root()), unit=unit)
    what = "help topics and standard library source" if unit == "file" else "help text, paragraphs"
    return Documents(train, None, f"{what} of Python {version}")


def hub_documents(name: str, config: str | None, split: str, column: str) -> Documents:
    """A column of a dataset: text, or lists of messages. Rows without text are left out."""
    where = f"dataset {name}, split {split}"
    with plain_errors(), quiet_bars():
        rows = datasets.load_dataset(name, config, split=split)
    if column not in rows.column_names:
        raise ValueError(
            f"text_column: expected a column of {where}, got {column!r}; there are "
            f"{rows.column_names}. Set text_column"
        )
    kind = rows.features[column]
    if isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
        read, features = _hub_texts, _TEXT
    elif isinstance(kind, Value):
        raise ValueError(
            f"text_column: expected text or messages in {column!r} of {where}, got {kind.dtype}"
        )
    else:
        read, features = _hub_chats, _CHAT
    key = cache_key(rows._fingerprint, "read", _READING, column)
    with quiet_bars():
        documents = rows.map(
            lambda batch, places: read(batch[column], places, where),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            new_fingerprint=key,
            desc="read",
        )
    return Documents(documents, None, f"{where}, {len(documents):,} of {len(rows):,} rows")


def cache_key(*parts: Any) -> str:
    """A name for what `parts` determine, fit for `datasets`; the same in every process."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def quiet_bars() -> Iterator[None]:
    """The bars of `datasets` on terminals only."""
    had_bars = datasets.are_progress_bars_disabled() is False
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def plain_errors() -> Iterator[None]:
    """What was wrong with a document, instead of what `datasets` says about that."""
    try:
        yield
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _cached(
    generator: Callable[..., Iterator[Any]],
    features: Features,
    files: Sequence[str],
    **options: Any,
) -> Dataset:
    """`generator(files, **options)` as a dataset on disk, made once for the content of `files`."""
    content = tuple(_digest(Path(file)) for file in files)
    options |= {"files": tuple(map(str, files)), "cached": (_READING, *content)}
    with plain_errors(), quiet_bars():
        return Dataset.from_generator(generator, features=features, gen_kwargs=options)


def _texts(
    files: tuple[str, ...],
    cached: object,
    unit: str = "file",
    share: float = 0.0,
    side: int = 0,
) -> Iterator[dict[str, str]]:
    for file in files:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            raise ValueError(f"{file}: expected a file with text in it, it is empty. Leave it out")
        cut = int(len(text) * (1 - share))
        part = text[cut:] if side else text[:cut]
        yield from _documents(part, unit, file)


def _embedded(
    files: tuple[str, ...], cached: object, version: str, root: str, unit: str
) -> Iterator[dict[str, str]]:
    from pydoc_data.topics import topics

    if unit == "paragraph":
        for paragraph in prose_paragraphs(embedded_english()):
            yield {"text": paragraph, "where": "help topics"}
        return
    for name in sorted(topics):
        yield from _documents(topics[name], unit, f"help topic {name}")
    for file in sorted(path for part in split_by_file(Path(root)) for path in part):
        text = file.read_text(encoding="utf-8", errors="replace")
        yield from _documents(text, unit, file.relative_to(root).as_posix())


def _documents(text: str, unit: str, where: str) -> Iterator[dict[str, str]]:
    parts = _BLANK_LINES.split(text) if unit == "paragraph" else [text]
    yield from ({"text": part, "where": where} for part in parts if part.strip())


def _chats(files: tuple[str, ...], cached: object) -> Iterator[dict[str, Any]]:
    for file in files:
        for line, messages in read_chats(Path(file)):
            yield {"messages": messages, "where": f"{file}, line {line}"}


def _hub_texts(texts: list[str | None], places: list[int], where: str) -> dict[str, list[Any]]:
    kept = [(t, f"{where}, row {p}") for t, p in zip(texts, places, strict=True) if t and t.strip()]
    return {"text": [text for text, _ in kept], "where": [place for _, place in kept]}


def _hub_chats(chats: list[Any], places: list[int], where: str) -> dict[str, list[Any]]:
    names = [f"{where}, row {place}" for place in places]
    checked = []
    for chat, name in zip(chats, names, strict=True):
        if not chat:
            raise ValueError(f"{name}: expected a list of messages, got {chat!r}")
        # Columns that other rows use are None here.
        plain = [{k: v for k, v in message.items() if v is not None} for message in chat]
        checked.append([check_message(message, name, i) for i, message in enumerate(plain, 1)])
    return {"messages": checked, "where": names}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ValueError(
            f"{file}: expected a readable file ({error.strerror}). Check the spelling"
        ) from error
    return digest.hexdigest()


def _count(files: Sequence[str], what: str) -> str:
    return f"{len(files)} {what}{'' if len(files) == 1 else 's'}"
