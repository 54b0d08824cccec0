"""What is logged, as strict JSON: copied and checked before anything keeps or writes it."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEEPEST = 64
_PLAIN = (type(None), bool, int, str)


def json_value(value: Any, where: str = "payload") -> Any:
    """A copy of `value` that strict JSON can hold; nothing in it is shared with `value`.

    Tensors and arrays become nested lists, dataclasses objects, paths, dates, dtypes and devices
    text, enum members their values, sets sorted lists. JSON has no word for NaN and the infinities:
    they become the strings `"NaN"`, `"Infinity"`, `"-Infinity"`.

    Args:
        where: what the error message calls `value`.

    Raises:
        TypeError: something in `value` has no JSON form; the message says where it stands.
        ValueError: nested deeper than 64 levels, as something that contains itself is.
    """
    return _encoded(value, where, 0)


def strict_json(value: Any) -> str:
    """One line of JSON, ASCII; never `NaN` or `Infinity`."""
    return json.dumps(value, allow_nan=False)


def parsed_json(text: str | bytes) -> Any:
    """What `text` says; ValueError also where it is nested deeper than Python can read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("expected JSON, got one that is nested too deeply to be read") from error


def _encoded(value: Any, where: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError(
            f"{where}: expected at most {_DEEPEST} levels, got more. Does it contain itself? "
            "Log a flat summary"
        )
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return _finite_or_text(value)
    # Then what could pass for a plain number or string.
    if isinstance(value, enum.Enum):
        return _encoded(value.value, where, depth + 1)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Tensor):
        return _encoded(_listed(value, where), where, depth)
    if isinstance(value, np.ndarray | np.generic):
        return _encoded_list(value, where, depth)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _finite_or_text(float(value))
    if isinstance(value, Mapping):
        return _encoded_mapping(value, where, depth)
    if isinstance(value, list | tuple):
        return [_encoded(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((_encoded(x, where, depth + 1) for x in value), key=strict_json)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _encoded_mapping(fields, where, depth)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise TypeError(
        f"{where}: expected something with a JSON form (numbers, text, lists, mappings, tensors, "
        f"dataclasses, paths, dates), got {type(value).__name__}. Log numbers or str(...) of it"
    )


def _listed(value: Tensor, where: str) -> Any:
    if value.is_meta:
        raise TypeError(f"{where}: expected a tensor with values, got one on the meta device")
    if value.is_complex():
        raise TypeError(f"{where}: expected real numbers, got {value.dtype}. Log its two parts")
    value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    return value.cpu().tolist()


def _encoded_list(value: np.ndarray | np.generic, where: str, depth: int) -> Any:
    if value.dtype.kind not in "biufUMm" and value.dtype.kind != "O":
        raise TypeError(f"{where}: expected real numbers or text, got an array of {value.dtype}")
    if value.dtype.kind in "Mm":
        return _encoded(value.astype(str).tolist(), where, depth)
    return _encoded(value.tolist(), where, depth)


def _encoded_mapping(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str) and (isinstance(key, bool) or not isinstance(key, int)):
            raise TypeError(f"{where}: expected keys that are text or integers, got {key!r}")
        if str(key) in encoded:
            raise TypeError(f"{where}: expected different keys, got {str(key)!r} twice as text")
        encoded[str(key)] = _encoded(item, f"{where}.{key}", depth + 1)
    return encoded


def _finite_or_text(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
