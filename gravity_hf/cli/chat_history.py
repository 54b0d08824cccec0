"""What the model is told of a conversation, as tokens, and what no longer fits into its window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """`ids`: all that the model is to read. For it were forgotten: `dropped`, the oldest turns of a
    chat; `cut`, the first tokens of a text."""

    ids: tuple[int, ...]
    dropped: int = 0
    cut: int = 0


class History(Protocol):
    """A conversation so far. `ask` changes nothing before `answered` keeps the turn."""

    def ask(self, text: str) -> Prompt: ...

    def answered(self, text: str, ids: Sequence[int]) -> None: ...

    def reset(self) -> None: ...


def history_of(tokenizer: PreTrainedTokenizerBase, room: int | None) -> History:
    """Turns in the tokenizer's chat template; one running text where it has none.

    Args:
        tokenizer: of the model.
        room: tokens that the model may read at most; None: any number.
    """
    return (ChatHistory if tokenizer.chat_template else TextHistory)(tokenizer, room)


class ChatHistory:
    """Questions and answers in the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int | None) -> None:
        self._tokenizer, self._room = tokenizer, room
        self._turns: list[tuple[str, str]] = []
        self._asked: tuple[list[tuple[str, str]], str] = ([], "")

    def ask(self, text: str) -> Prompt:
        """The conversation with the question `text`; the oldest turns go where it is too long.

        Raises:
            ValueError: the template refuses it, or the question alone is too long.
        """
        for dropped in range(len(self._turns) + 1):
            kept = self._turns[dropped:]
            ids = self._encode(kept, text)
            if self._room is None or len(ids) <= self._room:
                self._asked = (kept, text)
                return Prompt(tuple(ids), dropped)
        raise ValueError(
            f"expected a message of at most {self._room} tokens, in the model's window beside room "
            f"for an answer, got {len(ids)}. Shorten it, or lower --max-new-tokens"
        )

    def answered(self, text: str, ids: Sequence[int]) -> None:
        kept, asked = self._asked
        # Without an answer there is no turn, and templates want them to alternate.
        self._turns = [*kept, (asked, text)] if text else kept

    def reset(self) -> None:
        self._turns = []

    def _encode(self, turns: Sequence[tuple[str, str]], text: str) -> list[int]:
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": text}]
        for asked, answer in reversed(turns):
            messages[:0] = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise ValueError(
                f"expected a chat that the tokenizer's template accepts, it says: {error}"
            ) from error
        return list(encoded["input_ids"])


class TextHistory:
    """One text that both sides write on; the user's part of it always begins a line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int | None) -> None:
        self._tokenizer = tokenizer
        # What the tokenizer begins every text with, such as a BOS token.
        self._start: list[int] = list(tokenizer("")["input_ids"])
        self._room = None if room is None else room - len(self._start)
        self._text: list[int] = []
        self._asked: list[int] = []

    def ask(self, text: str) -> Prompt:
        """The text with `text` as its last line, a line break where that is empty. What does not
        fit is left out from the beginning.

        Raises:
            ValueError: there is no token in it.
        """
        line = "\n" + text if self._text else text or "\n"
        new = list(self._tokenizer(line, add_special_tokens=False)["input_ids"])
        if not self._start and not new:
            raise ValueError(
                f"expected a text of at least one token, got none for {line!r}. Write more"
            )
        whole = [*self._text, *new]
        cut = 0 if self._room is None else max(0, len(whole) - self._room)
        self._asked = whole[cut:]
        return Prompt((*self._start, *self._asked), cut=cut)

    def answered(self, text: str, ids: Sequence[int]) -> None:
        self._text = [*self._asked, *ids]

    def reset(self) -> None:
        self._text = []
