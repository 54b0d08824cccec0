"""One text between the client that waits for it and the worker that writes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..belief import Belief
from ..provenance_record import Provenance
from .decoding import Text
from .knowledge_base import KnowledgeBase
from .metrics import Metrics
from .problems import ApiError, as_api_error
from .provenance_log import ProvenanceLog
from .sampling import Sampling
from .selection import Selection
from .snapshot import Snapshot
from .text_stream import TextStream

Reason = Literal["stop", "length", "abstained"]


@dataclass(frozen=True)
class Wanted:
    """One text that a client asks for.

    Args:
        prompt: as text, for the log.
        query: what beliefs are looked up by.
        prompt_ids: what is continued.
        beliefs: keys or ids; None: those that `query` is about.
        min_confidence: below it nothing is written.
    """

    request_id: str
    prompt: str
    query: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    use_knowledge: bool = True
    beliefs: tuple[str, ...] | None = None
    min_confidence: float | None = None


@dataclass(frozen=True)
class Answer:
    """A whole text.

    Attributes:
        revision: of the store, the same from its first token to its last.
        layers: names of the maps that its beliefs change.
    """

    text: str
    finish_reason: Reason
    prompt_tokens: int
    completion_tokens: int
    provenance: Provenance | None
    categories: dict[str, str]
    layers: tuple[str, ...]
    revision: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Some more of a text."""

    text: str


Event = Piece | Answer | ApiError
Emit = Callable[[Event], None]


class Tools(NamedTuple):
    """What every text needs: model and beliefs, the log that it is noted in, and what counts it."""

    base: KnowledgeBase
    log: ProvenanceLog
    metrics: Metrics


class TextJob:
    """A text that somebody waits for; a `worker.Job`.

    Args:
        wanted: what to write.
        deadline: see `worker.Job`.
        emit: told of each piece and then of the whole, or of a refusal; by the worker's thread.
    """

    def __init__(self, tools: Tools, wanted: Wanted, deadline: float, emit: Emit) -> None:
        self._tools, self._wanted, self._emit = tools, wanted, emit
        self.deadline, self.is_cancelled = deadline, False
        self._submitted = time.monotonic()
        self._stream = TextStream(tools.base.tokenizer, wanted.prompt_ids, wanted.stops)
        self._selection: Selection | None = None
        self._provenance: Provenance | None = None
        self._snapshot: Snapshot = tools.base.snapshot
        self._text: Text | None = None

    def prepare(self) -> Text | None:
        """Choose the beliefs as the store is now."""
        wanted, base = self._wanted, self._tools.base
        self._snapshot = snapshot = base.snapshot
        ids: tuple[str, ...] = ()
        if wanted.use_knowledge:
            selection = base.selector.select(wanted.query, wanted.beliefs, snapshot)
            self._selection, ids = selection, selection.ids
            self._provenance = base.selector.assess(selection, wanted.prompt_ids, snapshot)
            if self._is_too_unsure():
                self._finish("abstained", 0)
                return None
        self._text = Text(
            wanted.prompt_ids, wanted.max_new_tokens, base.end_tokens, wanted.sampling, ids
        )
        return self._text

    def hear(self, text: Text, token: int | None) -> bool:
        """Pass on what can be said; False once a stop string was written."""
        piece = "" if token is None else self._stream.push(token)
        if piece:
            self._emit(Piece(piece))
        reason: Reason | None = "stop" if self._stream.is_stopped else text.finish_reason
        if reason is None:
            return True
        if rest := self._stream.finish():
            self._emit(Piece(rest))
        self._finish("stop" if self._stream.is_stopped else reason, len(text.written))
        return False

    def fail(self, error: BaseException) -> None:
        """Say why there is no (more) text."""
        refusal = as_api_error(error)
        written = 0 if self._text is None else len(self._text.written)
        reason = "cancelled" if self.is_cancelled else refusal.code
        with suppress(ApiError):
            self._record(reason, written)
        self._emit(refusal)

    def _is_too_unsure(self) -> bool:
        least, found = self._wanted.min_confidence, self._provenance
        return least is not None and found is not None and found.confidence < least

    def _finish(self, reason: Reason, written: int) -> None:
        try:
            self._record(reason, written)
        except ApiError as error:
            self._emit(error)
            return
        found = self._provenance
        beliefs = [self._snapshot.find(s.id) for s in found.sources] if found else []
        self._emit(
            Answer(
                text=self._stream.text,
                finish_reason=reason,
                prompt_tokens=len(self._wanted.prompt_ids),
                completion_tokens=written,
                provenance=found,
                categories={belief.id: category_of(belief) for belief in beliefs},
                layers=tuple(sorted({name for b in beliefs for name in b.delta.factors})),
                revision=self._snapshot.revision,
                seconds=time.monotonic() - self._submitted,
            )
        )

    def _record(self, reason: str, written: int) -> None:
        tools, found = self._tools, self._provenance
        tools.metrics.finished.labels(reason).inc()
        tools.metrics.tokens.labels("prompt").inc(len(self._wanted.prompt_ids))
        tools.metrics.tokens.labels("completion").inc(written)
        if found is not None and found.calibrated:
            tools.metrics.confidence.observe(found.confidence)
        sources = found.sources if found else ()
        tools.log.answer(
            self._wanted.request_id,
            self._wanted.prompt,
            {
                "finish_reason": reason,
                "sources": [[s.id, s.key, s.version, s.score] for s in sources],
                "named": bool(self._selection and self._selection.is_named),
                "confidence": found.confidence if found and found.calibrated else None,
                "store_revision": self._snapshot.revision,
                "prompt_tokens": len(self._wanted.prompt_ids),
                "completion_tokens": written,
                "milliseconds": round(1000 * (time.monotonic() - self._submitted), 1),
            },
        )


def category_of(belief: Belief) -> str:
    """The domain of its fact; of a belief without one, its key up to the first slash."""
    return belief.fact.domain if belief.fact is not None else belief.key.partition("/")[0]
