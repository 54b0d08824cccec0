"""The host that a gravity model was made from: its name, and its tokenizer or processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers import AutoProcessor

from ..integration.autos import MODEL_TYPE_PREFIX
from .card_host import read_host_card
from .checks import ADAPTER_CONFIG_FILE, CONFIG_FILE
from .file_names import RESULTS_FILE
from .input_files import MARKS
from .own_models import is_own_folder
from .tensor_files import read_json

# Nothing of that name, no network, a gated repository, a name that is none.
_NOT_THERE = (OSError, ValueError, EntryNotFoundError, HfHubHTTPError.__mro__[1])


@dataclass(frozen=True)
class Access:
    """How the Hub may be asked. `online`: for what this machine does not have."""

    online: bool
    token: str | bool | None = None
    endpoint: str | None = None


def save_host_files(export: Path, model: Any, target: Path, access: Access) -> list[str]:
    """Save the host's tokenizer or processor to `target`; what people should know if there is none.

    Args:
        export: folder of the export.
        model: the model that was exported; None where there is only the folder.
    """
    source = _source_name(export, model)
    if is_own_folder(export) and not (source and Path(source).expanduser().is_dir()):
        # It has no host: only the folder that it was loaded from could have one.
        return [
            "no tokenizer or processor: pass tokenizer=... or processor=..., or save one in the "
            "folder"
        ]
    if not source:
        return [
            "no tokenizer or processor: the host's name is not recorded. Pass tokenizer=... or "
            "processor=..., or save one in the folder"
        ]
    try:
        if not any(_file(source, name, access) for name in MARKS):
            # transformers would make up an empty tokenizer of the host's kind.
            raise FileNotFoundError(source)
        files = AutoProcessor.from_pretrained(
            source,
            local_files_only=not access.online,
            trust_remote_code=False,
            token=access.token,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        where = "there" if access.online else "on this machine"
        return [
            f"no tokenizer or processor: none was found {where} for {source} "
            f"({type(error).__name__}). Pass tokenizer=... or processor=..., or save one in the "
            "folder"
        ]
    files.save_pretrained(target)
    return []


def host_name(export: Path, model: Any, access: Access) -> str | None:
    """Folder or Hub name of the host that an export was made from, where it is recorded.

    A model that was loaded as a gravity model names the gravity model: its host is the one that
    is recorded there.

    Args:
        model: the model that was exported; None where there is only the folder.
    """
    name = _source_name(export, model)
    if is_own_folder(export):
        return None
    if (export / ADAPTER_CONFIG_FILE).is_file():
        # An adapter's base is what it was trained on, gravity or not.
        return name
    seen: set[str] = set()
    while name and name not in seen:
        seen.add(name)
        config = _file(name, CONFIG_FILE, access)
        if config is None or not _is_gravity(config):
            return name
        name = _recorded(name, access)
    return None


def _source_name(export: Path, model: Any) -> str | None:
    """What the export was loaded from, be it the host or a gravity model."""
    if model is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return getattr(base, "name_or_path", None) or base.config.name_or_path or None
    if (export / ADAPTER_CONFIG_FILE).is_file():
        return read_json(export / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    return _in_results(export / RESULTS_FILE)


def _recorded(name: str, access: Access) -> str | None:
    """The host that a gravity model in a folder or on the Hub records."""
    results = _file(name, RESULTS_FILE, access)
    host = None if results is None else _in_results(results)
    return host or next(iter(read_host_card(name, online=access.online)["base_model"]), None)


def _in_results(file: Path) -> str | None:
    try:
        host = read_json(file).get("host")
    except (OSError, ValueError):
        return None
    if not isinstance(host, dict):
        return None
    # A folder's name alone says nothing of where it lay.
    name = host.get("name")
    found = not host.get("local") or Path(name or "").expanduser().is_absolute()
    return host.get("base_model") or (name if found else None)


def _is_gravity(config: Path) -> bool:
    try:
        return str(read_json(config).get("model_type")).startswith(MODEL_TYPE_PREFIX)
    except (OSError, ValueError):
        return False


def _file(name: str, file: str, access: Access) -> Path | None:
    """A file of a folder or of a repository on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        found = hf_hub_download(
            name,
            file,
            local_files_only=not access.online,
            token=access.token,
            endpoint=access.endpoint,
        )
    except _NOT_THERE:
        return None
    return Path(found)
