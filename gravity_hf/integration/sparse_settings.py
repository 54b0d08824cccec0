"""What sparse attention of a host is set to, and where it is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..ops.sparse import KeyBudget

# Names under which attention and masks are registered: of hosts, and of hosts under gravity.
SPARSE_NAME = "sparse_topk"
SPARSE_GRAVITY_NAME = "sparse_gravity"
# Attribute of a model's config, hence key in its `config.json`.
SETTINGS_KEY = "sparse_attention"
SCREENINGS = ("keys", "learned", "principal")


@dataclass(frozen=True)
class SparseSettings:
    """How a host's attention chooses its keys.

    Attributes:
        budget: how many keys, in blocks of how many.
        screening: what they are chosen by. "keys": queries and keys themselves; "learned":
            projections of them that `fit_screening` trains; "principal": projections onto the
            directions in which the keys vary most.
        screen_dim: width of those projections.
    """

    budget: KeyBudget = field(default_factory=KeyBudget)
    screening: str = "keys"
    screen_dim: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.budget, KeyBudget):
            raise TypeError(
                f"SparseSettings.budget: expected a KeyBudget, got {self.budget!r}. "
                "from gravity_hf import KeyBudget"
            )
        if self.screening not in SCREENINGS:
            raise ValueError(
                f"screening: expected one of {list(SCREENINGS)}, got {self.screening!r}"
            )
        if not isinstance(self.screen_dim, int) or self.screen_dim < 1:
            raise ValueError(f"screen_dim: expected at least 1, got {self.screen_dim!r}")

    @property
    def has_projections(self) -> bool:
        """Whether attention modules get a child `screening`."""
        return self.screening != "keys"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the budget's settings, `screening` and, with projections, `screen_dim`."""
        values = {**dataclasses.asdict(self.budget), "screening": self.screening}
        return {**values, "screen_dim": self.screen_dim} if self.has_projections else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseSettings:
        """What `to_dict` wrote. Unknown names are errors."""
        own = {name: values[name] for name in ("screening", "screen_dim") if name in values}
        rest = {name: value for name, value in values.items() if name not in own}
        return cls(budget=budget_from(rest), **own)


def budget_from(values: KeyBudget | Mapping[str, Any] | None) -> KeyBudget:
    """A budget as it is, from its settings by name, or the default one.

    Raises:
        ValueError: a name that a budget does not have.
        TypeError: neither.
    """
    if values is None or isinstance(values, KeyBudget):
        return KeyBudget() if values is None else values
    if not isinstance(values, Mapping):
        raise TypeError(f"budget: expected a KeyBudget or a dict of its settings, got {values!r}")
    known = [one.name for one in dataclasses.fields(KeyBudget)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"budget: expected settings among {known}, got {unknown} too")
    return KeyBudget(**values)


def settings_in(config: Any) -> SparseSettings | None:
    """What a config says; None where it says nothing."""
    values = getattr(config, SETTINGS_KEY, None)
    return None if values is None else SparseSettings.from_dict(values)


def settings_of_module(module: nn.Module) -> SparseSettings:
    """Of an attention module: its own, those of its config, or the defaults."""
    own = module.__dict__.get("sparse_settings")
    if own is not None:
        return own
    return settings_in(getattr(module, "config", None)) or SparseSettings()


def sparse_modules(model: nn.Module) -> dict[str, Any]:
    """The attention modules that `sparsify_attention` made sparse, by name; works under peft."""
    named = model.named_modules()
    return {name: module for name, module in named if "sparse_settings" in vars(module)}


def sparse_settings_of(model: nn.Module) -> SparseSettings | None:
    """The settings of a model that `sparsify_attention` made sparse; None for any other."""
    return next((module.sparse_settings for module in sparse_modules(model).values()), None)


def attends_locally(module: nn.Module) -> bool:
    """Whether an attention module sees a sliding window or a chunk only.

    Such a layer stays as it is: its reach is bounded already, and its cache forgets the keys from
    which blocks would be counted. Told by the config alone, never by a length: a layer that was
    sparse as long as its window hides nothing would change its mind about earlier tokens.
    """
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(number, int) and number < len(kinds):
        return kinds[number] in _LOCAL
    if hasattr(module, "sliding_window"):
        return bool(module.sliding_window)
    return bool(getattr(config, "sliding_window", None))


_LOCAL = ("sliding_attention", "chunked_attention")
