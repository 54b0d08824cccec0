"""Published tokenizers give the published ids as fast tokenizers, and go back as they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gravity_hf.models.ngt.published_tokenizers import gpt2_tokenizer, state_of, tokenizer_of

from .published_files import tokenizers

PROBE = tokenizers()["probe"]
CHARACTERS = tokenizers()["char"]["state"]
BPE = tokenizers()["bpe"]["state"]
STATES = {
    "char": (CHARACTERS, tokenizers()["char"]),
    "untyped": (tokenizers()["legacy_char_state_without_type"], tokenizers()["char"]),
    "bpe": (BPE, tokenizers()["bpe"]),
}


@pytest.mark.parametrize("case", STATES)
def test_ids_and_text_are_the_published_ones(case: str, tmp_path: Path) -> None:
    """Saved and loaded; unknown characters among them."""
    given, expected = STATES[case]
    tokenizer_of(given).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(PROBE).input_ids
    assert ids == expected["ids"] and len(tokenizer) == expected["vocab_size"]
    if case == "bpe":
        # Published code shows tokens, joined by blanks; here they are text.
        shown = [x for x in tokenizer.convert_ids_to_tokens(ids) if x != "<unk>"]
        assert " ".join(shown) == expected["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the apple was wiseγ Café unnown"
    else:
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == expected["decoded"]
        assert tokenizer.decode([*ids, 999]) == expected["decoded"]


@pytest.mark.parametrize("case", STATES)
def test_state_goes_back_as_it_came(case: str, tmp_path: Path) -> None:
    """Also of a tokenizer that was saved, loaded, and used with padding."""
    given, expected = STATES[case]
    tokenizer_of(given).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    back = state_of(tokenizer)
    if case == "bpe":
        core = Tokenizer.from_str(back["tokenizer_json"])
        assert back["type"] == "bpe" and core.encode(PROBE).ids == expected["ids"]
        assert core.get_vocab() == Tokenizer.from_str(BPE["tokenizer_json"]).get_vocab()
    else:
        assert back["type"] == "char" and back["stoi"] == CHARACTERS["stoi"]
        assert back["itos"] == {int(i): x for i, x in CHARACTERS["itos"].items()}


def test_unknown_characters_are_token_0_where_there_is_no_blank() -> None:
    tokenizer = tokenizer_of({"stoi": {"b": 1, "a": 0}})
    assert tokenizer("abc\n\n").input_ids == [0, 1, 0, 0, 0]


def test_other_tokenizers_are_written_whole() -> None:
    """By a name that published code loads as it is: say with an unknown token, or lower case."""
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    lower = tokenizer_of({"stoi": {"a": 0, "b": 1}}).backend_tokenizer
    lower.normalizer = normalizers.Lowercase()
    for one, text in ((core, "ab"), (lower, "AB")):
        back = state_of(PreTrainedTokenizerFast(tokenizer_object=one))
        assert back["type"] == "bpe"
        assert Tokenizer.from_str(back["tokenizer_json"]).encode(text).ids == [0, 1]


DAMAGED: dict[str, tuple[Any, str]] = {
    "text": ("abc", "got a str"),
    "no type": ({"itos": {}}, "got the type None and itos"),
    "half a type": ({"type": "bpe"}, "got the type 'bpe'"),
    "not JSON": ({"type": "bpe", "tokenizer_json": "{"}, "expected tokenizer_json to be"),
    "no text": ({"type": "bpe", "tokenizer_json": 3}, "expected tokenizer_json to be"),
    "words": ({"stoi": {"ab": 0}}, "expected stoi to number single characters.*'ab'"),
    "holes": ({"stoi": {"a": 0, "b": 2}}, "got ids 0, 2"),
    "empty": ({"stoi": {}}, "got ids nothing"),
    "other way": ({"stoi": {"a": 0}, "itos": {"0": "b"}}, "expected itos to be stoi backwards"),
    "no number": ({"stoi": {"a": 0}, "itos": {"x": "a"}}, "expected itos to be stoi backwards"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_states_are_refused(case: str) -> None:
    given, message = DAMAGED[case]
    with pytest.raises(ValueError, match=message):
        tokenizer_of(given)


def test_gpt2_comes_from_a_folder(tmp_path: Path) -> None:
    """One with as many tokens as GPT-2 has; there is none without a network."""
    with pytest.raises(ValueError, match="files of GPT-2's tokenizer.*Give a folder"):
        gpt2_tokenizer()
    words = {f"t{i}": i for i in range(50257)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "whole")
    assert len(gpt2_tokenizer(tmp_path / "whole")) == 50257
    tokenizer_of(CHARACTERS).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="expected GPT-2's 50257 tokens, got 39"):
        gpt2_tokenizer(tmp_path / "small")


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a fast tokenizer.*got a object"):
        state_of(object())  # type: ignore[arg-type]
