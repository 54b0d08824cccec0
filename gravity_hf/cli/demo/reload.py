"""Loads the demonstration's model in a process of its own: what was saved must be what ran.

Run as `python -m gravity_hf.cli.demo.reload REQUEST`, a JSON file that `check_in_new_process`
writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PACKAGE_PARENT = Path(__file__).resolve().parents[3]
# Same arithmetic on the same machine is bit-equal; thread counts may differ where limits are set.
TOLERANCE = 1e-4
_TEMPERATURE = 0.8


def check_in_new_process(
    model: nn.Module, folder: Path, ids: torch.Tensor, prompt: str, length: int, seed: int
) -> dict[str, Any]:
    """Load `folder` in a fresh Python, compare its logits on `ids` with `model`'s, let it write.

    Returns:
        `sample`, `logits_difference` (largest absolute), `identical`, `process`.
    """
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected, request, answer = (folder.parent / f".reload.{n}" for n in ("st", "json", "answer"))
    try:
        save_file({"ids": ids, "logits": logits.contiguous()}, expected)
        wanted = {"folder": folder, "expected": expected, "answer": answer, "prompt": prompt}
        content = {name: str(value) for name, value in wanted.items()}
        content |= {"length": length, "seed": seed, "threads": torch.get_num_threads()}
        request.write_text(json.dumps(content), encoding="utf-8")
        _run(request)
        return json.loads(answer.read_text(encoding="utf-8"))
    finally:
        for file in (expected, request, answer):
            file.unlink(missing_ok=True)


def _run(request: Path) -> None:
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "gravity_hf.cli.demo.reload", str(request)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"demo: the saved model did not load in a new process: {last}. The folder is kept; "
            "load it with gravity_hf.load_gravity_model to see the whole error"
        )


def _answer(request: Path) -> None:
    from transformers import AutoTokenizer

    from ...integration.loading import load_gravity_model
    from ...training.samples import generation_samples
    from ..console import quiet_libraries

    wanted = json.loads(request.read_text(encoding="utf-8"))
    quiet_libraries()
    torch.set_num_threads(wanted["threads"])
    model = load_gravity_model(wanted["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(wanted["folder"])
    saved = load_file(wanted["expected"])
    with torch.no_grad():
        logits = model(input_ids=saved["ids"], use_cache=False).logits
    (written,) = generation_samples(
        model,
        tokenizer,
        [wanted["prompt"]],
        max_new_tokens=wanted["length"],
        temperature=_TEMPERATURE,
        seed=wanted["seed"],
    )
    answer = {
        "prompt": wanted["prompt"],
        "sample": written["text"],
        "logits_difference": (logits - saved["logits"]).abs().max().item(),
        "identical": torch.equal(logits, saved["logits"]),
        "process": os.getpid(),
    }
    Path(wanted["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
