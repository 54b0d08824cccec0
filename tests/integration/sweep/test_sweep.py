"""Every model type of transformers keeps the promises that the support table says it keeps.

A fixed part runs by default: the families named in `hosts`, and the types whose hash falls into one
of three parts. The others are marked slow: `pytest tests/integration/sweep -m slow`.
"""

from __future__ import annotations

import pytest
import transformers
from integration.sweep.categories import all_model_types
from integration.sweep.examine import examine
from integration.sweep.outcomes import regressions, regressions_elsewhere, silent_failures
from integration.sweep.parts import named_types, part_of

from gravity_hf.integration.support_table import SupportRecord, support_table


def _parameters() -> list[object]:
    named = named_types()
    return [
        name if name in named or part_of(name) == 0 else pytest.param(name, marks=pytest.mark.slow)
        for name in all_model_types()
    ]


def _findings(record: SupportRecord) -> list[str]:
    """What is wrong with a record: worse than the table says, or, on another transformers, wrong in
    its numbers without an error, or without gravity where the table's had it."""
    table = support_table()
    if table.versions["transformers"] == transformers.__version__:
        return regressions(record, table.of(record.model_type))
    before = table.records.get(record.model_type)
    return silent_failures(record) if before is None else regressions_elsewhere(record, before)


@pytest.mark.parametrize("model_type", _parameters())
def test_model_type_keeps_its_promises(model_type: str) -> None:
    record = examine(model_type)
    assert _findings(record) == []
    assert record.status == "passes" or record.reason, "expected a reason for not passing"
