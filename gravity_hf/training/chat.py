"""Chats as tokens, and which of the tokens the assistant wrote.

Two ways to know that, by what the tokenizer's template offers:

- `{% generation %}` blocks: the template itself says what is the assistant's.
- Otherwise the chat is rendered up to each answer and up to its end. Where both are the beginning
  of the whole rendered chat, the text between them is the answer with its end-of-turn mark.
  Templates that rewrite earlier turns (dropping their reasoning, say) are refused: for them no
  piece of the text is what the model would have been given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
# For tokenizers without a template: each message under its role, an answer closed by the end token.
BUILT_IN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, str]


class EncodedChat(NamedTuple):
    """`ids`: int32 `[tokens]`; `learnt`: bool `[tokens]`, the tokens that the loss counts."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]


def read_chats(file: Path) -> Iterator[tuple[int, list[Message]]]:
    """Line number and messages of every chat of a JSONL file; blank lines are passed over.

    Raises:
        ValueError: with file and line, for a line that is not
            `{"messages": [{"role": ..., "content": ...}, ...]}` with text in every message.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _read_chat(line, f"{file}, line {number}")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], loss: str, where: str
) -> EncodedChat:
    """The chat in the tokenizer's own template, or in `BUILT_IN_TEMPLATE` where it has none.

    Args:
        tokenizer: a fast one, unless `loss` is `"all"`.
        messages: dicts with `role` and `content`.
        loss: `"assistant"` learns what the assistant writes; `"all"` learns every token.
        where: names the chat in errors.

    Raises:
        ValueError: the template refuses the chat, or does not tell whose a token is.
    """
    template = chat_template(tokenizer)
    if loss == "all":
        text = _render(tokenizer, template, messages, where)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return EncodedChat(np.array(ids, np.int32), np.ones(len(ids), bool))
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError(
            f"{where}: expected a message with role 'assistant' to learn from, got "
            f"{[message['role'] for message in messages]}. Leave the chat out, or set chat_loss=all"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"chat_loss: expected a fast tokenizer, which says what text a token stands for, got "
            f"{type(tokenizer).__name__}. Set chat_loss=all to learn every token"
        )
    if _GENERATION_BLOCK.search(template):
        return _by_template(tokenizer, template, messages, where)
    return _by_prefixes(tokenizer, template, messages, where)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in force, as text."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else BUILT_IN_TEMPLATE


def _by_template(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], where: str
) -> EncodedChat:
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except (TemplateError, ValueError) as error:
        raise _refused(where, error) from error
    learnt = np.array(encoded["assistant_masks"], bool)
    spans = encoded["offset_mapping"]
    # Older transformers end a mask at the first token of its last character, which may have more.
    for place in range(1, len(spans)):
        start, end = spans[place]
        learnt[place] |= learnt[place - 1] and end > start and spans[place - 1] == spans[place]
    return EncodedChat(np.array(encoded["input_ids"], np.int32), learnt)


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], where: str
) -> EncodedChat:
    text = _render(tokenizer, template, messages, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    learnt = np.zeros(len(starts), bool)
    for start, end in _answers(tokenizer, template, messages, text, where):
        learnt |= (ends > start) & (starts < end)
    return EncodedChat(np.array(encoded["input_ids"], np.int32), learnt)


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    text: str,
    where: str,
) -> Iterator[tuple[int, int]]:
    """First and last character of each of the assistant's messages in the rendered `text`."""
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        if index == 0:
            raise ValueError(
                f"{where}: expected a chat that somebody else begins, got the assistant first. Its "
                "template marks no answers, so where this one begins is unknown"
            )
        before = _render(tokenizer, template, messages[:index], where, asking=True)
        after = _render(tokenizer, template, messages[: index + 1], where)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{where}: expected a chat template that keeps earlier turns as they were, this "
                "one rewrites them, so which tokens are the assistant's is unknown. Use a template "
                "with {% generation %} blocks, or set chat_loss=all to learn every token"
            )
        yield len(before), len(after)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    where: str,
    *,
    asking: bool = False,
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=asking
        )
    except (TemplateError, ValueError) as error:
        raise _refused(where, error) from error


def _refused(where: str, error: Exception) -> ValueError:
    return ValueError(
        f"{where}: expected a chat that the tokenizer's template accepts, it says: {error}"
    )


def _read_chat(line: str, where: str) -> list[Message]:
    wanted = 'expected {"messages": [{"role": ..., "content": ...}, ...]}'
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {wanted}, got text that is not JSON ({error})") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        shown = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where}: {wanted}, got {shown}")
    return [check_message(message, where, place) for place, message in enumerate(messages, 1)]


def check_message(message: Any, where: str, place: int) -> Message:
    """`message` itself, if it is a role and a text. Dropping other keys would change the chat."""
    if not isinstance(message, dict) or sorted(message) != ["content", "role"]:
        shown = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise ValueError(
            f"{where}, message {place}: expected the keys role and content, got {shown}. Other "
            "keys, such as tool calls, cannot be learnt: leave such chats out"
        )
    for key in ("role", "content"):
        value = message[key]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{where}, message {place}: expected text as {key}, got {value!r}. Leave the "
                "message or the chat out"
            )
    return message
