"""What the Hub says to the metadata of a card: it must be YAML, with fields of the known kinds."""

from __future__ import annotations

from typing import Any

import yaml

# Field of the metadata -> what it may be.
_KINDS: dict[str, tuple[type, ...]] = {
    "base_model": (str, list),
    "base_model_relation": (str,),
    "datasets": (str, list),
    "language": (str, list),
    "library_name": (str,),
    "license": (str, list),
    "license_link": (str,),
    "license_name": (str,),
    "metrics": (list,),
    "model-index": (list,),
    "pipeline_tag": (str,),
    "tags": (list,),
}


def validate(content: str) -> list[str]:
    """The errors; none for a card without metadata."""
    if not content.startswith("---"):
        return []
    parts = content.split("---", 2)
    if len(parts) < 3:
        return ["metadata is not closed by ---"]
    try:
        values = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        return [f"metadata is not YAML: {error}"]
    if values is None:
        return []
    if not isinstance(values, dict):
        return ["metadata must be an object"]
    errors = [
        f'"{name}" must be {" or ".join(kind.__name__ for kind in kinds)}'
        for name, kinds in _KINDS.items()
        if values.get(name) is not None and not isinstance(values[name], kinds)
    ]
    if not errors:
        errors = [e for entry in values.get("model-index") or [] for e in _index_errors(entry)]
    return errors


def _index_errors(entry: Any) -> list[str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return ['"model-index[0].name" is required']
    errors = []
    for result in entry.get("results") or []:
        task, data = result.get("task") or {}, result.get("dataset") or {}
        if not task.get("type"):
            errors.append('"model-index[0].results[0].task.type" is required')
        if not data.get("type") or not data.get("name"):
            errors.append('"model-index[0].results[0].dataset" needs a type and a name')
        for metric in result.get("metrics") or [{}]:
            if not metric.get("type") or metric.get("value") is None:
                errors.append('"model-index[0].results[0].metrics[0]" needs a type and a value')
    return errors
