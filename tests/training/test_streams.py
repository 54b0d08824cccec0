"""Text as tokens: tokenizers that lose nothing, windows that depend on the seed alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from gravity_hf.training import sources, streams
from gravity_hf.training.streams import (
    ConsecutiveWindows,
    RandomWindows,
    collate,
    load_stream,
    make_stream,
)

TEXT = "The déjà vu of gravity: a token attends to what is near.\n\tIt falls.  Twice.\n" * 40


@pytest.mark.parametrize("name", ["byte", "char", "bpe:300"])
def test_a_tokenizer_gives_the_text_back_and_survives_saving(name, tmp_path):
    stream = make_stream(name, TEXT, TEXT[:100])
    assert stream.tokenizer.decode(stream.train.tolist()) == TEXT
    stream.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT[:100], add_special_tokens=False)["input_ids"] == stream.validation.tolist()
    assert int(stream.train.max()) < stream.vocabulary
    assert stream.bytes_per_token == pytest.approx(
        len(TEXT[:100].encode()) / len(stream.validation)
    )


def test_a_character_that_training_never_saw_is_unknown_not_an_error():
    stream = make_stream("char", "aab", "abz")
    assert stream.validation.tolist() == [0, 1, stream.tokenizer.unk_token_id]


def test_random_windows_depend_on_the_seed_alone():
    ids = torch.arange(1000)
    one, same, other = (RandomWindows(ids, 20, 16, seed) for seed in (3, 3, 4))
    assert torch.equal(one.__getitems__([2, 7]), same.__getitems__([2, 7]))
    assert not torch.equal(one.__getitems__(list(range(20))), other.__getitems__(list(range(20))))
    for window in one.__getitems__(list(range(20))):
        assert torch.equal(window, torch.arange(window[0], window[0] + 16))


def test_more_windows_begin_with_the_same_ones():
    """A longer run with the same seed must see the shorter run's batches first."""
    ids = torch.arange(1000)
    short, long = RandomWindows(ids, 5, 16, 0), RandomWindows(ids, 50, 16, 0)
    assert torch.equal(short.starts, long.starts[:5])


def test_consecutive_windows_cover_the_text_once():
    windows = ConsecutiveWindows(torch.arange(100), 1000, 16)
    assert torch.equal(windows.__getitems__(list(range(6))).flatten(), torch.arange(96))
    assert len(windows) == 6


def test_fewer_consecutive_windows_are_spread_over_the_text():
    windows = ConsecutiveWindows(torch.arange(1000), 3, 16)
    assert [int(w[0]) for w in windows.__getitems__([0, 1, 2])] == [0, 492, 984]


def test_labels_are_the_ids():
    ids = torch.arange(12).view(3, 4)
    for windows in (ids, list(ids)):
        batch = collate(windows)
        assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["labels"], ids)


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a" * 900 + "b" * 100)
    stream = load_stream("char", [str(file)])
    assert stream.train.tolist() == [0] * 900
    assert len(stream.validation) == 100 and 0 not in stream.validation.tolist()


def test_a_local_dataset_is_read_with_its_own_validation_split(tmp_path):
    for split, text in (("train", "x" * 50), ("validation", "y" * 20)):
        (tmp_path / f"{split}.txt").write_text(text)
    stream = load_stream("byte", dataset=str(tmp_path))
    assert set(stream.train.tolist()) == {ord("x")}
    assert set(stream.validation.tolist()) == {ord("y")}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text_files": ["a"], "dataset": "b"}, "got both"),
        ({"text_files": ["/nowhere/at/all.txt"]}, "expected a readable text file"),
        ({"tokenizer": "bpe:many"}, "expected bpe:SIZE"),
        ({"tokenizer": "bpe:12"}, "expected at least 257 BPE tokens"),
        ({"tokenizer": "/nowhere"}, "expected byte, char, bpe:SIZE"),
    ],
)
def test_what_does_not_fit_is_said_plainly(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_stream(**{"train_bytes": 200_000, "validation_bytes": 20_000, **arguments})


def test_too_little_text_for_one_window_is_an_error():
    with pytest.raises(ValueError, match="expected at least 17 tokens"):
        RandomWindows(torch.arange(10), 4, 16, 0)


def test_a_corpus_is_made_into_tokens_piece_by_piece(monkeypatch):
    """A whole corpus as Python's numbers would take ten times its room."""
    whole = make_stream("char", TEXT, TEXT[:100])
    monkeypatch.setattr(streams, "_PIECE", 64)
    original, sizes = type(whole.tokenizer).__call__, []

    def spy(self, texts, **options):
        sizes.append(sum(map(len, texts)))
        return original(self, texts, **options)

    monkeypatch.setattr(type(whole.tokenizer), "__call__", spy)
    pieces = make_stream("char", TEXT, TEXT[:100])
    assert torch.equal(pieces.train, whole.train) and pieces.digest == whole.digest
    assert max(sizes) <= 64 * streams._PIECES and sum(sizes) == len(TEXT) + 100


@pytest.fixture
def lines(monkeypatch):
    """load_dataset of the library, with rows of our own: what it was asked for, and the rows."""
    datasets = pytest.importorskip("datasets")
    rows = {"train": ["", " = Gravity = \n", "", " It falls . \n"] * 50, "validation": [" a \n"]}
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        parts = {name: datasets.Dataset.from_dict({"text": text}) for name, text in rows.items()}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked, rows


def test_wikitext_by_name_is_its_lines_as_they_are(lines):
    asked, rows = lines
    stream = load_stream("char", dataset="wikitext103")
    assert asked == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {})]
    assert stream.tokenizer.decode(stream.train.tolist()) == "".join(rows["train"])
    assert len(stream.validation) == len(" a \n")
    load_stream("char", dataset="wikitext2", dataset_config="other")
    assert asked[-1][0] == ("Salesforce/wikitext", "other")


def test_no_more_of_a_dataset_is_read_than_was_asked_for(lines):
    stream = load_stream("byte", dataset="wikitext103", train_bytes=20)
    assert stream.tokenizer.decode(stream.train.tolist()) == "".join(lines[1]["train"])[:20]
    assert "its validation split" in stream.description


def test_shakespeare_by_name_is_one_text_with_its_last_tenth_held_out(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "input.txt").write_text("First Citizen:\nBefore we proceed\n\n" * 20)
    known = sources.DATASETS["tinyshakespeare"]
    local = {**known.options, "data_files": str(tmp_path / "input.txt")}
    entry = dataclasses.replace(known, options=local)
    monkeypatch.setitem(sources.DATASETS, "tinyshakespeare", entry)
    stream = load_stream("char", dataset="tinyshakespeare")
    both = torch.cat([stream.train, stream.validation]).tolist()
    assert stream.tokenizer.decode(both) == (tmp_path / "input.txt").read_text()
    assert len(stream.validation) / len(both) == pytest.approx(0.1, abs=0.01)
    assert known.path == "text" and known.options["data_files"].startswith("https://")
