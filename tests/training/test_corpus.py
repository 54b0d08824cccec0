"""Where the demonstration's bytes come from, and that no side sees the other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gravity_hf.training.corpus import (
    EXCLUDED,
    even_windows,
    load_corpus,
    random_windows,
    split_by_file,
    stdlib_root,
)
from gravity_hf.training.text import disjoint_samples, embedded_english, prose_paragraphs


def test_split_is_deterministic_and_disjoint_by_file() -> None:
    train, validation = split_by_file(stdlib_root())
    assert (train, validation) == split_by_file(stdlib_root())
    assert set(train).isdisjoint(validation)
    assert 0.04 < len(validation) / (len(train) + len(validation)) < 0.2


def test_split_leaves_out_what_is_not_the_library() -> None:
    files = [file for side in split_by_file(stdlib_root()) for file in side]
    parts = {part for file in files for part in file.relative_to(stdlib_root()).parts}
    assert parts.isdisjoint(EXCLUDED)


def test_a_file_stays_on_its_side_when_others_come_and_go(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"module{index}.py").write_text("x = 1\n")
    train, validation = split_by_file(tmp_path)
    assert validation
    for file in train[::2]:
        file.unlink()
    fewer, same = split_by_file(tmp_path)
    assert same == validation
    assert fewer == [file for file in train if file.exists()]


def test_corpus_respects_the_caps() -> None:
    corpus = load_corpus(None, train_bytes=200_000, validation_bytes=50_000)
    assert corpus.train.numel() == 200_000
    assert corpus.validation.numel() == 50_000
    again = load_corpus(None, train_bytes=200_000, validation_bytes=50_000)
    assert corpus.digest == again.digest


def test_own_text_holds_out_its_end(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("a" * 180_000 + "b" * 20_000)
    corpus = load_corpus([file], train_bytes=10**6, validation_bytes=10**6)
    assert set(corpus.train.tolist()) == {ord("a")}
    assert set(corpus.validation.tolist()) == {ord("b")}


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(ValueError, match="100 kB"):
        load_corpus([file], train_bytes=10**6, validation_bytes=10**6)


def test_windows_stay_inside_the_data() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    windows = even_windows(data, count=5, length=20)
    assert windows.shape == (5, 20)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99
    generator = torch.Generator().manual_seed(0)
    drawn = random_windows(data, count=50, length=20, generator=generator)
    assert ((drawn[:, 1:] - drawn[:, :-1]) == 1).all()


def test_paragraphs_are_distinct_prose() -> None:
    paragraphs = prose_paragraphs(embedded_english())
    assert len(paragraphs) >= 256
    assert len(set(paragraphs)) == len(paragraphs)
    first, second = disjoint_samples(paragraphs, 128)
    assert set(first).isdisjoint(second)
    assert (first, second) == disjoint_samples(paragraphs, 128)


def test_too_few_paragraphs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 paragraphs"):
        disjoint_samples(["one", "two", "three"], 2)
