"""What lies in the folder of an export beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

EXPORT_FILE = "export.json"

# What lies beside the weights and holds for every format of the same model.
_COMPANIONS = (
    *("config.json", "modeling_gravity.py", "generation_config.json", "calibration.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    "*_Pooling/config.json",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy settings, tokenizer and code; what `target` has already is not replaced."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            place = target / file.relative_to(source)
            if file.is_file() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def bytes_of(folder: Path, *patterns: str) -> int:
    """Size on disk of the files that match."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)
