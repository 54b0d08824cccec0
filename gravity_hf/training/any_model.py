"""Loading whatever there is to measure: gravity checkpoints, adapters, plain models."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..integration.autos import MODEL_TYPE_PREFIX
from ..integration.loading import (
    ADAPTER_CONFIG_NAME,
    MASS_LOG_NAMES,
    load_gravity_model,
    load_host_or_gravity,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_any_model(
    name: str, dtype: str = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """The model of a folder or Hub repository, in evaluation mode.

    Gravity checkpoints, gravity adapters and hosts with Gravity-2's masses come back with gravity
    attention; anything else as the plain model that it is.

    Args:
        name: folder or Hub repository.
        dtype: one of `DTYPES`.
        device: None takes CUDA where there is one.

    Raises:
        ValueError: there is no such model, or no such device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"model: expected a model folder, there is none at {name!r}. Check the spelling"
        )
    where = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    load = load_gravity_model if _is_gravity(where) else load_host_or_gravity
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(target)
    return load(where, dtype=kind).to(target).eval()


def load_any_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model; of an adapter without one, that of its base."""
    where = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        return transformers.AutoTokenizer.from_pretrained(_tokenizer_home(where))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"model: expected a tokenizer beside the model, got none in {name!r} "
            f"({_first_line(error)}). Save one there with tokenizer.save_pretrained"
        ) from error


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    # What is raised depends on how torch was built.
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device: expected one that this machine has, such as 'cpu', got {str(device)!r} "
            f"({_first_line(error)})"
        ) from error


def _is_gravity(where: str) -> bool:
    if not _has(where, "config.json"):
        if _has(where, ADAPTER_CONFIG_NAME):
            return True
        raise ValueError(
            f"model: expected a model folder or the name of a model on the Hub, got {where!r} "
            "without config.json and adapter_config.json. Check the spelling, or download it first"
        )
    config = AutoConfig.from_pretrained(where)
    is_gravity = config.model_type.startswith(MODEL_TYPE_PREFIX)
    return is_gravity or any(_has(where, name) for name in MASS_LOG_NAMES)


def _has(where: str, name: str) -> bool:
    if Path(where).is_dir():
        return Path(where, name).is_file()
    found = cached_file(
        where,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _tokenizer_home(where: str) -> str:
    if _has(where, "tokenizer_config.json") or not _has(where, ADAPTER_CONFIG_NAME):
        return where
    # Imported here because peft is optional.
    from ..integration.adapters import base_of_adapter

    local = Path(where, ADAPTER_CONFIG_NAME)
    file = local if local.is_file() else cached_file(where, ADAPTER_CONFIG_NAME)
    return base_of_adapter(str(file))


def _first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip().rstrip(".")
