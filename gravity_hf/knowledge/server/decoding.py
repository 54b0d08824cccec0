"""Writes several texts at once, one token of each in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .lanes import Caller, Lane, Route
from .problems import ApiError
from .sampling import Chooser, Sampling


@dataclass(eq=False)
class Text:
    """A text being written.

    Args:
        prompt_ids: what it continues, at least one token.
        max_new_tokens: at most.
        ends: tokens that end it; they are not part of it.
        sampling: how its tokens are chosen.
        beliefs: ids of the deltas under which it is written.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    beliefs: Sequence[str] = ()
    written: list[int] = field(default_factory=list, init=False)
    finish_reason: Literal["stop", "length"] | None = field(default=None, init=False)
    chooser: Chooser = field(init=False)

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.sampling)

    @property
    def ids(self) -> list[int]:
        """Prompt and text."""
        return [*self.prompt_ids, *self.written]

    def take(self, logits: Tensor) -> int | None:
        """Choose a token from `logits [V]`; None where it is an end. Sets `finish_reason` once the
        text is whole.

        Raises:
            ApiError: 500, the logits are not finite.
        """
        if not logits.amax().isfinite():
            raise ApiError(500, "the model's logits are not finite", "not_finite")
        token = self.chooser.choose(logits, self.written)
        if token in self.ends:
            self.finish_reason = "stop"
            return None
        self.written.append(token)
        if len(self.written) >= self.max_new_tokens:
            self.finish_reason = "length"
        return token


class Decoder:
    """The texts in work. Not thread-safe: one thread owns it and the model.

    Args:
        caller: of the model.
        route: `DeltaBank.routed` of the bank that has the texts' beliefs.
        batch_rows: how many texts share a forward pass; see `Lane` for what that costs.
    """

    def __init__(self, caller: Caller, route: Route, batch_rows: int = 1) -> None:
        self._caller, self._route, self._batch_rows = caller, route, batch_rows
        self._lanes: list[Lane] = []

    def __len__(self) -> int:
        return sum(len(lane.rows) for lane in self._lanes)

    def texts(self) -> list[Text]:
        """Those in work."""
        return [text for lane in self._lanes for text in lane.rows]

    def start(self, text: Text) -> Tensor:
        """Read a text's prompt and keep it in work; logits `[V]` of its first token, for
        `Text.take`."""
        lane = next((lane for lane in self._lanes if lane.has_room()), None)
        if lane is None:
            lane = Lane(self._caller, self._route, self._batch_rows)
        logits = lane.join(text, text.prompt_ids, text.beliefs)
        if lane not in self._lanes:
            self._lanes.append(lane)
        return logits

    def step(self) -> list[tuple[list[Text], Tensor | Exception]]:
        """One forward pass of every lane: its texts with logits `[B, V]`, or with what went wrong.

        A lane that fails takes no other with it.
        """
        done: list[tuple[list[Text], Tensor | Exception]] = []
        for lane in self._lanes:
            texts = list(lane.rows)
            try:
                done.append((texts, lane.step([text.ids for text in texts])))
            except Exception as error:
                done.append((texts, error))
        return done

    def stop(self, text: Text) -> None:
        """Take a text out; its place is free at once."""
        for lane in self._lanes:
            lane.leave(text)
        self._lanes = [lane for lane in self._lanes if lane.rows]

    def close(self) -> None:
        """Forget all texts."""
        for lane in self._lanes:
            lane.close()
        self._lanes = []
