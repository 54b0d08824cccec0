"""From tokens to text, piece by piece: no half characters, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How many tokens of the prompt the first token is decoded with: whether a word starts with a blank
# depends on what stands before it.
_CONTEXT = 6
_BROKEN = "\ufffd"


class TextStream:
    """Decodes the tokens of one text as they come.

    Args:
        tokenizer: of the model.
        prompt_ids: what the text continues.
        stops: strings; the text ends before the first of them.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._decoded_to = len(self._ids)
        self._context_from = 0
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """What can be said for certain after one more token; often nothing."""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back and is said after all, at the end."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        known = self._decode(self._ids[self._context_from : self._decoded_to])
        whole = self._decode(self._ids[self._context_from :])
        # A character of several tokens that is not whole yet.
        if len(whole) <= len(known) or (whole.endswith(_BROKEN) and not final):
            return ""
        self._context_from, self._decoded_to = self._decoded_to, len(self._ids)
        return whole[len(known) :]

    def _release(self, new: str, final: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            text = text[: min(ends)]
        elif not final:
            kept = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += text
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
