"""The tokenizer or processor of the host that a gravity model was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from .checks import ADAPTER_CONFIG_FILE
from .tensor_files import read_json

_RESULTS_FILE = "results.json"


def save_host_files(export: Path, model: Any, target: Path, *, online: bool) -> list[str]:
    """Save the host's tokenizer or processor to `target`; what people should know if there is none.

    Args:
        export: folder of the export.
        model: the model that was exported; None where there is only the folder.
        online: whether the Hub may be asked for what this machine does not have.
    """
    host = host_name(export, model)
    if not host:
        return [
            "no tokenizer: the host's name is not recorded. Pass tokenizer=... or save one in the "
            "folder"
        ]
    try:
        files = AutoProcessor.from_pretrained(
            host, local_files_only=not online, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        where = "there" if online else "on this machine"
        return [
            f"no tokenizer: none was found {where} for {host} ({type(error).__name__}). Pass "
            "tokenizer=... or save one in the folder"
        ]
    files.save_pretrained(target)
    return []


def host_name(export: Path, model: Any) -> str | None:
    """Folder or Hub name of the host that an export was made from, where it is recorded.

    `model`: the model that was exported; None where there is only the folder.
    """
    adapter, results = export / ADAPTER_CONFIG_FILE, export / _RESULTS_FILE
    if model is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return getattr(base, "name_or_path", None) or base.config.name_or_path or None
    if adapter.is_file():
        return read_json(adapter).get("base_model_name_or_path")
    if results.is_file():
        return (read_json(results).get("host") or {}).get("name")
    return None
