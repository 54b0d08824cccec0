"""scripts/benchmark/serve_beliefs.py: its percentiles, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from knowledge.conftest import make_llama

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "benchmark" / "serve_beliefs.py"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_beliefs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.parametrize(
    ("values", "expected"),
    [([5.0], (5, 5, 5)), (list(range(100, 0, -1)), (50, 95, 99)), ([1, 2, 3], (2, 3, 3))],
)
def test_percentiles_are_values_that_were_measured(
    script: Any, values: list[float], expected: tuple[float, ...]
) -> None:
    assert tuple(script.percentiles(values).values()) == expected


@pytest.mark.slow
def test_a_quick_run_writes_rows_and_conditions(tokenizer: Any, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "load.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model"), "--quick", "--device", "cpu"]
    subprocess.run([*command, "--output", str(out)], check=True, timeout=300)
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert row["requests"] == 4 and row["requests_per_s"] > 0
    assert row["latency_ms"]["p95"] >= row["first_ms"]["p50"] > 0
    assert str(tmp_path) not in out.read_text()
