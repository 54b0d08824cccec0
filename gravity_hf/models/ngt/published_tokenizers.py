"""The tokenizers of published NGT checkpoints as fast tokenizers, and back.

A checkpoint holds a tokenizer's state: `{"type": "char", "stoi": {...}, "itos": {...}}`, in old
files without a type; `{"type": "bpe", "tokenizer_json": str}`; or `{"type": "tiktoken",
"encoding_name": "gpt2"}`. Ids stay as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..converting import some_of

_BLANK = " "
_UNKNOWN = "<unk>"
_GPT2, _GPT2_TOKENS = "openai-community/gpt2", 50257


def tokenizer_of(state: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a published state.

    `"char"`: one token for each character; others are read as a blank, or as token 0 where there is
    no blank, as published. `"bpe"`: as stored, with the byte-level decoder that it lacks, so that
    text comes back as text, where the published chat shows tokens with blanks between them.

    Args:
        state: see this file's head. `"tiktoken"` is refused: its vocabulary is not in it, see
            `gpt2_tokenizer`.

    Raises:
        ValueError: no such state, or a damaged one.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"vocab: expected the state of a published tokenizer, got a {type(state).__name__}"
        )
    kind = kind_of_tokenizer(state)
    return _characters(state) if kind == "char" else _bpe(state["tokenizer_json"])


def kind_of_tokenizer(state: Mapping[str, Any]) -> str:
    """`"char"`, `"bpe"` or `"tiktoken"`.

    Raises:
        ValueError: it is none of them.
    """
    kind = state.get("type", "char" if "stoi" in state else None)
    needed = {"char": "stoi", "bpe": "tokenizer_json", "tiktoken": "encoding_name"}
    if kind not in needed or needed[kind] not in state:
        raise ValueError(
            "vocab: expected the state of a published tokenizer, with the type 'char' and stoi, "
            f"'bpe' and tokenizer_json, or 'tiktoken' and encoding_name, got the type {kind!r} and "
            f"{some_of(str(x) for x in state if x != 'type')}"
        )
    return kind


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a published checkpoint holds of a tokenizer.

    A tokenizer of characters by the published rules is written as `"char"`; any other fast one as
    `"bpe"`, which published code loads whole, whatever its model is.

    Raises:
        ValueError: it is no fast tokenizer.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise ValueError(
            "tokenizer: expected a fast tokenizer, whose state is one JSON text, got a "
            f"{type(tokenizer).__name__}. Load it with AutoTokenizer"
        )
    plain = Tokenizer.from_str(core.to_str())
    plain.no_padding()
    plain.no_truncation()
    vocabulary = plain.get_vocab()
    if _is_of_characters(plain, vocabulary):
        stoi = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        return {"type": "char", "stoi": stoi, "itos": {i: x for x, i in stoi.items()}}
    return {"type": "bpe", "tokenizer_json": plain.to_str()}


def gpt2_tokenizer(source: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a `"tiktoken"` state.

    Args:
        source: its folder or its name on the Hub. None: GPT-2's on the Hub.

    Raises:
        ValueError: it cannot be had, or is another one.
    """
    name = os.fspath(source) if source is not None else _GPT2
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: expected the files of GPT-2's tokenizer (tokenizer.json, or vocab.json "
            f"and merges.txt), which a tiktoken checkpoint does not hold, got none from {name!r}. "
            "Give a folder that holds them, or a network"
        ) from error
    if len(tokenizer) != _GPT2_TOKENS:
        raise ValueError(
            f"tokenizer: expected GPT-2's {_GPT2_TOKENS} tokens, got {len(tokenizer)} from "
            f"{name!r}. Give another folder"
        )
    return tokenizer


def _characters(state: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    stoi = state["stoi"]
    ids = list(stoi.values()) if isinstance(stoi, Mapping) else []
    strange = [repr(x) for x in stoi if not isinstance(x, str) or len(x) != 1] if ids else []
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in ids)
    if not ids or strange or not whole or sorted(ids) != list(range(len(ids))):
        got = f"{some_of(strange)} among them" if strange else f"ids {some_of(map(str, ids))}"
        raise ValueError(
            f"vocab: expected stoi to number single characters from 0, got {got}. The state is "
            "damaged"
        )
    itos = state.get("itos")
    if itos is not None and {str(i): x for i, x in itos.items()} != {
        str(i): x for x, i in stoi.items()
    }:
        raise ValueError("vocab: expected itos to be stoi backwards, got others. It is damaged")
    core = Tokenizer(models.WordLevel(dict(stoi), unk_token=_stands_in(stoi)))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    # No unknown token is named: it would be a special one, which decoding leaves out.
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def _bpe(text: Any) -> PreTrainedTokenizerFast:
    try:
        core = Tokenizer.from_str(text)
    except Exception as error:  # The library raises no class of its own.
        raise ValueError(
            f"vocab: expected tokenizer_json to be a tokenizer's JSON, got what cannot be read as "
            f"such ({error}). The state is damaged"
        ) from error
    if core.decoder is None:
        core.decoder = decoders.ByteLevel()
    named = {"unk_token": _UNKNOWN} if core.token_to_id(_UNKNOWN) is not None else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **named
    )


def _stands_in(stoi: Mapping[str, int]) -> str:
    """The character that unknown ones are read as."""
    return _BLANK if _BLANK in stoi else next(x for x, i in stoi.items() if i == 0)


def _is_of_characters(core: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
    """Whether `_characters` would have made it."""
    if any(len(x) != 1 for x in vocabulary):
        return False
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return False
    ours = _characters({"stoi": vocabulary}).backend_tokenizer
    return json.loads(ours.to_str()) == json.loads(core.to_str())
