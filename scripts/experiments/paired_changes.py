"""How much two losses of the same windows differ, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired(losses: Sequence[float], control: Sequence[float]) -> dict[str, float | None]:
    """`change`: mean difference of the same windows; `change_error`: its standard error, None of
    one window."""
    differences = [a - b for a, b in zip(losses, control, strict=True)]
    several = len(differences) > 1
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if several else None
    return {"change": statistics.fmean(differences), "change_error": error}


def pooled_error(errors: Sequence[float | None], apart: bool) -> float | None:
    """Standard error of the mean of several runs' changes, from that of each over as many windows.

    Args:
        errors: of the runs; None is not known.
        apart: whether the runs have other windows each; if not, their windows are the same ones,
            and more runs do not make the error smaller.
    """
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    mean_square = statistics.fmean(error**2 for error in known)
    return math.sqrt(mean_square / len(known)) if apart else math.sqrt(mean_square)
