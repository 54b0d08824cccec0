"""Chats: exactly the assistant's tokens are learnt, and what cannot be known is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gravity_hf.training.chat import encode_chat
from gravity_hf.training.data import DataArguments, prepare_data
from gravity_hf.training.packing import IGNORED
from gravity_hf.training.tokenizers import byte_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "assistant? é漢"},
    {"role": "assistant", "content": "Yes, ü漢."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]
TURNS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '[end]' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '[end]' }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
)
REWRITING = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
REFUSING = "{{ raise_exception('no system here') }}"


def tokenizer_with(template: str | None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def runs(ids: list[int], mask: list[bool]) -> list[str]:
    """The text of every unbroken run of learnt tokens."""
    found, current = [], []
    for token, learnt in zip([*ids, 0], [*mask, False], strict=True):
        if learnt:
            current.append(token)
        elif current:
            found.append(bytes(current).decode())
            current = []
    return found


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (TURNS, ["Yes, ü漢.[end]", "No.[end]"]),
        (MARKED, ["Yes, ü漢.[end]", "No.[end]"]),
        (None, ["Yes, ü漢.\0", "No.\0"]),
    ],
    ids=["prefixes", "generation-blocks", "built-in"],
)
def test_exactly_the_assistants_tokens_are_learnt(template: str | None, answers: list[str]) -> None:
    chat = encode_chat(tokenizer_with(template), CHAT, "assistant", "here")
    assert runs(chat.ids.tolist(), chat.learnt.tolist()) == answers
    everything = encode_chat(tokenizer_with(template), CHAT, "all", "here")
    assert everything.ids.tolist() == chat.ids.tolist()
    assert everything.learnt.all()
    assert "Be brief." in bytes(everything.ids.tolist()).decode()


def test_an_answer_may_end_in_a_character_of_several_tokens() -> None:
    """Older transformers left the last bytes of such an answer out of the mask."""
    messages = [{"role": "assistant", "content": "ja 漢"}, {"role": "assistant", "content": "é"}]
    chat = encode_chat(tokenizer_with(BARE), messages, "assistant", "here")
    assert runs(chat.ids.tolist(), chat.learnt.tolist()) == ["ja 漢", "é"]


def test_a_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = tokenizer_with(REWRITING)
    with pytest.raises(ValueError, match=r"line 7: expected a chat template that keeps .* turns"):
        encode_chat(tokenizer, CHAT, "assistant", "a.jsonl, line 7")
    assert encode_chat(tokenizer, CHAT[:3], "assistant", "here").learnt.any()
    assert encode_chat(tokenizer, CHAT, "all", "here").learnt.all()


def test_chats_that_a_template_refuses_are_named() -> None:
    with pytest.raises(ValueError, match="line 3: .* it says: no system here"):
        encode_chat(tokenizer_with(REFUSING), CHAT, "assistant", "a.jsonl, line 3")
    with pytest.raises(ValueError, match="got the assistant first"):
        encode_chat(tokenizer_with(TURNS), CHAT[2:], "assistant", "here")
    with pytest.raises(ValueError, match="expected a message with role 'assistant'"):
        encode_chat(tokenizer_with(None), CHAT[:2], "assistant", "here")


def write_chats(folder: Path, *lines: str) -> str:
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def short_chats(tmp_path: Path) -> str:
    chats = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i:02}"}]
        for i in range(20)
    ]
    return write_chats(tmp_path, *(json.dumps({"messages": chat}) for chat in chats), "")


def learnt_runs(rows) -> list[str]:
    masks = [(row, (row["labels"] != IGNORED).tolist()) for row in rows]
    return [run for row, mask in masks for run in runs(row["input_ids"].tolist(), mask)]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_labels_are_the_answers(packing: str, tmp_path: Path) -> None:
    arguments = DataArguments(chat_files=[short_chats(tmp_path)], length=80, packing=packing)
    prepared = prepare_data(tokenizer_with(TURNS), arguments)
    held_out = learnt_runs(prepared.validation)
    assert len(held_out) == 2
    assert sorted(learnt_runs(prepared.train) + held_out) == [f"a{i:02}[end]" for i in range(20)]


def test_labels_of_blocks_are_parts_of_the_answers(tmp_path: Path) -> None:
    arguments = DataArguments(chat_files=[short_chats(tmp_path)], length=60, validation_share=0)
    prepared = prepare_data(tokenizer_with(TURNS), arguments)
    answers = [f"a{i:02}[end]" for i in range(20)]
    learnt = learnt_runs(prepared.train)
    assert all(any(part in answer for answer in answers) for part in learnt)
    whole = [part for part in learnt if part in answers]
    # A cut spoils at most one answer for each block.
    assert len(set(whole)) == len(whole) >= 20 - len(prepared.train) - 2


def test_a_long_chat_is_cut_at_its_end(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 100}]
    too_long = [{"role": "user", "content": "q" * 50}, chat[1]]
    file = write_chats(tmp_path, *(json.dumps({"messages": c}) for c in (chat, too_long)))
    arguments = DataArguments(chat_files=[file], length=40, packing="none", validation_share=0)
    prepared = prepare_data(tokenizer_with(TURNS), arguments)
    (row,) = prepared.train
    text = bytes(row["input_ids"].tolist()).decode()
    assert text == ("[user]q[end][assistant]" + "a" * 100)[:40]
    assert "no answer in their first 40 tokens: 1" in prepared.description


GOOD = json.dumps({"messages": CHAT})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 3: expected .* not JSON"),
        ("[1]", "line 3: expected .* got list"),
        ('{"message": []}', r"line 3: expected .* got \['message'\]"),
        ('{"messages": []}', "line 3: expected"),
        ('{"messages": [{"role": "user"}]}', r"line 3, message 1: .* got \['role'\]"),
        (
            '{"messages": [{"role": "user", "content": " "}]}',
            "line 3, message 1: expected text as content",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}',
            "message 1: expected the keys role and content",
        ),
    ],
)
def test_malformed_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = write_chats(tmp_path, GOOD, "", line)
    with pytest.raises(ValueError, match=message) as caught:
        prepare_data(tokenizer_with(None), DataArguments(chat_files=[file], length=16))
    assert str(caught.value).startswith(file)
