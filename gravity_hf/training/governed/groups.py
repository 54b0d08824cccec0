"""The parameters of a model in groups that learn together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .module_kinds import owners_by_kind
from .taxonomy import BY_KIND, FOLDER, Taxonomy, family_of, read_taxonomy

AUTO = "auto"


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that learn together.

    Attributes:
        name: of the group.
        level: from 0, which learns from the start; see `Hierarchy`.
        description: in words.
        expected_order: when it is expected to converge: "early", "mid", "late" or "last".
        metrics: what depends on it.
        names: of its parameters in the model.
        parameters: of these names, in their order.
        trainable: whether each of them required gradients when the group was made. What did not
            (the base under an adapter) is never made to.
    """

    name: str
    level: int
    description: str
    expected_order: str
    metrics: tuple[str, ...]
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    trainable: tuple[bool, ...]

    @property
    def size(self) -> int:
        """How many numbers its parameters hold."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def trained_parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that may learn."""
        rows = zip(self.parameters, self.trainable, strict=True)
        return tuple(parameter for parameter, learns in rows if learns)


class ParameterGroups:
    """Every parameter of a model in exactly one group.

    Iterating gives the groups, by level; `groups["layer_norms"]` one of them.

    Args:
        groups: of different names and parameters; `of` makes them.
        taxonomy: what they were made by.
    """

    def __init__(self, groups: list[ParameterGroup], taxonomy: Taxonomy) -> None:
        self._groups = {group.name: group for group in sorted(groups, key=lambda g: g.level)}
        self.taxonomy = taxonomy

    @classmethod
    def of(
        cls,
        model: nn.Module,
        registry: str | os.PathLike[str] | Mapping[str, Any] = AUTO,
    ) -> ParameterGroups:
        """The groups of `model`.

        Tied weights are in the group of their first name, once. Groups without parameters are left
        out. Make them before anything is frozen for a while: what does not require gradients now
        is taken for what never shall.

        Args:
            model: of any kind, also under peft's wrapper.
            registry: "auto" takes the taxonomy of the model's family or, where there is none, the
                kinds of its modules; otherwise a taxonomy: a JSON file, or its content.

        Raises:
            ValueError: parameters in no group or in several, listed; no taxonomy; no parameters.
        """
        named = dict(model.named_parameters())
        if not named:
            raise ValueError("ParameterGroups.of: expected a model with parameters, got none")
        taxonomy = family_of(model) if registry == AUTO else read_taxonomy(registry)
        if taxonomy is None:
            taxonomy, owners = read_taxonomy(FOLDER / f"{BY_KIND}.json"), owners_by_kind(model)
        else:
            owners = taxonomy.owners(named)
        members: dict[str, dict[str, nn.Parameter]] = {rule.name: {} for rule in taxonomy.rules}
        for name, parameter in named.items():
            members[owners[name]][name] = parameter
        groups = [
            ParameterGroup(
                name=rule.name,
                level=rule.level,
                description=rule.description,
                expected_order=rule.expected_order,
                metrics=rule.metrics,
                names=tuple(members[rule.name]),
                parameters=tuple(members[rule.name].values()),
                trainable=tuple(p.requires_grad for p in members[rule.name].values()),
            )
            for rule in taxonomy.rules
            if members[rule.name]
        ]
        return cls(groups, taxonomy)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all groups, by level."""
        return tuple(self._groups)

    @property
    def levels(self) -> dict[int, tuple[str, ...]]:
        """The groups of each level, of those that have something to train."""
        found: dict[int, tuple[str, ...]] = {}
        for group in self:
            if any(group.trainable):
                found[group.level] = (*found.get(group.level, ()), group.name)
        return found

    @property
    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """By metric, the groups of this model that it depends on."""
        found = {}
        for metric, groups in self.taxonomy.metrics.items():
            here = self.names if "all" in groups else groups
            found[metric] = tuple(name for name in here if name in self._groups)
        return found

    def summary(self) -> dict[str, Any]:
        """Family, total, and by group its level, numbers of parameters and share; JSON-able."""
        total = sum(group.size for group in self)
        rows = {
            group.name: {
                "level": group.level,
                "parameters": group.size,
                "trainable": sum(p.numel() for p in group.trained_parameters),
                "fraction": group.size / total,
            }
            for group in self
        }
        return {"family": self.taxonomy.family, "parameters": total, "groups": rows}

    def __getitem__(self, name: str) -> ParameterGroup:
        return self._groups[name]

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[ParameterGroup]:
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)
