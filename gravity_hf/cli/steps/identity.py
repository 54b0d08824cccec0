"""What tells inputs of one name apart: they are part of the fingerprints of the steps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...training.data_arguments import DataArguments

_SAMPLE = 1 << 20


def host_identity(model: str) -> dict[str, Any]:
    """What tells one host from another of the same name: its config and a sample of its weights."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from transformers import AutoConfig

        try:
            revision = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
        except (OSError, ValueError):
            revision = None  # `load` says what is wrong
        return {"revision": revision}
    names = ("*.json", "*.safetensors", "*.bin")
    files = sorted(file for name in names for file in folder.glob(name))
    return {"files": {file.name: sampled_digest(file) for file in files}}


def sampled_digest(file: Path) -> str:
    """Hash of size, beginning, middle and end: other weights differ everywhere."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            stream.seek(max(start, 0))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def data_identity(data: DataArguments) -> dict[str, str]:
    """What tells files of one name apart; where a file is missing, `prepare_data` says so."""
    names = [*(data.text_files or ()), *(data.chat_files or ()), *(data.validation_files or ())]
    files = [Path(name) for name in names]
    return {str(file): sampled_digest(file) for file in files if file.is_file()}
