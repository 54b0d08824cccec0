"""The export that a push takes up: a folder that is there, or a model saved to a new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..config import GravityConfig
from ..integration.hosts import settings_of
from ..integration.patching import refuse_wrapped
from .checks import ADAPTER_CONFIG_FILE, CONFIG_FILE, check_export, is_adapter
from .file_names import CARD_FILE
from .own_models import is_own_model, own_settings
from .tensor_files import read_json

_WHAT = "push_gravity_model"


def exported(
    model: nn.Module | str | os.PathLike[str],
    scratch: Path,
    folder: str | os.PathLike[str] | None,
    max_shard_size: int | str,
    *,
    online: bool,
) -> Path:
    """The folder of the export, checked.

    Args:
        model: a patched model, a PeftModel over one, or the folder of an export.
        scratch: a new folder, for a model that is not saved yet.
        folder: where `model` has been saved already.

    Raises:
        TypeError: `model` is nothing of the kind.
        RuntimeError: it is compiled, or wrapped for distribution.
        ValueError: the export is not whole or not safe, or is not that of `model`.
    """
    if isinstance(model, (str, os.PathLike)):
        if folder is not None:
            raise ValueError(
                f"{_WHAT}: expected the folder of an export once, got {str(model)!r} and "
                f"folder={str(folder)!r}. folder= says where a model in memory has been saved"
            )
        export = Path(model).expanduser()
        check_export(export)
        return export
    _, base = _parts(model)
    if folder is None:
        save_model(model, scratch, max_shard_size, online=online)
        check_export(scratch)
        return scratch
    export = Path(folder).expanduser()
    check_export(export)
    _check_fits(model, base, export)
    return export


def save_model(model: nn.Module, folder: Path, max_shard_size: int | str, *, online: bool) -> None:
    """Save a patched model, or the adapter of a PeftModel over one, to a new folder.

    Raises:
        TypeError: any other model. ValueError: its weights cannot be saved again.
    """
    adapter, base = _parts(model)
    if adapter is None:
        try:
            base.save_pretrained(folder, max_shard_size=max_shard_size)
        except NotImplementedError as error:
            raise ValueError(
                f"{_WHAT}: expected weights that can be saved, got a {type(base).__name__} whose "
                "quantized weights transformers cannot save again. Push the folder that it was "
                f"loaded from ({base.name_or_path or 'not recorded'})"
            ) from error
        return
    # peft would ask the Hub for the base's config, to see whether the vocabulary has grown.
    auto = online or Path(base.name_or_path or "").is_dir()
    adapter.save_pretrained(folder, save_embedding_layers="auto" if auto else False)
    # peft writes a card of its own kind; ours is made from what was measured.
    (folder / CARD_FILE).unlink(missing_ok=True)


def _parts(model: nn.Module) -> tuple[Any, Any]:
    """The PeftModel, if it is one, and the patched model."""
    adapter: Any = model if hasattr(model, "get_base_model") else None
    base: Any = model if adapter is None else adapter.get_base_model()
    if adapter is None and is_own_model(base):
        refuse_wrapped(model, _WHAT, "first model.merge_and_unload() of the PeftModel over it")
        return None, base
    if is_own_model(base):
        raise TypeError(
            f"{_WHAT}: expected {type(base).__name__} without adapters, got a PeftModel. Merge it "
            "first: model.merge_and_unload()"
        )
    if settings_of(base) is None:
        if adapter is None:
            refuse_wrapped(model, _WHAT, "push the model that is inside")
        raise TypeError(
            f"{_WHAT}: expected a patched model, a gravity_lora model or the folder of "
            f"an export, got {type(base).__name__} with its own attention. Call "
            "patch_with_gravity(model) first, or push it with model.push_to_hub"
        )
    return adapter, base


def _check_fits(model: nn.Module, base: Any, export: Path) -> None:
    adapter = hasattr(model, "get_base_model")
    values = read_json(export / (ADAPTER_CONFIG_FILE if is_adapter(export) else CONFIG_FILE))
    kind = values.get("model_type")
    fits = is_adapter(export) == adapter and (adapter or kind == type(base.config).model_type)
    if not fits or _settings_in(values, base) != _settings_of(base):
        what = "an adapter" if is_adapter(export) else f"a model of type {kind}"
        raise ValueError(
            f"{_WHAT}: expected in folder={str(export)!r} what this "
            f"{type(base).__name__} was saved as, got {what} with other settings. Leave out "
            "folder, and the model is saved"
        )


def _settings_in(values: dict[str, Any], base: Any) -> Any:
    """Of a model like `base`, from its config.json."""
    if is_own_model(base):
        return own_settings(type(base.config).from_dict(values))
    return GravityConfig.from_dict(values["gravity"])


def _settings_of(base: Any) -> Any:
    return own_settings(base.config) if is_own_model(base) else settings_of(base)
