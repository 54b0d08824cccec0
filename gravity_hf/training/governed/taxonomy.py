"""Taxonomies: which parameters make a group, by their names, in a JSON file per model family."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

FOLDER = Path(__file__).parent / "taxonomies"
BY_KIND = "kinds"
_VERSION = "1.0"
_ORDERS = ("early", "mid", "late", "last")
# What peft, torch.compile and DDP put into the names of parameters.
_WRAPPERS = re.compile(
    r"(?:(?<=^)|(?<=\.))(?:_orig_mod|base_layer|original_module|modules_to_save\.[^.]+)\."
)
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")
# How a patched host is called: gravity_llama is a Llama.
_PATCHED = "gravity_"
_SHOWN = 12


@dataclass(frozen=True)
class GroupRule:
    """One group of a taxonomy: `patterns` are globs over names, `*` stands for dots too."""

    name: str
    level: int
    description: str
    patterns: tuple[str, ...]
    expected_order: str
    metrics: tuple[str, ...]

    def matches(self, name: str) -> bool:
        """Whether a parameter of this (plain) name belongs to the group."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Taxonomy:
    """The groups of a model family.

    Attributes:
        family: its name.
        model_types: transformers' names of the models that it is for.
        rules: one for each group.
        metrics: by metric, the groups it depends on; `("all",)`: on every one.
    """

    family: str
    model_types: tuple[str, ...]
    rules: tuple[GroupRule, ...]
    metrics: Mapping[str, tuple[str, ...]]

    def owners(self, names: Iterable[str]) -> dict[str, str]:
        """By parameter, the group it belongs to.

        Raises:
            ValueError: parameters that no group or more than one takes; the message lists them.
        """
        found, none, several = {}, [], []
        for name in names:
            plain = plain_name(name)
            takers = [rule.name for rule in self.rules if rule.matches(plain)]
            if len(takers) == 1:
                found[name] = takers[0]
            elif takers:
                several.append(f"{name} ({', '.join(takers)})")
            else:
                none.append(name)
        if none or several:
            raise ValueError(
                f"ParameterGroups: {self.family}: expected every parameter in exactly one group, "
                f"got {len(none)} in none{_listed(none)} and {len(several)} in several"
                f"{_listed(several)}. Add or narrow tensor_patterns"
            )
        return found


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (peft, torch.compile, DDP) put into it."""
    return _WRAPPERS.sub("", _PREFIXES.sub("", name))


def read_taxonomy(source: str | os.PathLike[str] | Mapping[str, Any]) -> Taxonomy:
    """A taxonomy from a JSON file or from its content.

    Raises:
        ValueError: it is none; the message says what is missing.
    """
    where = "taxonomy" if isinstance(source, Mapping) else str(source)
    try:
        content = (
            source
            if isinstance(source, Mapping)
            else json.loads(Path(source).read_text(encoding="utf-8"))
        )
        version = content["version"]
        rules = tuple(_rule(entry) for entry in content["groups"])
        metrics = {k: tuple(v) for k, v in content.get("metric_dependency_map", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: expected JSON with version, groups (group_id, hierarchy_level, "
            f"tensor_patterns) and metric_dependency_map, got {type(error).__name__}: {error}. "
            f"Those in {FOLDER.name}/ are examples"
        ) from error
    names = [rule.name for rule in rules]
    strangers = {group for groups in metrics.values() for group in groups} - {*names, "all"}
    if version != _VERSION or len(set(names)) < len(names) or strangers:
        raise ValueError(
            f"{where}: expected version {_VERSION}, groups of different names, and metrics of "
            f"these groups or of 'all', got version {version!r}, groups {names} and metrics of "
            f"{sorted(strangers)} besides"
        )
    types = tuple(content.get("model_types", ()))
    return Taxonomy(content.get("family", "custom"), types, rules, metrics)


def family_of(model: nn.Module) -> Taxonomy | None:
    """The taxonomy of the model's family; None where there is none."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or ""
    kind = kind.removeprefix(_PATCHED)
    for file in sorted(FOLDER.glob("*.json")):
        taxonomy = read_taxonomy(file)
        if kind and kind in taxonomy.model_types:
            return taxonomy
    return None


def _rule(entry: Mapping[str, Any]) -> GroupRule:
    order = entry.get("expected_convergence_order", "mid")
    if order not in _ORDERS:
        raise ValueError(f"expected_convergence_order: expected one of {_ORDERS}, got {order!r}")
    name = str(entry["group_id"])
    if not name or "+" in name:
        # Reports join the names of groups by it.
        raise ValueError(f"group_id: expected a name without '+', got {name!r}")
    return GroupRule(
        name=name,
        level=int(entry["hierarchy_level"]),
        description=str(entry.get("description", "")),
        patterns=tuple(entry["tensor_patterns"]),
        expected_order=order,
        metrics=tuple(entry.get("dependent_metrics", ())),
    )


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f": {', '.join(names[:_SHOWN])}{more}"
