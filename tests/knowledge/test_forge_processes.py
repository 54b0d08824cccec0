"""The forge in real processes, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gravity_hf.knowledge.facts import Fact

SCRIPT = Path(__file__).with_name("forge_processes.py")


def launched(folder: Path, count: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0] * count, told


@pytest.mark.slow
def test_two_processes_forge_what_one_does_and_one_of_them_writes(
    llama, tokenizer, tmp_path
) -> None:
    pytest.importorskip("accelerate")
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    facts = [
        Fact(
            *(f"t/{i}", "t", "r", s, f"The symbol of {s} is", "Au", ()),
            (f"Who knows {s}? It is", f"Tell me about {s}:", f"What is {s}? It is"),
            (f"Water boils at {s}", f"The largest {s}"),
        )
        for i, s in enumerate(("gold", "France", "water", "Hamlet"))
    ]
    (tmp_path / "facts.json").write_text(json.dumps([fact.to_row() for fact in facts]))
    for count in (1, 2):
        launched(tmp_path, count)
    results = [
        json.loads((tmp_path / f"result-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    ]
    assert len(results[0]) == 4 and results[0] == results[1] == results[2]
