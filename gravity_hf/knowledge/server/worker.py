"""The one thread that uses the model: texts in turn, changes of the store between them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from .decoding import Decoder, Text
from .metrics import Metrics
from .problems import ApiError

_logger = logging.getLogger(__name__)


class Job(Protocol):
    """A text that somebody waits for. Its methods are called by the worker's thread."""

    deadline: float
    """`time.monotonic()` after which nobody wants it."""
    is_cancelled: bool
    """Set by whoever submitted it."""

    def prepare(self) -> Text | None:
        """What to write, chosen now that it is the job's turn; None: nothing, it has ended."""

    def hear(self, text: Text, token: int | None) -> bool:
        """A token was written, or an end (None). Whether to go on."""

    def fail(self, error: BaseException) -> None:
        """There will be no more of it."""


class Operation:
    """Something that has the model and the store to itself.

    Args:
        action: called in the worker's thread while no text is being written.
        deadline: `time.monotonic()` after which it is not begun any more.
    """

    def __init__(self, action: Callable[[], Any], deadline: float) -> None:
        self.action, self.deadline = action, deadline
        self.future: Future[Any] = Future()


class QueueFullError(ApiError):
    """429, with the seconds after which to try again."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(
            429,
            f"expected fewer texts waiting for the model, got {waiting}: try again later",
            headers={"Retry-After": str(max(1, math.ceil(seconds)))},
        )


class Worker:
    """Takes jobs first come, first served; up to `active_rows` are written at the same time.

    An operation waits until the texts before it are written, and the texts after it wait for the
    operation: each text sees one state of the store from its first token to its last.

    Args:
        decoder: writes; used by this thread only.
        before_text: called before a text is begun while none is being written, such as to look for
            changes that another process made.
        active_rows, queue: bounds of texts in work, of texts waiting.
        metrics: counts.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        active_rows: int,
        queue: int,
        metrics: Metrics,
        before_text: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder, self._metrics, self._before_text = decoder, metrics, before_text
        self._active_rows, self._queue = active_rows, queue
        self._waiting: deque[Job | Operation] = deque()
        self._active: dict[Text, Job] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._seconds_per_text = 1.0
        self._began: dict[Text, float] = {}
        self._thread = threading.Thread(target=self._run, name="gravity-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether there is somebody who takes jobs."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def load(self) -> tuple[int, int]:
        """Texts and operations waiting, texts in work."""
        return len(self._waiting), len(self._active)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, all or none.

        Raises:
            QueueFullError: not all find room.
            ApiError: 503, the worker is closing.
        """
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(jobs) > self._queue:
                rounds = (len(self._waiting) + len(self._active)) / self._active_rows
                raise QueueFullError(len(self._waiting), rounds * self._seconds_per_text)
            self._waiting.extend(jobs)
            self._changed.notify()

    def operate(self, operation: Operation) -> None:
        """Put an operation into the queue; its `future` has the outcome. Raises as `submit`."""
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self._queue:
                raise QueueFullError(len(self._waiting), self._seconds_per_text)
            self._waiting.append(operation)
            self._changed.notify()

    def wake(self) -> None:
        """Look at the jobs again: one was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Take nothing new; finish what is in work or, after `seconds`, end it with 503."""
        with self._changed:
            self._is_closing = True
            for entry in self._waiting:
                _give_up(entry, _closing())
            self._waiting.clear()
            for job in self._active.values():
                job.deadline = min(job.deadline, time.monotonic() + seconds)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 5.0)

    def _check_open(self) -> None:
        if not self.is_alive:
            raise _closing()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_unwanted()
                self._admit()
                self._advance()
            except Exception as error:
                # A mistake in the loop itself: whoever waits must not wait for ever.
                _logger.exception("the worker failed; its texts are given up")
                for text in list(self._active):
                    self._end(text, error)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._waiting and not self._active and not self._is_closing:
                self._changed.wait()
            self._metrics.waiting.set(len(self._waiting))
            self._metrics.active.set(len(self._active))
            return bool(self._active) or not self._is_closing

    def _drop_unwanted(self) -> None:
        """Rows of clients that left, and what is past its time, make room at once."""
        now = time.monotonic()
        with self._changed:
            late = [entry for entry in self._waiting if _is_unwanted(entry, now)]
            for entry in late:
                self._waiting.remove(entry)
        for entry in late:
            _give_up(entry, _late(started=False))
        for text, job in list(self._active.items()):
            if _is_unwanted(job, now):
                self._end(text, _closing() if self._is_closing else _late(started=True))

    def _admit(self) -> None:
        while (entry := self._next()) is not None:
            if isinstance(entry, Operation):
                _carry_out(entry)
            else:
                self._begin(entry)

    def _next(self) -> Job | Operation | None:
        """What can be begun now. An operation at the head holds back what came after it."""
        with self._changed:
            if not self._waiting or len(self._active) >= self._active_rows:
                return None
            if isinstance(self._waiting[0], Operation) and self._active:
                return None
            return self._waiting.popleft()

    def _begin(self, job: Job) -> None:
        text = None
        try:
            if not self._active:
                self._before_text()
            if (text := job.prepare()) is None:
                return
            self._active[text], self._began[text] = job, time.monotonic()
            self._take(text, self._decoder.start(text))
        except Exception as error:
            if text is None:
                job.fail(error)
            else:
                self._end(text, error)

    def _advance(self) -> None:
        for texts, outcome in self._decoder.step():
            for i, text in enumerate(texts):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    self._take(text, outcome[i])
                except Exception as error:
                    self._end(text, error)

    def _take(self, text: Text, logits: Tensor) -> None:
        token = text.take(logits)
        goes_on = self._active[text].hear(text, token)
        if not goes_on or text.finish_reason is not None:
            self._end(text)

    def _end(self, text: Text, error: BaseException | None = None) -> None:
        self._decoder.stop(text)
        job = self._active.pop(text)
        spent = time.monotonic() - self._began.pop(text)
        self._seconds_per_text += 0.2 * (spent - self._seconds_per_text)
        if error is not None:
            job.fail(error)


def _is_unwanted(entry: Job | Operation, now: float) -> bool:
    if isinstance(entry, Operation):
        return now > entry.deadline or entry.future.cancelled()
    return entry.is_cancelled or now > entry.deadline


def _carry_out(operation: Operation) -> None:
    if not operation.future.set_running_or_notify_cancel():
        return
    try:
        operation.future.set_result(operation.action())
    except Exception as error:
        operation.future.set_exception(error)


def _give_up(entry: Job | Operation, error: ApiError) -> None:
    if not isinstance(entry, Operation):
        entry.fail(error)
    elif entry.future.set_running_or_notify_cancel():
        entry.future.set_exception(error)


def _late(started: bool) -> ApiError:
    where = "while it was being written" if started else "before its turn came; nothing was done"
    return ApiError(504, f"the time for this request was over {where}")


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "30"})
