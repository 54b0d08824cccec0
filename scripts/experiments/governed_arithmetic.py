"""Arithmetic of the experiment on governed training, counted, and a control that saves as much."""

from __future__ import annotations

from typing import Any

from governed_arms import RandomFreezing, random_schedule


def counter_of(run: dict[str, Any], model: Any, text: Any) -> Any:
    """A function: operations (forward, backward) of a batch in which a set of groups learns."""
    import torch

    from gravity_hf.training.governed.probe import ProbeData, backward_flops
    from gravity_hf.training.streams import RandomWindows, collate

    members = members_of(model)
    windows = RandomWindows(text.train, run["rows"], run["length"], 0)
    data = ProbeData(windows, collate, run["rows"], 0, torch.device(run["device"]))
    known: dict[Any, tuple[int, int]] = {}

    def count(groups: tuple[str, ...] | None) -> tuple[int, int]:
        if groups not in known:
            wanted = set(members) if groups is None else set(groups)
            known[groups] = backward_flops(model, members, wanted, data)
        return known[groups]

    return count


def members_of(model: Any) -> dict[str, Any]:
    from gravity_hf.training.governed import ParameterGroups

    return {group.name: group.trained_parameters for group in ParameterGroups.of(model)}


class LateFreezing(RandomFreezing):
    """A `RandomFreezing` that is drawn when training begins."""

    def __init__(self, run: dict[str, Any], text: Any) -> None:
        super().__init__({}, [set()], max(2, run["steps"] // 20))
        self.settings, self.text = run, text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, model = self.settings, kwargs["model"]
        self.members = members_of(model)
        count = counter_of(run, model, self.text)
        whole = count(None)[1]
        savings = {
            name: whole - count(tuple(sorted(set(self.members) - {name})))[1]
            for name in self.members
        }
        windows = -(-run["steps"] // self.window)
        wanted = run["saved"] * whole
        self.schedule = random_schedule(savings, wanted, windows, run["seed"])

    def learned(self, steps: int) -> list[tuple[tuple[str, ...] | None, int]]:
        """Sets of groups with their steps."""
        found: dict[tuple[str, ...] | None, int] = {}
        for step in range(steps):
            frozen = self.schedule[min(step // self.window, len(self.schedule) - 1)]
            groups = tuple(sorted(set(self.members) - frozen))
            found[groups] = found.get(groups, 0) + 1
        return list(found.items())
