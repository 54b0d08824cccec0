"""Outcomes of promises, and the record that they add up to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gravity_hf.integration.support_table import (
    NOT_APPLICABLE,
    PASSED,
    PROMISES,
    RAISED,
    WRONG,
    SupportRecord,
)

_REASON_LENGTH = 300


class Outcome(NamedTuple):
    """`kind`: one of "passed", "wrong", "raised", "not applicable"; `reason`: why not passed."""

    kind: str
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == PASSED

    @property
    def failed(self) -> bool:
        return self.kind in (WRONG, RAISED)

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


OK = Outcome(PASSED)


def wrong(reason: str) -> Outcome:
    """It ran, and the result is not what it should be."""
    return Outcome(WRONG, reason)


def not_applicable(reason: str) -> Outcome:
    return Outcome(NOT_APPLICABLE, reason)


def raised(error: BaseException) -> Outcome:
    return Outcome(RAISED, in_words(error))


def attempt(check: Callable[[], Outcome]) -> Outcome:
    """The outcome of a check; an exception in it is one, too."""
    try:
        return check()
    except Exception as error:  # whatever a model raises is the finding
        return raised(error)


def unless_the_host(outcome: Outcome, host: Outcome) -> Outcome:
    """A failed outcome does not count where the unpatched host fails in the same check."""
    if not outcome.failed or not host.failed:
        return outcome
    return not_applicable(f"the host's own fails, too ({host})")


def in_words(error: BaseException) -> str:
    """One line: the class and the message, without addresses, cut to a length for tables."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


def collapsed(names: Iterable[str]) -> tuple[str, ...]:
    """Dotted module names with numbers as `*`, each once, in order."""
    return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


def status_of(outcomes: dict[str, Outcome]) -> tuple[str, str]:
    """Status and reason of a model that was patched."""
    failed = [f"{name} ({outcome})" for name, outcome in outcomes.items() if outcome.failed]
    missing = [name for name in PROMISES if name not in outcomes]
    if failed or missing:
        return "partly", "; ".join(failed) or f"not tried: {', '.join(missing)}"
    return "passes", ""


def regressions(now: SupportRecord, before: SupportRecord) -> list[str]:
    """What was kept `before` and is not now, in words; a promise that no longer applies counts."""
    lost = [
        f"{name}: {now.promises.get(name, f'not tried, {now.status}: {now.reason}')}"
        for name in before.kept
        if name not in now.kept
    ]
    if before.status == "passes" and now.status != "passes" and not lost:
        lost.append(f"status {now.status}: {now.reason}")
    return lost


# What must hold of a type that passes, on whatever version of transformers.
_EVERYWHERE = ("patched", "reached", "correct")


def regressions_elsewhere(now: SupportRecord, before: SupportRecord) -> list[str]:
    """What is worse `now`, on another version of transformers than `before`: numbers that are
    wrong, and of a type that passed there that gravity does not run, or not by the reference."""
    lost = [
        f"{name}: {now.promises.get(name, f'not tried, {now.status}: {now.reason}')}"
        for name in _EVERYWHERE
        if before.status == "passes" and name not in now.kept
    ]
    return list(dict.fromkeys([*silent_failures(now), *lost]))


_NEARNESS = ("calibrated", "converges")


def silent_failures(record: SupportRecord) -> list[str]:
    """Promises about numbers that were broken without an error.

    Not among them: how near the calibrated model is to its host. That is how sensitive the host is,
    a random mixture of experts for example; that no term of the host is lost, `host` says exactly.
    """
    return [
        f"{name}: {outcome}"
        for name, outcome in record.broken.items()
        if outcome.startswith(WRONG) and name not in _NEARNESS
    ]
