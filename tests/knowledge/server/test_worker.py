"""The queue: first come, first served, bounded in number and in time; nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from knowledge.server.served import until

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.server.decoding import Decoder, Text
from gravity_hf.knowledge.server.lanes import Caller
from gravity_hf.knowledge.server.metrics import Metrics
from gravity_hf.knowledge.server.problems import ApiError
from gravity_hf.knowledge.server.worker import Operation, QueueFullError, Worker


class TestJob:
    """Writes until told to stop; says what happened to it."""

    __test__ = False

    def __init__(self, tokens: int = 10**6, deadline: float = float("inf")) -> None:
        self.deadline, self.is_cancelled = deadline, False
        self.text = Text([5, 6], tokens)
        self.heard, self.error = 0, None
        self.begun, self.ended = threading.Event(), threading.Event()
        self.fails_at = -1

    def prepare(self) -> Text:
        self.begun.set()
        return self.text

    def hear(self, text: Text, token: int | None) -> bool:
        self.heard += 1
        if self.heard == self.fails_at:
            raise ValueError("a mistake")
        # One cache for ever would grow beyond what the model's positions allow.
        if text.finish_reason is None and len(text.written) > 100:
            text.written.clear()
        if text.finish_reason is not None:
            self.ended.set()
        return True

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture
def worker(llama: Any) -> Iterator[Worker]:
    decoder = Decoder(Caller(llama), DeltaBank(llama).routed, 1)
    worker = Worker(decoder, active_rows=2, queue=3, metrics=Metrics())
    worker.start()
    yield worker
    worker.close(0.0)
    assert not worker._thread.is_alive()
    assert len(decoder) == 0


def begun(worker: Worker, count: int) -> list[TestJob]:
    jobs = [TestJob() for _ in range(count)]
    for job in jobs:
        worker.submit([job])
        assert job.begun.wait(20)
    return jobs


def test_a_cancelled_text_makes_room_for_the_next(worker: Worker) -> None:
    first, second = begun(worker, 2)
    third = TestJob(tokens=3)
    worker.submit([third])
    assert not third.begun.wait(0.05), "more texts at once than allowed"
    first.is_cancelled = True
    assert third.ended.wait(20) and third.error is None and len(third.text.written) == 3
    assert isinstance(first.error, ApiError) and second.error is None
    heard = first.heard
    until(lambda: second.heard > heard + 5, "the other goes on")
    assert first.heard == heard, "a cancelled text was written on"


def test_a_full_queue_refuses_all_or_none_and_says_when_to_try_again(worker: Worker) -> None:
    begun(worker, 2)
    worker.submit([TestJob(), TestJob()])
    with pytest.raises(QueueFullError) as refused:
        worker.submit([TestJob(), TestJob()])
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    assert worker.load == (2, 2)
    worker.submit([TestJob()])
    with pytest.raises(QueueFullError):
        worker.operate(Operation(lambda: None, float("inf")))


def test_a_text_past_its_time_is_stopped_for_real(worker: Worker) -> None:
    job = TestJob(deadline=time.monotonic() + 0.1)
    worker.submit([job])
    assert job.ended.wait(20)
    assert isinstance(job.error, ApiError) and job.error.status == 504
    assert worker.load == (0, 0)
    heard = job.heard
    time.sleep(0.05)
    assert job.heard == heard > 0


def test_a_text_that_waits_too_long_is_never_begun(worker: Worker) -> None:
    begun(worker, 2)
    late = TestJob(deadline=time.monotonic() + 0.05)
    worker.submit([late])
    assert late.ended.wait(20) and not late.begun.is_set()
    assert isinstance(late.error, ApiError) and late.error.status == 504


def test_an_operation_has_the_model_to_itself(worker: Worker) -> None:
    first = TestJob(tokens=20)
    worker.submit([first])
    seen: list[tuple[bool, bool]] = []
    after = TestJob(tokens=2)
    operation = Operation(
        lambda: seen.append((first.ended.is_set(), after.begun.is_set())), float("inf")
    )
    worker.operate(operation)
    worker.submit([after])
    operation.future.result(20)
    assert seen == [(True, False)]
    assert after.ended.wait(20) and after.error is None


def test_an_operation_that_fails_tells_whoever_asked_and_nobody_else(worker: Worker) -> None:
    def fails() -> None:
        raise ValueError("no")

    operation = Operation(fails, float("inf"))
    worker.operate(operation)
    with pytest.raises(ValueError, match="no"):
        operation.future.result(20)
    job = TestJob(tokens=2)
    worker.submit([job])
    assert job.ended.wait(20) and job.error is None


def test_a_late_operation_is_not_begun(worker: Worker) -> None:
    begun(worker, 1)
    done: list[int] = []
    operation = Operation(lambda: done.append(1), time.monotonic() + 0.05)
    worker.operate(operation)
    with pytest.raises(ApiError, match="nothing was done"):
        operation.future.result(20)
    assert done == []


def test_a_text_that_fails_takes_no_other_with_it(worker: Worker) -> None:
    (other,) = begun(worker, 1)
    bad = TestJob()
    bad.fails_at = 3
    worker.submit([bad])
    assert bad.ended.wait(20) and isinstance(bad.error, ValueError)
    heard = other.heard
    until(lambda: other.heard > heard, "the other goes on")
    assert other.error is None


def test_closing_ends_every_wait(llama: Any) -> None:
    decoder = Decoder(Caller(llama), DeltaBank(llama).routed, 1)
    worker = Worker(decoder, active_rows=1, queue=3, metrics=Metrics())
    worker.start()
    (active,) = begun(worker, 1)
    waiting, operation = TestJob(), Operation(lambda: None, float("inf"))
    worker.submit([waiting])
    worker.operate(operation)
    worker.close(0.1)
    for job in (active, waiting):
        assert isinstance(job.error, ApiError) and job.error.status == 503
    with pytest.raises(ApiError, match="shutting down"):
        operation.future.result(0)
    with pytest.raises(ApiError, match="shutting down"):
        worker.submit([TestJob()])
    assert not worker.is_alive


def test_texts_in_work_may_end_while_closing(llama: Any) -> None:
    worker = Worker(
        Decoder(Caller(llama), DeltaBank(llama).routed, 1),
        active_rows=1,
        queue=3,
        metrics=Metrics(),
    )
    worker.start()
    job = TestJob(tokens=30)
    worker.submit([job])
    assert job.begun.wait(20)
    worker.close(20.0)
    assert job.error is None and len(job.text.written) == 30


def test_a_mistake_before_a_text_is_its_own(llama: Any) -> None:
    def fails() -> None:
        raise OSError("the disk is gone")

    worker = Worker(
        Decoder(Caller(llama), DeltaBank(llama).routed, 1),
        active_rows=1,
        queue=3,
        metrics=Metrics(),
        before_text=fails,
    )
    worker.start()
    job = TestJob(tokens=3)
    worker.submit([job])
    assert job.ended.wait(20) and isinstance(job.error, OSError)
    assert worker.is_alive
    worker.close(0.0)
