"""The conditions of a measurement: no number without them beside it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def run_conditions(device: torch.device | str | None = None) -> dict[str, Any]:
    """Device, versions, commit, date and command of this process, JSON-able.

    Args:
        device: where the work ran; None takes CUDA where there is one.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else processor_name(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **source_state(),
    }


def processor_name() -> str:
    """The processor and how many cores this machine has of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, None) or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def source_state() -> dict[str, Any]:
    """The commit of the source tree, and whether it was changed since; empty outside of git.

    `GRAVITY_HF_COMMIT` names the commit where the tree is a copy without history.
    """
    named = os.environ.get("GRAVITY_HF_COMMIT")
    if named:
        return {"commit": named}
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit": commit, "uncommitted_changes": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
