"""A model that answers while one watches, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from ..training.measures import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0: the likeliest always. `top_k` 0: from all of them.
    `top_p` 1: however unlikely."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int

    def options(self) -> dict[str, Any]:
        """For `generate`."""
        if not self.temperature:
            return {"do_sample": False}
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True, **drawn}


@dataclass(frozen=True)
class Answer:
    """`ids` without the token that ends a text. `stopped`: by the user. `is_whole`: the model
    itself came to an end."""

    text: str
    ids: tuple[int, ...]
    stopped: bool
    is_whole: bool


class Answerer:
    """Writes answers with a model; the nth from a seed is drawn with seed + n.

    The random state of the process stays as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self.window = window_of(model)
        self.seed = seed

    @property
    def room(self) -> int | None:
        """Tokens that a prompt may have: an answer gets the rest of the window, half at most."""
        if self.window is None:
            return None
        return self.window - min(self._sampling.max_new_tokens, self.window // 2)

    def require_known(self, ids: Sequence[int]) -> None:
        """ValueError for a token that the model does not know."""
        known = self._model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise ValueError(
                f"expected tokens below {known}, the model's vocabulary, got {max(ids)} from the "
                "tokenizer. Put the tokenizer that the model was trained with beside it"
            )

    def answer(self, ids: Sequence[int], show: Callable[[str], None]) -> Answer:
        """What the model writes after `ids`, shown as it comes. KeyboardInterrupt ends it."""
        stream = AnswerStream(self._tokenizer, show)
        stopped = False
        try:
            self._generate(ids, stream)
        except KeyboardInterrupt:
            stopped = True
            stream.end()
        self.seed += 1
        written = stream.ids
        is_whole = bool(written) and written[-1] in self._ends()
        if is_whole:
            written = written[:-1]
        return Answer(stream.text, tuple(written), stopped, is_whole)

    def _generate(self, ids: Sequence[int], stream: AnswerStream) -> None:
        device = next(self._model.parameters()).device
        prompt = torch.tensor([list(ids)], device=device)
        most = self._sampling.max_new_tokens
        if self.window is not None:
            most = min(most, self.window - len(ids))
        ends = sorted(self._ends())
        devices = [device] if device.type == "cuda" else []
        with evaluating(self._model), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=most,
                eos_token_id=ends or None,
                pad_token_id=self._padding(ends),
                streamer=stream,
                **self._sampling.options(),
            )

    def _ends(self) -> set[int]:
        """Tokens that end an answer: the model's own, else the tokenizer's."""
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _padding(self, ends: Sequence[int]) -> int | None:
        padding = self._tokenizer.pad_token_id
        return padding if padding is not None else next(iter(ends), None)


class AnswerStream(TextStreamer):
    """Gives text on in whole characters, and keeps it, with its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self.text = ""
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if stream_end:
            # Bytes of a character whose others never came.
            text = text.rstrip(_UNFINISHED)
        if text:
            self.text += text
            self._show(text)


def window_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model takes at once; None where its config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 1 else None
