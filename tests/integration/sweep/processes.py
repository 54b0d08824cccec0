"""Examinations in processes of their own: a time limit, and a crash that ends only one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch

from gravity_hf.integration.support_table import SupportRecord

from .categories import category_of
from .examine import examine

# Forked after the heavy imports, so that a model type costs its own work only.
_CONTEXT = multiprocessing.get_context("fork")


class _Running(NamedTuple):
    model_type: str
    process: multiprocessing.process.BaseProcess
    deadline: float


def examine_all(
    model_types: Iterable[str], jobs: int = 1, limit_s: float = 60.0
) -> Iterator[SupportRecord]:
    """One record per model type, in the order in which they finish.

    Args:
        jobs: processes at a time, one thread each.
        limit_s: seconds after which an examination is ended; its record says so.
    """
    waiting = list(model_types)[::-1]
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                end, started = _start(waiting.pop(), limit_s)
                running[end] = started
            for end in _ready(running):
                yield _finish(end, running.pop(end), limit_s)
    finally:
        for end, started in running.items():
            _stop(end, started)


def _start(model_type: str, limit_s: float) -> tuple[Connection, _Running]:
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    return mine, _Running(model_type, process, time.monotonic() + limit_s)


def _work(model_type: str, end: Connection) -> None:
    # What hosts print and warn about does not belong into the progress bar.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    end.send(examine(model_type).to_dict())


def _ready(running: dict[Connection, _Running]) -> list[Connection]:
    """Those that have an answer, have ended, or must be ended now; waits for the first of them."""
    now = time.monotonic()
    next_deadline = min(started.deadline for started in running.values())
    answered = wait(list(running), timeout=max(0.0, next_deadline - now))
    late = [end for end, started in running.items() if started.deadline <= time.monotonic()]
    return list(dict.fromkeys([*answered, *late]))  # type: ignore[list-item]


def _finish(end: Connection, started: _Running, limit_s: float) -> SupportRecord:
    try:
        content = end.recv() if end.poll() else None
        reason = f"no result within {limit_s:g} s"
    except EOFError:
        content = None
        started.process.join()
        reason = f"its process ended by {_ending(started.process.exitcode)}"
    _stop(end, started)
    if content is not None:
        return SupportRecord.from_dict(content)
    model_type = started.model_type
    return SupportRecord(model_type, category_of(model_type), status="no result", reason=reason)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _stop(end: Connection, started: _Running) -> None:
    end.close()
    started.process.kill()
    started.process.join()
