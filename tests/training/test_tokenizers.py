"""Encodings of tiktoken as fast tokenizers: the same ids, and no network ever after."""

from __future__ import annotations

import base64
import random
import sys

import pytest
from transformers import AutoTokenizer

from gravity_hf.training.streams import make_stream
from gravity_hf.training.tokenizers import tiktoken_tokenizer

tiktoken = pytest.importorskip("tiktoken")

TEXT = "The déjà vu of gravity: it falls.\n\tTwice, 123 times; you'll see\n\n  x = y \n"
MERGES = ["it", "Th", "The", " v", " vu", "ll", "12", "fa", " fa", " fall", "\n\n", "  ", "  x"]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def encoding():
    """Tokens of one byte, in another order than their bytes, then longer ones."""
    from tiktoken_ext.openai_public import r50k_pat_str

    tokens = [bytes([byte]) for byte in reversed(range(256))]
    tokens += [text.encode() for text in MERGES]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "made-up",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END: len(ranks)},
    )


@pytest.fixture(scope="module")
def file(encoding, tmp_path_factory):
    lines = (base64.b64encode(t) + b" %d\n" % r for t, r in encoding._mergeable_ranks.items())
    path = tmp_path_factory.mktemp("tiktoken") / "made-up.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def test_ids_are_those_of_tiktoken(encoding, file):
    made = tiktoken_tokenizer(str(file))
    draw = random.Random(0)
    letters = "abfit The vu,.'\n\t  éll12x\r "
    texts = [TEXT, *("".join(draw.choices(letters, k=40)) for _ in range(200))]
    for text in texts:
        ids = made(text)["input_ids"]
        assert ids == encoding.encode(text) and made.decode(ids) == text
    assert made.eos_token_id == encoding.eot_token and len(made) == encoding.n_vocab


def test_an_encoding_by_name_is_what_tiktoken_has_under_it(encoding, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    stream = make_stream("tiktoken:gpt2", TEXT, TEXT[:20])
    assert stream.train.tolist() == encoding.encode(TEXT)
    assert stream.vocabulary == encoding.n_vocab


def test_the_saved_folder_needs_neither_tiktoken_nor_a_network(
    encoding, file, tmp_path, monkeypatch
):
    tiktoken_tokenizer(str(file)).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == encoding.encode(TEXT)
    assert loaded.eos_token == END


def test_a_changed_file_is_read_again(encoding, file, tmp_path):
    """tiktoken keeps copies by the name of the file."""
    other = tmp_path / "other.tiktoken"
    other.write_bytes(file.read_bytes())
    before = len(tiktoken_tokenizer(str(other)))
    other.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    assert len(tiktoken_tokenizer(str(other))) == before - 1


def _offline(name):
    raise ConnectionError("no route")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"tiktoken:gpt2 at hand.*TIKTOKEN_CACHE_DIR"),
        ("gpt9", "expected a file or one of .*'gpt2'.*, got 'gpt9'"),
    ],
)
def test_a_vocabulary_that_cannot_be_had_is_said_with_the_way_out(name, message, monkeypatch):
    if name == "gpt2":
        monkeypatch.setattr(tiktoken, "get_encoding", _offline)
    with pytest.raises(ValueError, match=message):
        tiktoken_tokenizer(name)


def test_a_file_without_every_byte_is_refused(file, tmp_path):
    short = tmp_path / "short.tiktoken"
    short.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[10:]))
    with pytest.raises(ValueError, match="without 10 of the bytes"):
        tiktoken_tokenizer(str(short))


def test_without_tiktoken_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="pip install tiktoken"):
        tiktoken_tokenizer("gpt2")
